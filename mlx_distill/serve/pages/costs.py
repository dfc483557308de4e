"""The page of costs."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from mlx_distill.errors import DistillError
from mlx_distill.evaluate.costs import read_prices
from mlx_distill.running_costs import cost_report, record_runs
from mlx_distill.serve.pages.environment import page

router = APIRouter(include_in_schema=False)


@router.get("/costs")
def costs(request: Request, prices: str = "") -> Response:
    """What runs and served calls have cost, in seconds; in money with the file of prices of the address."""
    ledger, problem, known = request.app.state.server.ledger, None, None
    try:
        known = read_prices(ledger.root.inside(prices)) if prices.strip() else None
    except DistillError as error:
        problem = error
    record_runs(ledger)
    status = 400 if problem else 200
    report = cost_report(ledger, known)
    return page(request, "costs.html.j2", status=status, report=report, prices=prices, error=problem)
