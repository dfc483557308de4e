"""What a succeeded job leaves in the ledger besides its end: a version of its model, and what it cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mlx_distill.errors import DistillError
from mlx_distill.jobs.recorder import COMPARISON_EVENT
from mlx_distill.jobs.store import Job, add_event, to_job
from mlx_distill.ledger.database import Ledger, from_json, to_json
from mlx_distill.registry import Version, add_version, current_deployment
from mlx_distill.running_costs import record_training

log = logging.getLogger(__name__)
UNRECORDED = "state = 'succeeded' AND result IS NULL"
"""The condition of the jobs that have succeeded, but could not write so into the ledger themselves."""


def record_results(ledger: Ledger) -> None:
    """Record what was made by the jobs that could not do so when they ended."""
    with ledger.read() as db:
        waiting = [to_job(row) for row in db.execute(f"SELECT * FROM jobs WHERE {UNRECORDED}")]
    for job in waiting:
        result = keep_result(ledger, job)
        with ledger.write() as db:
            db.execute(f"UPDATE jobs SET result = ? WHERE id = ? AND {UNRECORDED}", (to_json(result), job.id))


def keep_result(ledger: Ledger, job: Job) -> dict[str, Any]:
    """Record what a succeeded job has made. What cannot be recorded is a warning among its events; the job
    has succeeded all the same.

    Returns:
        ``path``, its run, and for a whole run ``version``, such as ``music:3``; ``comparison``, the id of
        the one that a comparison has kept, or of that of a run's version with the one that serves.
    """
    if job.kind == "compare":
        kept = _kept_comparison(ledger, job)
        return {} if kept is None else {"comparison": kept}
    if job.run_path is None:
        return {}
    run_path = job.run_path
    result: dict[str, Any] = {"path": run_path}
    _attempt(ledger, job, "its costs", lambda: record_training(ledger, run_path), "mlx-distill costs")
    if job.kind == "run":
        fix = f"mlx-distill registry add {run_path}"
        version = _attempt(ledger, job, "its model", lambda: add_version(ledger, run_path), fix)
        if version is not None:
            result["version"] = version.name
            kept = _compared_with_served(ledger, job, version)
            if kept is not None:
                result["comparison"] = kept
    return result


def _compared_with_served(ledger: Ledger, job: Job, version: Version) -> str | None:
    """Compare a new version with the one that production serves, where the answers of both lie there."""
    from mlx_distill.registry.comparisons import comparison_source, keep_comparison

    served = current_deployment(ledger, version.model)
    if served is None or served.version in (None, version.number):
        return None
    pair = served.serves, version.name

    def compare() -> str | None:
        if not all(comparison_source(ledger, name).answered for name in pair):
            return None
        return keep_comparison(ledger, *pair)[0].id

    what, fix = f"its comparison with {served.serves}", f"mlx-distill compare {' '.join(pair)} --keep"
    kept: str | None = _attempt(ledger, job, what, compare, fix)
    return kept


def _kept_comparison(ledger: Ledger, job: Job) -> str | None:
    with ledger.read() as db:
        row = db.execute(
            "SELECT data FROM job_events WHERE job_id = ? AND type = ? ORDER BY id DESC LIMIT 1",
            (job.id, COMPARISON_EVENT),
        ).fetchone()
    return None if row is None else str(from_json(row["data"])["id"])


def _attempt(ledger: Ledger, job: Job, what: str, record: Callable[[], Any], fix: str) -> Any:
    try:
        return record()
    except Exception as error:
        log.exception("%s: %s", job.id, what)
        reason = str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"
        with ledger.write() as db:
            add_event(db, job.id, "warning", f"{what} was not recorded: {reason} (fix: {fix})", level="warn")
        return None
