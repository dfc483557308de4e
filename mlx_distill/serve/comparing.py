"""Comparisons that are asked for over HTTP: made at once, or by a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.jobs import Job, newest_success, submit
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry.comparisons import (
    ComparisonSource,
    StoredComparison,
    comparison_source,
    keep_comparison,
    read_comparison,
)
from mlx_distill.serve.pages.job_form import start_next


def start_comparison(server: Any, values: Mapping[str, str]) -> StoredComparison | Job:
    """Compare at once where the answers of both lie there; else a job lets the models answer first,
    unless one has done so for the same versions and rows.

    Args:
        server: Of the application.
        values: ``a``, ``b``, ``margin``, ``metric`` and ``rows``; empty ones are as not given.

    Raises:
        ConfigError: one is missing or wrong.
        ModelError: there is no such model.
    """
    ledger: Ledger = server.ledger
    if not values["a"] or not values["b"]:
        raise ConfigError("two models are needed", fix="choose A and B")
    kept_answers = not values["rows"]
    sides = [comparison_source(ledger, values[side], answers_kept=kept_answers) for side in "ab"]
    options: dict[str, Any] = {name: values[name] for name in ("margin", "metric") if values[name]}
    if kept_answers and all(side.answered for side in sides):
        kept, _ = keep_comparison(ledger, values["a"], values["b"], **options)
        return kept
    if values["rows"] and not values["rows"].startswith("asset:"):
        ledger.root.inside(values["rows"])
    arguments = compare_arguments(values)
    if (made := _made_before(ledger, arguments, sides, values["rows"])) is not None:
        return made
    title = f"{values['b']} against {values['a']}"
    job = submit(ledger, "compare", arguments, title=title, dedupe_seconds=60)
    start_next(server)
    return job


def _made_before(
    ledger: Ledger, arguments: Sequence[str], sides: Sequence[ComparisonSource], rows: str
) -> StoredComparison | None:
    """What a job has kept that was asked for alike, if both versions, and a file of rows, are the same."""
    if any(side.sha is None for side in sides):
        return None
    job = newest_success(ledger, "compare", arguments)
    kept = None if job is None else (job.result or {}).get("comparison")
    if job is None or kept is None:
        return None
    if rows and not rows.startswith("asset:"):
        file = ledger.root.inside(rows)
        if not file.is_file() or file.stat().st_mtime >= job.created_at:
            return None
    found = read_comparison(ledger, kept)
    same = [one.get("sha") for one in (found.a, found.b)] == [side.sha for side in sides]
    return found if same else None


def compare_arguments(values: Mapping[str, str]) -> list[str]:
    """The arguments of ``mlx-distill compare`` for what was asked for."""
    options = [
        part
        for name in ("margin", "metric", "rows")
        if values.get(name)
        for part in (f"--{name}", values[name])
    ]
    return [values["a"], values["b"], *options, "--keep"]
