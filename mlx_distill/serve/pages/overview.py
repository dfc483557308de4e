"""The page of what serves, what needs attention, what runs and how much there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_distill.jobs import list_jobs, progress
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry import Deployment, Model, history, list_models
from mlx_distill.registry.comparisons import StoredComparison, list_comparisons
from mlx_distill.registry.figures import SHARE, figures_of
from mlx_distill.serve.pages.alarms import alarms
from mlx_distill.serve.pages.environment import page, wants_fragment
from mlx_distill.serve.pages.names import run_names

router = APIRouter(include_in_schema=False)

_COUNTED = ("data_sets", "jobs", "versions", "comparisons")
_ALIAS = "production"


@router.get("/")
def overview(request: Request) -> Response:
    """What serves, alarms, the running job, counts. htmx asks for the part with the job alone."""
    server = request.app.state.server
    ledger: Ledger = server.ledger
    running = [(job, progress(ledger, job, max_rows=0)) for job in list_jobs(ledger, state="running")]
    if wants_fragment(request):
        return page(request, "overview.html.j2", block="running", running=running)
    serving = [one for model in list_models(ledger) if (one := _serving(ledger, model))]
    serving.sort(key=lambda one: one["deployment"].created_at, reverse=True)
    state = server.pool.state()
    kept = list_comparisons(ledger)
    context: dict[str, Any] = {
        "state": state,
        "serving": serving,
        "agreement": next((found for one in serving if (found := _agreement(one, kept))), None),
        "live": bool(running),
        "running": running,
        "alarms": alarms(ledger, state),
        "counts": _counts(ledger),
        "runs": run_names(ledger),
        "newest": next(iter(kept), None),
    }
    return page(request, "overview.html.j2", **context)


def _serving(ledger: Ledger, model: Model) -> dict[str, Any] | None:
    """The deployment that a model's production serves, with its version's measured agreement with its
    teacher.
    """
    if _ALIAS not in model.aliases:
        return None
    past: Sequence[Deployment] = history(ledger, model.name, _ALIAS)
    now = past[0]
    version = next((one for one in model.versions if one.number == now.version), None)
    figures: Mapping[str, Any] = {} if version is None else figures_of(version.info)
    return {"deployment": now, "measured": figures.get("verdict_agreement"), "replaced": len(past) > 1}


def _agreement(served: Mapping[str, Any], kept: Sequence[StoredComparison]) -> dict[str, Any] | None:
    """How often what serves has the label of its teacher; where that was not measured, that of the other
    model in its newest comparison.
    """
    now: Deployment = served["deployment"]
    address = f"/models/{now.model}" + (f"/{now.version}" if now.version else "")
    if served["measured"]:
        return {"figure": served["measured"], "of": now.serves, "with": "its teacher", "address": address}
    for one in kept:
        for side, other in ((one.b, one.a), (one.a, one.b)):
            found = one.facts.get("agreement")
            if found and now.version and (side.get("model"), side.get("version")) == (now.model, now.version):
                figure = {**found, "unit": SHARE}
                return {
                    "figure": figure,
                    "of": now.serves,
                    "with": other["name"],
                    "address": f"/compare/{one.id}",
                }
    return None


def _counts(ledger: Ledger) -> dict[str, int]:
    with ledger.read() as db:
        counts = {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in _COUNTED}
        counts["rows"] = db.execute("SELECT coalesce(sum(rows), 0) FROM data_sets").fetchone()[0]
    return counts
