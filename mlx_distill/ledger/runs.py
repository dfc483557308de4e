"""The index of runs: a row for each folder of a run under the root, made from the folders alone.

The rows can be dropped at any time; the next scan makes the same ones again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.ledger.database import Ledger, from_json, to_json
from mlx_distill.ledger.root import Root
from mlx_distill.run_models import RUN_MODELS, validation_of
from mlx_distill.storage import MANIFEST, partial_folder, read_json, read_manifest

DEPTH = 6
"""How deep below the root runs are looked for."""
_STAGES = tuple(dict.fromkeys(["data", "targets", *(model.folder for model in RUN_MODELS.values())]))
_EVALUATIONS = "evaluations"
_REPORT = "report.json"
_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})
# The figures of each model that lists of runs show.
_FIGURES = ("accuracy", "verdict_agreement", "agreement", "score_mae", "json_valid")


@dataclass(frozen=True)
class RunEntry:
    """A run as the index has it.

    Attributes:
        id: Made from the path.
        path: Of its folder, relative to the root.
        recipe: The recipe's name; None where no stage says it.
        task: The task's name; None before the report is written.
        state: ``finished`` (it has a report), ``unfinished``, or ``damaged`` (a file cannot be read).
        created_at: When its first stage began.
        seen_at: When the index took it in as it is.
        facts: ``stages`` (name: when it was ``finished``, its ``seconds`` and ``key``), ``models``
            (name: its figures, of the report), ``rows`` (of each split), ``made_at``, ``problem`` of a
            damaged one, and ``files``, by which a change is noticed.
    """

    id: str
    path: str
    recipe: str | None
    task: str | None
    state: str
    created_at: float
    seen_at: float
    facts: Mapping[str, Any]

    @property
    def validation(self) -> str | None:
        """The folder of the cross-validation that it is a fold of, relative to the root; None of a run of
        its own.
        """
        return validation_of(self.path)


@dataclass(frozen=True)
class Scan:
    """What a scan found: paths of runs that are new, have changed and are gone, how many there are, and how
    many of them are folds of cross-validations.
    """

    added: Sequence[str]
    changed: Sequence[str]
    removed: Sequence[str]
    total: int
    folds: int


def scan_runs(ledger: Ledger, *, depth: int = DEPTH) -> Scan:
    """Bring the index up to date with the folders under the root.

    Only the times and sizes of a run's manifests and report are read where they are those of the index.
    Hidden folders and environments are passed over, and so is what lies within a run.

    Args:
        ledger: The ledger.
        depth: How deep below the root runs are looked for.
    """
    known = {entry.path: entry for entry in list_runs(ledger)}
    found = dict(_folders(ledger.root, depth))
    added, changed, rows = list[str](), list[str](), list[RunEntry]()
    for path, files in found.items():
        entry = known.get(path)
        if entry is not None and entry.facts.get("files") == files:
            continue
        (changed if entry else added).append(path)
        rows.append(read_run(ledger.root, path, files))
    removed = [path for path in known if path not in found]
    if rows or removed:
        with ledger.write() as db:
            db.executemany(
                "DELETE FROM runs WHERE path = ?", [(path,) for path in [*removed, *changed, *added]]
            )
            for row in rows:
                _insert(db, row)
    return Scan(added, changed, removed, len(found), sum(validation_of(path) is not None for path in found))


def has_runs(root: Root, *, depth: int = DEPTH) -> bool:
    """Whether a run lies under a root."""
    return next(_folders(root, depth), None) is not None


def list_runs(ledger: Ledger, limit: int | None = None, *, folds: bool = True) -> list[RunEntry]:
    """The runs of the index, the newest first.

    Args:
        ledger: The ledger.
        limit: So many at most.
        folds: Whether the folds of cross-validations are among them.
    """
    with ledger.read() as db:
        rows = db.execute("SELECT * FROM runs ORDER BY created_at DESC, path").fetchall()
    found = (entry for entry in map(_entry, rows) if folds or entry.validation is None)
    return list(islice(found, limit))


def get_run(ledger: Ledger, path: str) -> RunEntry | None:
    """The run at a path relative to the root, or None."""
    with ledger.read() as db:
        row = db.execute("SELECT * FROM runs WHERE path = ?", (path,)).fetchone()
    return None if row is None else _entry(row)


def _entry(row: sqlite3.Row) -> RunEntry:
    return RunEntry(**{**dict(row), "facts": from_json(row["facts"])})


def _insert(db: sqlite3.Connection, entry: RunEntry) -> None:
    db.execute(
        "INSERT INTO runs (id, path, recipe, task, state, created_at, seen_at, facts) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            entry.id,
            entry.path,
            entry.recipe,
            entry.task,
            entry.state,
            entry.created_at,
            entry.seen_at,
            to_json(entry.facts),
        ),
    )


def _folders(root: Root, depth: int) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """Each run under the root: its path, and times and sizes of the files that say what it is."""
    waiting = [(root.path, 0)]
    while waiting:
        folder, level = waiting.pop()
        files = run_files(folder)
        if files and folder != root.path:
            yield folder.relative_to(root.path).as_posix(), files
            continue
        if files:  # the root itself is a run; others may lie beside its stages
            yield ".", files
        if level < depth:
            within = _STAGES if files else ()
            waiting += [(path, level + 1) for path in _subfolders(folder) if path.name not in within]


def _subfolders(folder: Path) -> list[Path]:
    with (
        suppress(OSError),
        os.scandir(folder) as entries,
    ):  # a folder that may not be read holds no run of ours
        return [
            Path(entry.path)
            for entry in entries
            if entry.name[0] != "." and entry.name not in _SKIPPED and entry.is_dir(follow_symlinks=False)
        ]
    return []


def run_files(folder: Path) -> dict[str, list[int]]:
    """Time (ns) and size of the manifests of a run, of its report, and of the keys of stages that are being
    made; empty of a folder that is no run.
    """
    found: dict[str, list[int]] = {}
    for name in _STAGES:
        for path in (folder / name / MANIFEST, partial_folder(folder / name) / "key"):
            _add(found, folder, path)
    if not found or (folder / "config.json").exists():
        return {}
    with suppress(OSError):
        for name in sorted(os.listdir(folder / _EVALUATIONS)):
            _add(found, folder, folder / _EVALUATIONS / name / MANIFEST)
    _add(found, folder, folder / _REPORT)
    return found


def _add(found: dict[str, list[int]], folder: Path, path: Path) -> None:
    with suppress(OSError):
        stat = path.stat()
        found[path.relative_to(folder).as_posix()] = [stat.st_mtime_ns, stat.st_size]


def read_run(root: Root, path: str, files: Mapping[str, list[int]] | None = None) -> RunEntry:
    """What the folder of a run says of itself, as an entry of the index.

    Args:
        root: The root.
        path: Of the folder, relative to it.
        files: What :func:`run_files` returns, where it is known.
    """
    folder = root.inside(path)
    files = run_files(folder) if files is None else files
    stages: dict[str, dict[str, Any]] = {}
    recipe, task, problem, times = None, None, None, [time_ns / 1e9 for time_ns, _ in files.values()]
    report: Any = None
    for name in files:
        try:
            if name.endswith(MANIFEST):
                recorded = _stage(folder, name.removesuffix(f"/{MANIFEST}"), stages)
                recipe = recipe or recorded.get("recipe")
                times.append(recorded.get("started") or times[0])
            elif name == _REPORT:
                report = read_json(folder / name)
                task = report.get("task")
        except (FileError, AttributeError, TypeError) as error:
            problem = problem or f"{name}: {error.message if isinstance(error, FileError) else error}"
    facts: dict[str, Any] = {"stages": stages, "models": _figures(report), "files": dict(files)}
    with suppress(AttributeError, KeyError, TypeError):
        facts["rows"] = dict(report["data"]["rows"])
    finished = [stage["finished"] for stage in stages.values() if stage["finished"]]
    facts["made_at"] = max(finished, default=None)
    if problem:
        facts["problem"] = problem
    state = "damaged" if problem else "finished" if report is not None else "unfinished"
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    return RunEntry(
        f"run-{digest[:12]}", path, recipe, task, state, min(times, default=0.0), time.time(), facts
    )


def _stage(folder: Path, name: str, stages: dict[str, dict[str, Any]]) -> Mapping[str, Any]:
    manifest = read_manifest(folder / name)
    if manifest is None:
        return {}
    recorded = manifest.recorded
    stages[name] = {
        "finished": recorded.get("finished"),
        "seconds": recorded.get("seconds"),
        "key": manifest.key,
    }
    return recorded


def _figures(report: Any) -> dict[str, Any]:
    with suppress(AttributeError, KeyError, TypeError):
        return {
            model: {name: figures[name] for name in _FIGURES if figures.get(name) is not None}
            for model, figures in report["metrics"].items()
        }
    return {}
