"""Comparisons that are asked for over HTTP: made at once, or by a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.jobs import Job, submit
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry.comparisons import StoredComparison, comparison_source, keep_comparison
from mlx_distill.serve.pages.job_form import start_next


def start_comparison(server: Any, values: Mapping[str, str]) -> StoredComparison | Job:
    """Compare at once where the answers of both lie there; else a job lets the models answer first.

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
    title = f"{values['b']} against {values['a']}"
    job = submit(ledger, "compare", compare_arguments(values), title=title, dedupe_seconds=60)
    start_next(server)
    return job


def compare_arguments(values: Mapping[str, str]) -> list[str]:
    """The arguments of ``mlx-distill compare`` for what was asked for."""
    options = [
        part
        for name in ("margin", "metric", "rows")
        if values.get(name)
        for part in (f"--{name}", values[name])
    ]
    return [values["a"], values["b"], *options, "--keep"]
