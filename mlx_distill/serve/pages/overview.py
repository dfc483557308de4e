"""The page of what serves, what needs attention and how much there is."""

from __future__ import annotations

import shutil
from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_distill.ledger.database import Ledger
from mlx_distill.registry.comparisons import list_comparisons
from mlx_distill.serve.pages.environment import page
from mlx_distill.serve.pages.names import run_names

router = APIRouter(include_in_schema=False)

_LOW_DISK = 2_000_000_000
_COUNTED = ("data_sets", "jobs", "versions", "comparisons")


@router.get("/")
def overview(request: Request) -> Response:
    """What serves, alarms, the running job, counts."""
    server = request.app.state.server
    ledger: Ledger = server.ledger
    with ledger.read() as db:
        counts = {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in _COUNTED}
        counts["rows"] = db.execute("SELECT coalesce(sum(rows), 0) FROM data_sets").fetchone()[0]
        jobs = db.execute("SELECT id, title, state FROM jobs WHERE state = 'running'").fetchall()
        orphans = db.execute(
            "SELECT id, title FROM jobs WHERE state = 'failed' AND json_extract(error, '$.code') = 'orphaned'"
        ).fetchall()
        serving = db.execute(
            "SELECT d.* FROM aliases a JOIN deployments d ON d.id = a.deployment "
            "WHERE a.alias = 'production' ORDER BY d.created_at DESC"
        ).fetchall()
    context: dict[str, Any] = {
        "state": server.pool.state(),
        "serving": serving,
        "jobs": jobs,
        "orphans": orphans,
        "counts": counts,
        "runs": run_names(ledger),
        "newest": next(iter(list_comparisons(ledger, 1)), None),
        "free": shutil.disk_usage(server.root.path).free,
        "low_disk": _LOW_DISK,
    }
    return page(request, "overview.html.j2", **context)
