"""Data sets that the ledger knows by name: statistics, duplicates, leaks between splits, and exports."""

from __future__ import annotations

import re
import sqlite3
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.data.dedup import hash64, minhash, near_duplicates, shingles, words
from mlx_distill.data.export_rows import LAYOUTS, export_rows
from mlx_distill.data.prepare import SPLIT_NAMES, asked_text, known_text
from mlx_distill.data.rows import to_example
from mlx_distill.data.sources import read_source
from mlx_distill.data.splits import SPLITS
from mlx_distill.data.statistics import DropCounter, RowStatistics, row_figures
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.ledger.database import Ledger, from_json, new_id, to_json
from mlx_distill.recipe import SourceConfig
from mlx_distill.records import Example
from mlx_distill.storage import fingerprint
from mlx_distill.tasks.task import CHATS, Task, load_task
from mlx_distill.text import counted, known_names

__all__ = [
    "LAYOUTS",
    "DataSet",
    "Description",
    "add_data_set",
    "check_data_set",
    "describe",
    "export_data_set",
    "get_data_set",
    "list_data_sets",
]

THRESHOLD = 0.85
"""Jaccard similarity of word shingles from which two rows are near duplicates: the default of recipes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_SPLIT = "(none)"
_EXAMPLES = 5


@dataclass(frozen=True)
class Description:
    """What is in a data set.

    Attributes:
        rows: Rows that were read.
        invalid: Those that fit neither the task nor, without one, any layout of chats; with the first few.
        splits: Rows of each split that the rows, or their files' names, ask for.
        duplicates: ``exact`` (rows whose text another row has), ``conflicting`` (those with another answer),
            ``near`` (rows with nearly the text of an earlier one), and ``examples``.
        leaks: Rows of training that a held-out split has too: ``exact``, ``near``, and ``examples``.
        statistics: ``labels``, ``slices`` and ``characters`` of each split, as of the prepare stage.
    """

    rows: int
    invalid: Mapping[str, Any]
    splits: Mapping[str, int]
    duplicates: Mapping[str, Any]
    leaks: Mapping[str, Any]
    statistics: Mapping[str, Any]

    @property
    def problems(self) -> list[str]:
        """What should be corrected before a training."""
        out = []
        if self.invalid["count"]:
            reasons = "; ".join(self.invalid["examples"])
            out.append(f"{counted(self.invalid['count'], 'row')} cannot be used: {reasons}")
        if self.duplicates["conflicting"]:
            conflicting = counted(self.duplicates["conflicting"], "row")
            out.append(f"{conflicting} with the text of another and another answer")
        if leaked := self.leaks["exact"] + self.leaks["near"]:
            examples = "; ".join(self.leaks["examples"])
            out.append(f"{counted(leaked, 'training row')} in a held-out split too: {examples}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "rows": self.rows,
            "invalid": dict(self.invalid),
            "splits": dict(self.splits),
            "duplicates": dict(self.duplicates),
            "leaks": dict(self.leaks),
            "statistics": dict(self.statistics),
            "problems": self.problems,
        }

    def lines(self) -> list[str]:
        """The description for people."""
        splits = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        out = [f"rows        {self.rows:,}" + (f" ({splits})" if set(self.splits) - {_NO_SPLIT} else "")]
        labels: Counter[str] = Counter()
        for counts in self.statistics["labels"].values():
            labels.update(counts)
        if labels:
            out.append(
                "labels      " + ", ".join(f"{name} {count:,}" for name, count in labels.most_common(12))
            )
        for split, parts in self.statistics["characters"].items():
            for part, values in parts.items():
                if values:
                    name = part if split == _NO_SPLIT else f"{part} ({split})"
                    low, high, middle = (values[key] for key in ("min", "max", "median"))
                    out.append(f"characters  {name}: {low:,} to {high:,}, median {middle:,.0f}")
        exact, near = self.duplicates["exact"], self.duplicates["near"]
        out.append(f"duplicates  {exact:,} exact, {near:,} near")
        return [*out, *(f"problem: {problem}" for problem in self.problems)]


@dataclass(frozen=True)
class DataSet:
    """A data set as the ledger has it; ``facts`` is :meth:`Description.to_dict` when it was added.

    Attributes:
        path: Of its file or folder, relative to the root.
        sha256: Of its content when it was added.
        task: The packaged task or the YAML file by which its rows are read; None: chats of any kind.
        changed: Whether its content is another one now.
    """

    id: str
    name: str
    path: str
    sha256: str
    rows: int
    task: str | None
    created_at: float
    facts: Mapping[str, Any]
    changed: bool = False

    @property
    def description(self) -> Description:
        """What was in it when it was added."""
        known = {key: value for key, value in self.facts.items() if key != "problems"}
        return Description(**known)

    def lines(self) -> list[str]:
        """The data set for people."""
        head = [
            f"{self.name}: {self.path}, " + (f"task {self.task}" if self.task else "chats without a task")
        ]
        if self.changed:
            head.append("its content has changed since; look again with: mlx-distill data add " + self.path)
        return [*head, *self.description.lines()]


def add_data_set(
    ledger: Ledger, path: str | Path, *, name: str | None = None, task: str | None = None
) -> DataSet:
    """Describe the rows of a file or a folder, and keep that under a name; the rows stay where they are.

    Added again under its name, the same path is described anew.

    Args:
        ledger: The ledger.
        path: The file or folder, under the root: of any format that prepare reads.
        name: Letters, digits, dots, dashes.  [default: that of the file]
        task: A packaged task, or a YAML file; None: the rows are chats of any kind.

    Raises:
        ConfigError: a path outside of the root, a name that cannot be one or that another data set has.
        DataError: no such file, no rows.
    """
    place = ledger.root.relative(path)
    name = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place).name.split(".")[0]).strip("-") if name is None else name
    )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r}: no name for a data set",
            fix="use letters, digits, dots, dashes and underscores: --name NAME",
        )
    description = describe(ledger, place, task)
    values = (
        *(place, fingerprint(str(ledger.root.inside(place))), description.rows, task, time.time()),
        to_json(description.to_dict()),
    )
    with ledger.write() as db:
        known = db.execute("SELECT path FROM data_sets WHERE name = ?", (name,)).fetchone()
        if known is not None and known["path"] != place:
            raise ConfigError(
                f"{name!r} is the data set {known['path']}", fix="choose another name: --name NAME"
            )
        if known is None:
            db.execute(
                "INSERT INTO data_sets (path, sha256, rows, task, created_at, facts, id, name) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, new_id("data"), name),
            )
        else:
            db.execute(
                "UPDATE data_sets SET path = ?, sha256 = ?, rows = ?, task = ?, created_at = ?, facts = ? "
                "WHERE name = ?",
                (*values, name),
            )
    return get_data_set(ledger, name)


def list_data_sets(ledger: Ledger) -> list[DataSet]:
    """All data sets, by name. Whether their content has changed is not looked at."""
    with ledger.read() as db:
        return [_data_set(row) for row in db.execute("SELECT * FROM data_sets ORDER BY name")]


def get_data_set(ledger: Ledger, name: str) -> DataSet:
    """The data set of a name.

    Raises:
        ConfigError: there is none; with the nearest names.
    """
    found = {data.name: data for data in list_data_sets(ledger)}
    if name not in found:
        fix = known_names(name, list(found), "data sets") if found else "add it: mlx-distill data add PATH"
        raise ConfigError(f"no data set {name!r}", fix=fix)
    data = found[name]
    return DataSet(**{**vars(data), "changed": _is_changed(ledger, data)})


def _is_changed(ledger: Ledger, data: DataSet) -> bool:
    try:
        path = ledger.root.inside(data.path)
        return not path.exists() or fingerprint(str(path)) != data.sha256
    except (OSError, ConfigError):
        return True


def changed_data_sets(ledger: Ledger) -> list[DataSet]:
    """The data sets whose content is another one now, is gone or cannot be read, by name.

    Only files that were written since they were described are hashed: one that was replaced by an older file
    is not found here, but by :func:`get_data_set`.
    """
    return [
        DataSet(**{**vars(data), "changed": True})
        for data in list_data_sets(ledger)
        if _was_written(ledger, data) and _is_changed(ledger, data)
    ]


def _was_written(ledger: Ledger, data: DataSet) -> bool:
    """Whether a data set's files are gone, or newer than their description."""
    path = ledger.root.path / data.path
    files = (path, *path.rglob("*")) if path.is_dir() else (path,)
    try:
        return max(file.stat().st_mtime for file in files) >= data.created_at
    except OSError:
        return True


def _data_set(row: sqlite3.Row) -> DataSet:
    return DataSet(**{**dict(row), "facts": from_json(row["facts"])})


def check_data_set(ledger: Ledger, name: str, *, task: str | None = None) -> Description:
    """What is in a data set, or in a file or folder under the root, as it is now."""
    path, own = _place(ledger, name)
    return describe(ledger, path, task or own)


def export_data_set(
    ledger: Ledger,
    name: str,
    destination: str | Path,
    layout: str,
    *,
    split: str | None = None,
    task: str | None = None,
    bare: bool = False,
) -> int:
    """Write the rows of a data set, or of a file or folder under the root, for another tool; return how many.

    Args:
        ledger: The ledger.
        name: Of the data set, or its path under the root.
        destination: The new file, which may lie anywhere.
        layout: ``openai``, ``alpaca`` or ``chatml``.
        split: ``train``, ``valid`` or ``test``: the rows of that split alone; ``all``: those of all splits.
            It has to be said where the rows have several, lest somebody trains on test rows.
        task: By which the rows are read.  [default: that of the data set]
        bare: Leave out ids and other columns, which some tools refuse.

    Raises:
        DataError: rows that the layout cannot hold, by their numbers; nothing is written.
        ConfigError: no such data set, layout or split, several splits, or a destination that exists.
    """
    path, own = _place(ledger, name)
    target = Path(destination).expanduser()
    if target.exists():
        raise ConfigError(f"{destination}: exists already", fix="choose another name")
    known = _task(ledger, task or own)
    return export_rows(_of_split(_rows(ledger, path, known), split), target, layout, known, bare=bare)


def _of_split(
    rows: Iterator[tuple[str, Example | DataError, Mapping[str, Any]]], split: str | None
) -> Iterator[tuple[str, Example | DataError]]:
    """The rows of a split, of all splits, or with None of the only one."""
    if split not in (None, "all", *SPLITS):
        raise ConfigError(f"no split {split!r}", fix=f"use {', '.join(SPLITS)} or all")
    first, count = None, 0
    for where, example, raw in rows:
        own = _split(where, raw, example)
        first = first or own
        if split is None and own != first:
            raise ConfigError(
                f"the rows are of several splits: {first}, {own}", fix="name one with --split, or --split all"
            )
        if split in (None, "all", own):
            count += 1
            yield where, example
    if not count and first is not None:
        raise ConfigError(f"no rows of the split {split!r}", fix=f"the first row is of the split {first}")


def _place(ledger: Ledger, name: str) -> tuple[str, str | None]:
    """The path of a data set and its task; of a path under the root itself."""
    known = next((data for data in list_data_sets(ledger) if data.name == name), None)
    if known is not None:
        return known.path, known.task
    if ledger.root.inside(name).exists():
        return ledger.root.relative(name), None
    names = [data.name for data in list_data_sets(ledger)]
    raise ConfigError(
        f"no data set {name!r}, and no such file or folder under {ledger.root.path}",
        fix=known_names(name, names, "data sets") if names else "add one: mlx-distill data add PATH",
    )


def _task(ledger: Ledger, task: str | None) -> Task:
    return CHATS if task is None else load_task(task, ledger.root.path)


def _rows(
    ledger: Ledger, path: str, task: Task
) -> Iterator[tuple[str, Example | DataError, Mapping[str, Any]]]:
    """Where each row is from, the row or why it is none, and what the file has of it."""
    for file in _files(ledger.root.inside(path)):
        for where, raw in read_source(SourceConfig(path=str(file)), task):
            short = _short(where)
            try:
                yield short, to_example(raw, task, short), raw
            except DataError as error:
                yield short, error, raw


def _files(path: Path) -> list[Path]:
    """The files of a folder that are named after splits, in the order of the splits; else the path itself, of
    which a source of a recipe reads one split alone.
    """
    named = {
        file: SPLIT_NAMES[file.name.split(".")[0].lower()]
        for file in (sorted(path.iterdir()) if path.is_dir() else ())
        if file.is_file() and file.name.split(".")[0].lower() in SPLIT_NAMES
    }
    return sorted(named, key=lambda file: (named[file], file.name)) or [path]


def _short(where: str) -> str:
    """``file:line`` without the folders, which are those of the data set."""
    folder, separator, name = where.rpartition("/")
    return name if separator else folder + name


# --- description --------------------------------------------------------------------------------------------


@dataclass
class _Texts:
    """What is kept of each row to find its duplicates: a few numbers."""

    where: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    text: array[int] = field(default_factory=lambda: array("Q"))
    answer: array[int] = field(default_factory=lambda: array("Q"))
    signatures: list[Any] = field(default_factory=list)


def describe(ledger: Ledger, path: str, task: str | None = None) -> Description:
    """Read all rows of a file or folder under the root: counts, lengths, duplicates, leaks.

    Two rows are duplicates by the rules of the prepare stage: of what the user and tools say; without a task
    exact ones are those of the whole chat. Each row takes half a kilobyte of memory.

    Args:
        ledger: Whose root it is.
        path: Relative to the root.
        task: See :func:`add_data_set`.
    """
    if not ledger.root.inside(path).exists():
        raise DataError(f"{ledger.root.inside(path)}: no such file or folder", fix="check the path")
    known = _task(ledger, task)
    invalid, texts, counted_fields = DropCounter(), _Texts(), tuple(known.slices)
    statistics, cache = RowStatistics(counted_fields), dict[str, int]()
    splits: Counter[str] = Counter()
    rows = 0
    for where, example, raw in _rows(ledger, path, known):
        rows += 1
        if isinstance(example, DataError):
            invalid.add("cannot be used", example.message)
            continue
        split = _split(where, raw, example)
        splits[split] += 1
        statistics.add(split, "test", row_figures(example, known.label, counted_fields))
        texts.where.append(where)
        texts.splits.append(split)
        texts.text.append(hash64(" ".join(words(known_text(example, known), punctuation=True))))
        texts.answer.append(hash64(example.messages[-1].content))
        texts.signatures.append(minhash(shingles(words(asked_text(example)), cache)))
    summary = invalid.summary().get("cannot be used", {"count": 0, "examples": []})
    order = [*(name for name in SPLITS if name in splits), *(n for n in splits if n not in SPLITS)]
    figures = statistics.summary(order)
    duplicates, leaks = _duplicates(texts)
    return Description(
        rows,
        summary,
        {name: splits[name] for name in order},
        duplicates,
        leaks,
        {key: figures[key] for key in ("labels", "slices", "characters")},
    )


def _split(where: str, raw: Mapping[str, Any], example: Example | DataError) -> str:
    """The split that a row asks for, or that its file is named after."""
    fields = {} if isinstance(example, DataError) else example.fields
    own = raw.get("split", fields.get("split"))
    stem = where.rpartition(":")[0].split(".")[0]
    for name in (own, stem):
        number = SPLIT_NAMES.get(str(name).strip().lower()) if name is not None else None
        if number is not None:
            return SPLITS[number]
    return _NO_SPLIT


def _duplicates(texts: _Texts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Duplicates among all rows, and those of them that are in training and held out."""
    exact = _groups(list(texts.text))
    near = []
    if texts.signatures:
        import numpy as np

        near = _groups(near_duplicates(np.stack(texts.signatures), THRESHOLD).roots().tolist())
    first = {row for group in exact for row in group[:1]}
    repeated = {row for group in exact for row in group[1:]}
    conflicting = {
        row for group in exact for row in group if len({texts.answer[other] for other in group}) > 1
    }
    nearly = [row for group in near for row in group[1:] if row not in repeated and row not in first]
    duplicates = {
        "exact": len(repeated),
        "conflicting": len(conflicting),
        "near": len(nearly),
        "examples": [
            " and ".join(texts.where[row] for row in group[:2]) for group in (*exact, *near)[:_EXAMPLES]
        ],
    }
    leaked_exactly = _leaks(exact, texts.splits)
    leaked_nearly = {
        row: other for row, other in _leaks(near, texts.splits).items() if row not in leaked_exactly
    }
    pairs = [*leaked_exactly.items(), *leaked_nearly.items()]
    leaks = {
        "exact": len(leaked_exactly),
        "near": len(leaked_nearly),
        "examples": [f"{texts.where[row]} and {texts.where[other]}" for row, other in pairs[:_EXAMPLES]],
    }
    return duplicates, leaks


def _groups(keys: Sequence[int]) -> list[list[int]]:
    """The rows of each key that several have."""
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return [group for group in rows.values() if len(group) > 1]


def _leaks(groups: Sequence[Sequence[int]], splits: Sequence[str]) -> dict[int, int]:
    """The training rows of groups that have a held-out row, with that row."""
    out = dict[int, int]()
    for group in groups:
        held_out = [row for row in group if splits[row] in ("valid", "test")]
        if held_out:
            out |= {row: held_out[0] for row in group if splits[row] == "train"}
    return out
