"""Comparisons that are kept: the figures in the ledger, for ever; the rows in a file beside it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.comparisons import compare, write_comparison
from mlx_distill.errors import ConfigError, DataError, FileError
from mlx_distill.evaluate.compare import ModelComparison
from mlx_distill.evaluate.comparison_export import check_out
from mlx_distill.evaluate.comparison_inputs import EVALUATIONS
from mlx_distill.ledger.database import Ledger, from_json, to_json
from mlx_distill.models.trained_on import is_run
from mlx_distill.progress import Progress, events_of
from mlx_distill.registry.resolve import resolve_model
from mlx_distill.registry.versions import get_version
from mlx_distill.storage import digest, os_errors, read_jsonl, write_jsonl
from mlx_distill.text import known_names

FOLDER = "comparisons"
ANSWERS = "answers"
# What says when and how often, and not what was found.
_PASSING = ("created", "looked")


@dataclass(frozen=True)
class ComparisonSource:
    """One side of a comparison.

    Attributes:
        name: As it was given: ``music:3``, ``demo:student``.
        spec: What :func:`mlx_distill.comparisons.compare` reads: a run, ``RUN:model``, a file or a model.
        model, version: Of the registry, or None.
        sha: The hash of the version, or None.
        answered: Whether its answers lie there; else the model has to answer.
    """

    name: str
    spec: str
    model: str | None
    version: int | None
    sha: str | None
    answered: bool

    def to_dict(self) -> dict[str, Any]:
        """As it is kept in the ledger."""
        return {"name": self.name, "model": self.model, "version": self.version, "sha": self.sha}


@dataclass(frozen=True)
class StoredComparison:
    """A comparison that was kept.

    Attributes:
        id: ``cmp-`` and 12 hexadecimal digits: the same comparison has the same.
        a, b: The sides: ``name``, ``model``, ``version``, ``sha``.
        facts: What was measured.
        tokens: Of chosen rows, what both models give to each piece of A's answer.
        created_at: In Unix seconds.
    """

    id: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    facts: Mapping[str, Any] = field(repr=False)
    tokens: Sequence[Mapping[str, Any]] = field(repr=False)
    created_at: float


def comparison_source(ledger: Ledger, name: str, *, answers_kept: bool = True) -> ComparisonSource:
    """Find what a name means in a comparison.

    Args:
        ledger: The ledger.
        name: A version (``music:3``, ``music@staging``, ``music``), whose kept evaluation is taken; a run,
            ``RUN:model``, a file of predictions or the folder of a model, under the root.
        answers_kept: Take the answers that a version or a run has; else its model, which answers other rows.

    Raises:
        ModelError: there is no such model.
        ConfigError: an analyzer outside of the registry, or a path that leaves the root.
    """
    if not _is_registered(ledger, name) and not name.startswith("asset:"):
        run, _, model = name.rpartition(":")
        for path, suffix in ((name, ""), (run, f":{model}")):
            place = ledger.root.inside(path)
            if path and (place.is_file() or (answers_kept and _has_answers(place))):
                return ComparisonSource(name, f"{place}{suffix}", None, None, None, True)
    resolved = resolve_model(ledger, name)
    if resolved.target is not None or resolved.path is None:
        raise ConfigError(
            f"{name} is {resolved.target}, an analyzer outside of the registry",
            fix="let it answer the rows, and compare the file of its answers",
        )
    if resolved.model is None or resolved.version is None:
        return ComparisonSource(name, str(resolved.path), None, None, resolved.sha, False)
    version = get_version(ledger, resolved.model, resolved.version)
    evaluation = version.info.get("evaluation")
    kept = ledger.root.inside(version.kept)
    answered = answers_kept and bool(evaluation) and (kept / EVALUATIONS / str(evaluation)).is_dir()
    spec = f"{kept}:{evaluation}" if answered else str(resolved.path)
    return ComparisonSource(version.name, spec, version.model, version.number, version.sha, answered)


def _is_registered(ledger: Ledger, name: str) -> bool:
    run, _, number = name.rpartition(":")
    model = run if number.isdigit() and run else name.partition("@")[0]
    with ledger.read() as db:
        return db.execute("SELECT 1 FROM models WHERE name = ?", (model,)).fetchone() is not None


def _has_answers(path: Path) -> bool:
    return is_run(path) or (path / EVALUATIONS).is_dir()


def keep_comparison(
    ledger: Ledger, a: str, b: str, *, progress: Progress | None = None, **options: Any
) -> tuple[StoredComparison, ModelComparison]:
    """Compare two models and keep the result.

    Args:
        ledger: The ledger.
        a: What is to be replaced; see :func:`comparison_source`.
        b: What is to replace it.
        progress: Where progress is shown; one that takes events is told the comparison's id.
        options: Those of :func:`mlx_distill.comparisons.compare`. With ``rows`` the models of versions and
            runs answer these rows.

    Returns:
        What is kept, and the result.
    """
    has_rows = options.get("rows") is not None
    sides = [comparison_source(ledger, name, answers_kept=not has_rows) for name in (a, b)]
    options.setdefault("answers", ledger.root.state / ANSWERS)
    names = [side.name for side in sides]
    result = compare(sides[0].spec, sides[1].spec, names=names, progress=progress, **options)
    kept = add_comparison(ledger, result, sides[0].to_dict(), sides[1].to_dict())
    report = None if progress is None else events_of(progress)
    if report is not None:
        report({"event": "comparison_kept", "id": kept, "sentence": result.facts["sentence"]})
    return read_comparison(ledger, kept), result


def add_comparison(
    ledger: Ledger, result: ModelComparison, a: Mapping[str, Any], b: Mapping[str, Any]
) -> str:
    """Keep a comparison; one with the same result is kept once.

    Args:
        ledger: The ledger.
        result: The comparison.
        a, b: Its sides, at least their ``name``.

    Returns:
        Its id.
    """
    facts = {key: value for key, value in result.facts.items() if key not in _PASSING}
    id = f"cmp-{digest([facts, dict(a), dict(b)])[:12]}"
    with os_errors():
        rows_file(ledger, id).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(rows_file(ledger, id), [dict(case) for case in result.cases])
    stored = to_json({"facts": dict(result.facts), "tokens": list(result.tokens)})
    with ledger.write() as db:
        db.execute(
            "INSERT INTO comparisons (id, a, b, result, created_at) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO NOTHING",
            (id, to_json(dict(a)), to_json(dict(b)), stored, time.time()),
        )
    return id


def rows_file(ledger: Ledger, id: str) -> Path:
    """The file with the rows of a comparison: the truth and both answers."""
    return ledger.root.state / FOLDER / f"{id}.jsonl"


def read_comparison(ledger: Ledger, id: str) -> StoredComparison:
    """A comparison by its id.

    Raises:
        ConfigError: there is none.
    """
    with ledger.read() as db:
        row = db.execute("SELECT * FROM comparisons WHERE id = ?", (id,)).fetchone()
        known = [] if row else [one["id"] for one in db.execute("SELECT id FROM comparisons")]
    if row is None:
        raise ConfigError(f"no comparison {id!r}", fix=known_names(id, known, "comparisons"))
    return _stored(row)


def list_comparisons(ledger: Ledger, limit: int = 50) -> list[StoredComparison]:
    """The comparisons, the newest first."""
    with ledger.read() as db:
        rows = db.execute("SELECT * FROM comparisons ORDER BY created_at DESC LIMIT ?", (limit,)).fetchall()
    return [_stored(row) for row in rows]


def comparison_rows(ledger: Ledger, id: str) -> list[dict[str, Any]]:
    """The rows of a comparison; none where their file is gone or damaged."""
    file = rows_file(ledger, id)
    try:
        return [row for _, row in read_jsonl(file)] if file.is_file() else []
    except (FileError, DataError):
        return []


def write_stored(ledger: Ledger, id: str, path: Path, *, with_rows: bool = False) -> None:
    """Write a comparison that was kept as a page (``.html``), JSON or CSV.

    Raises:
        ConfigError: there is no such comparison, or the name says no such kind.
        FileError: it is to be CSV, and the file with its rows is gone.
    """
    check_out(path)
    stored, rows = read_comparison(ledger, id), comparison_rows(ledger, id)
    if path.suffix.lower() == ".yaml":
        raise ConfigError(
            f"{path.name}: promptfoo's file needs the task", fix="mlx-distill compare A B --out FILE.yaml"
        )
    if path.suffix.lower() == ".csv" and not rows:
        raise FileError(f"{rows_file(ledger, id)}: gone or damaged", fix="compare the two again")
    # The task is asked for by promptfoo's file alone.
    result = ModelComparison(stored.facts, rows, None, stored.tokens)  # type: ignore[arg-type]
    write_comparison(result, path, with_rows=with_rows)


def _stored(row: sqlite3.Row) -> StoredComparison:
    result = from_json(row["result"])
    return StoredComparison(
        row["id"],
        from_json(row["a"]),
        from_json(row["b"]),
        result["facts"],
        result["tokens"],
        row["created_at"],
    )
