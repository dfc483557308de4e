"""Prepare: read, check, filter, find duplicates, split, write. Rows wait in a file; in memory are some
numbers of each.

sources -> checked chats -> filters -> spool -> duplicates -> sides -> train, valid, test.jsonl,
statistics.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from mlx_distill.data.dedup import Clusters, minhash, near_duplicates, shingles, words
from mlx_distill.data.row_buffer import RowBuffer
from mlx_distill.data.rows import from_row, to_example, to_row
from mlx_distill.data.sources import read_source
from mlx_distill.data.splits import DROPPED, FREE, SPLITS, TEST, TRAIN, VALID, draw, settle_forced
from mlx_distill.data.statistics import Counts, Dropped
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.progress import NullProgress, Progress
from mlx_distill.recipe import DataConfig
from mlx_distill.storage import atomic_path, os_errors, scratch, write_json
from mlx_distill.tasks.task import Task

FORMAT = 1

_SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "valid": VALID,
    "validation": VALID,
    "val": VALID,
    "dev": VALID,
    "test": TEST,
    "eval": TEST,
    "heldout": TEST,
    "held_out": TEST,
    "held-out": TEST,
}


def prepare(
    config: DataConfig, task: Task, base: Path | None, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Write ``train.jsonl``, ``valid.jsonl``, ``test.jsonl`` and ``statistics.json`` into ``folder``.

    Rows with one text are kept once, the held-out one if there is one. Rows with nearly one text (see
    :func:`~mlx_distill.data.dedup.near_duplicates`) stay on one side, and where one of them is held out by
    its own wish, those that wished to be trained on are dropped. The rest is drawn, stratified by label and
    ``config.stratify``.

    Args:
        config: Sources, filters, shares and seed.
        task: Prompt, answer schema, label, slices.
        base: The folder that relative paths start from.
        folder: An existing folder; each file in it is written whole or not at all.
        progress: Where to tell how far it is.

    Returns:
        What ``statistics.json`` holds: ``read``, ``rows``, ``sets``, ``labels``, ``slices``, ``characters``,
        ``dropped``, ``near_duplicates``, ``renamed_ids``, ``warnings``.

    Raises:
        DataError: a row that does not fit, an empty source, or nothing left to train on.
        ConfigError: no sources, or a field of ``stratify`` that no row has.
    """
    if not config.sources:
        raise ConfigError(
            "data.sources: no sources", fix="name a file, a Hub data set or a generator under data.sources"
        )
    progress = progress or NullProgress()
    for left in folder.glob(".*.tmp.json*"):  # by a run that was killed
        left.unlink(missing_ok=True)
    dropped = Dropped()
    with RowBuffer(scratch(folder)) as spool:
        read = _read(config, task, base, spool, dropped, progress)
        roots = _clusters(spool, config, dropped)
        sides = _sides(spool, roots, config, dropped)
        counts, renamed = _write(spool, sides, task, config, folder)
    statistics = {
        "format": FORMAT,
        "read": read,
        **counts.summary(SPLITS),
        "dropped": dropped.summary(),
        "near_duplicates": _cluster_figures(roots, sides),
        "renamed_ids": renamed,
    }
    statistics["warnings"] = _warnings(statistics, task, config)
    write_json(folder / "statistics.json", statistics)
    for text in [*_left_out(statistics), *statistics["warnings"]]:
        progress.note(f"prepare: {text}")
    return statistics


def _read(
    config: DataConfig, task: Task, base: Path | None, spool: RowBuffer, dropped: Dropped, progress: Progress
) -> int:
    """Fill the spool with the rows that pass the filters; how many were read."""
    cache: dict[str, int] = {}
    constant = _constant_shingles(task, cache)
    fields_seen: set[str] = set()
    read = 0
    with progress.task("prepare", total=_total(config), unit="row") as bar:
        for number, source in enumerate(config.sources):
            for where, raw in read_source(source, task, base):
                read += 1
                if read % 200 == 0:
                    bar.update(read)
                try:
                    example = to_example(raw, task, where, source.columns, source.format)
                except DataError as error:
                    if not config.drop_invalid:
                        raise
                    dropped.add("does not fit the task", error.message)
                    continue
                text = "\n".join(message.content for message in example.messages if message.role == "user")
                values = {**raw, **example.fields}
                reason = _filter(text, values, config)
                if reason:
                    dropped.add(reason, where)
                    continue
                forced = _forced(source.split or values.get(config.split_field), config.split_field, where)
                stratum = tuple(
                    str(value)
                    for value in ((example.answer or {}).get(task.label), *map(values.get, config.stratify))
                )
                fields_seen.update(name for name in config.stratify if name in values)
                spool.append(where, " ".join(words(text, punctuation=True)), example, forced, number, stratum)
                if config.near_duplicates:
                    hashes = shingles(words(text), cache)
                    own = hashes[~np.isin(hashes, constant)] if len(constant) else hashes
                    spool.signatures.append(minhash(own if len(own) else hashes))
        bar.update(read)
    _check_rows(spool, read, fields_seen, config, dropped)
    return read


def _constant_shingles(task: Task, cache: dict[str, int]) -> Any:
    """What every row has in common by the prompt's own words says nothing about likeness."""
    import string

    literals = [words(literal) for literal, *_ in string.Formatter().parse(task.user) if literal]
    found = [shingles(tokens, cache) for tokens in literals if len(tokens) >= 3]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


def _total(config: DataConfig) -> int | None:
    counts = [source.count for source in config.sources]
    return sum(counts) if all(counts) else None


def _filter(text: str, values: Mapping[str, Any], config: DataConfig) -> str | None:
    """Why the row is left out, or None."""
    if len(text) < config.min_chars:
        return f"shorter than {config.min_chars} characters"
    if len(text) > config.max_chars:
        return f"longer than {config.max_chars} characters"
    if config.min_rating is not None:
        try:
            rating = float(values.get(config.rating_field))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return f"no number in the field {config.rating_field!r}"
        if not rating >= config.min_rating:
            return f"rating below {config.min_rating:g}"
    if config.domains and str(values.get(config.domain_field)) not in config.domains:
        return "of another domain"
    return None


def _forced(wish: Any, name: str, where: str) -> int:
    if wish is None or wish == "":
        return FREE
    side = _SPLIT_NAMES.get(str(wish).strip().lower())
    if side is None:
        raise DataError(
            f"{where}: {name}: {wish!r} is not a split",
            fix="use train, valid or test, or set data.split_field to another field",
        )
    return side


def _check_rows(
    spool: RowBuffer, read: int, fields_seen: set[str], config: DataConfig, dropped: Dropped
) -> None:
    if not len(spool):
        reason = next(iter(dropped.summary()), "nothing was read")
        raise DataError(f"no rows are left of {read}: {reason}", fix="loosen the filters under data")
    unknown = [name for name in config.stratify if name not in fields_seen]
    if unknown:
        raise ConfigError(
            f"data.stratify: no row has the field {unknown[0]!r}",
            fix="name a field of the rows, or leave it out",
        )


def _clusters(spool: RowBuffer, config: DataConfig, dropped: Dropped) -> Int64[np.ndarray, " n"]:
    """The cluster of each row, -1 for rows dropped as exact duplicates."""
    text, forced = np.array(spool.text, dtype=np.uint64), np.array(spool.forced, dtype=np.int8)
    # Of the rows with one text the one that wishes for the highest side, then the first in hash order.
    by = np.lexsort((np.array(spool.order, dtype=np.uint64), -forced, text))
    starts = np.flatnonzero(np.concatenate([[True], text[by[1:]] != text[by[:-1]]]))
    best = np.empty(len(spool), dtype=np.int64)
    best[by] = np.repeat(by[starts], np.diff(starts, append=len(by)))
    for row in np.flatnonzero(best != np.arange(len(best))).tolist():
        _drop_copy(spool, row, int(best[row]), dropped)
    rows = np.unique(best)
    clusters = (
        near_duplicates(spool.signatures, config.near_duplicates, rows)
        if config.near_duplicates
        else Clusters(len(rows))
    )
    roots = np.full(len(spool), -1, dtype=np.int64)
    roots[rows] = rows[clusters.roots()]
    return roots


def _drop_copy(spool: RowBuffer, row: int, best: int, dropped: Dropped) -> None:
    held_out = spool.forced[best] > max(spool.forced[row], TRAIN)
    reason = "duplicate of a held-out row" if held_out else "duplicate"
    other = "" if spool.answer[row] == spool.answer[best] else ", with another answer"
    dropped.add(reason + other, lambda: f"{spool.where(row)} (of {spool.where(best)})")


def _sides(spool: RowBuffer, roots: Int64[np.ndarray, " n"], config: DataConfig, dropped: Dropped) -> Any:
    rows = np.flatnonzero(roots >= 0)
    forced = np.array(spool.forced, dtype=np.int8)[rows]
    local = np.searchsorted(rows, roots[rows])
    settled = settle_forced(local, forced)
    for row in rows[settled == DROPPED].tolist():
        dropped.add("near duplicate of a held-out row", partial(spool.where, row))
    drawn = draw(
        local,
        settled,
        np.array(spool.order, dtype=np.uint64)[rows],
        [spool.strata[row] for row in rows],
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    sides = np.full(len(spool), DROPPED, dtype=np.int8)
    sides[rows] = drawn
    if not (sides == TRAIN).any():
        raise DataError(
            "no rows are left to train on",
            fix="lower data.test_fraction and data.valid_fraction, or add rows",
        )
    return sides


def _write(spool: RowBuffer, sides: Any, task: Task, config: DataConfig, folder: Path) -> tuple[Counts, int]:
    counts = Counts(task.label, [*task.slices, *([task.group] if task.group else []), *config.stratify])
    names, often = np.unique(np.array(spool.names, dtype=np.uint64), return_counts=True)
    shared = frozenset(names[often > 1].tolist())
    used: set[str] = set()
    renamed = 0
    with os_errors(), ExitStack() as stack:
        # Leaving the stack closes each file before its temporary name becomes the real one.
        paths = [stack.enter_context(atomic_path(folder / f"{split}.jsonl")) for split in SPLITS]
        files = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in paths]
        for row, raw in enumerate(spool.rows()):
            if sides[row] == DROPPED:
                continue
            example = from_row(raw)
            name, number = example.id, 1
            # Only an id that stands twice, or that looks like the new name of one, can be taken.
            if spool.names[row] in shared or "~" in name:
                while name in used:
                    number += 1
                    name = f"{example.id}~{number}"
                used.add(name)
            renamed += number > 1
            split = SPLITS[sides[row]]
            set_name = (config.sources[spool.source[row]].set or "test") if split == "test" else split
            out = {**to_row(example, set_name), "id": name}
            files[sides[row]].write(json.dumps(out, ensure_ascii=False, allow_nan=False) + "\n")
            counts.add(split, set_name, example)
    return counts, renamed


def _cluster_figures(roots: Int64[np.ndarray, " n"], sides: Any) -> dict[str, int]:
    _, sizes = np.unique(roots[(roots >= 0) & (sides != DROPPED)], return_counts=True)
    alike = sizes[sizes > 1]
    return {"clusters": len(alike), "rows": int(alike.sum()), "largest": int(alike.max(initial=0))}


def _warnings(statistics: Mapping[str, Any], task: Task, config: DataConfig) -> list[str]:
    out = []
    for split, fraction in (("valid", config.valid_fraction), ("test", config.test_fraction)):
        if not statistics["rows"][split] and fraction:
            out.append(f"no rows in {split}: too few without a split of their own")
    missing = [label for label in task.labels if not statistics["labels"]["train"].get(label)]
    if missing:
        out.append(f"no training row is labelled {', '.join(missing)}")
    return out


def _left_out(statistics: Mapping[str, Any]) -> list[str]:
    """How many rows were left out and why, in a line with the first of them; none where none was."""
    dropped = statistics["dropped"]
    if not dropped:
        return []
    lost = sum(entry["count"] for entry in dropped.values())
    why = "; ".join(f"{reason}: {entry['count']}" for reason, entry in dropped.items())
    first = next(iter(dropped.values()))["examples"][0]
    return [
        f"{lost} of {statistics['read']} rows left out ({why}), such as {first}; statistics.json has more"
    ]
