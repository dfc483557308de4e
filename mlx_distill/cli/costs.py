"""The command costs."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_distill.cli.options import find_ledger, json_option, open_ledger, root_option


@click.command()
@click.option("--prices", metavar="FILE", help="A YAML file of prices; see docs/costs.md.")
@root_option
@json_option
def costs(prices: str | None, root: Path, as_json: bool) -> None:
    """Show what runs and served calls under the root have cost so far.

    Seconds of the machine and tokens; in money where a file of prices says what they cost.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.evaluate.costs import read_prices
    from mlx_distill.ledger.root import Root
    from mlx_distill.ledger.runs import has_runs
    from mlx_distill.running_costs import CostReport, Sum, cost_report, record_runs

    known = read_prices(prices) if prices else None
    ledger = find_ledger(root) or (open_ledger(root) if has_runs(Root.at(root)) else None)
    if ledger is None:
        report = CostReport(Sum(), {}, {}, {}, {})
    else:
        record_runs(ledger)
        report = cost_report(ledger, known)
    echo(report, as_json)
