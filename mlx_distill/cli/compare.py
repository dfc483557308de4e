"""The command compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--task", help="A packaged task, or a YAML file.  [default: that of the run or the model]")
@click.option("--rows", help="The rows that were asked, with id, the task's fields and answer.")
@click.option(
    "--margin",
    metavar="3pt|5%",
    help="How much worse B may be and still count as good as A: points, or a share of A's value.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="A metric with one value a row.  [default: whether the label is right; without a label, answer_f1]",
)
@click.option("--set", "set_name", metavar="NAME", help="The set of held-out rows.  [default: test]")
@click.option("--constrained", is_flag=True, help="Compare answers under the grammar of the task.")
@click.option(
    "--answers",
    help="The folder in which the answers of models are kept.  [default: comparisons; with --keep that of "
    "the ledger]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Rows that a model answers together.",
)
@click.option(
    "--out",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file for the result: .html, .json, .csv, or .yaml for promptfoo. May be given several times.",
)
@click.option("--with-rows", is_flag=True, help="Write titles, inputs and whole answers into --out too.")
@click.option(
    "--tokens",
    multiple=True,
    metavar="ID",
    help="A row of which both models score A's answer, token by token. May be given several times.",
)
@click.option("--costs", metavar="FILE", help="A YAML file of prices; see docs/costs.md.")
@click.option("--ratings", metavar="FILE", help="People's ratings: id, model (a or b), rating 1 to 5, rater.")
@click.option("--judge", metavar="MODEL", help="A model that judges answers; needs --judgements.")
@click.option(
    "--judgements",
    metavar="FILE",
    help="People's judgements of a random sample of the rows: id and better (a, b, tie).",
)
@click.option("--gate", is_flag=True, help="Exit with 3 unless B is better or not inferior; needs --margin.")
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the result in the ledger of --root; A and B may be versions of the registry, such as music:3. "
    "With --rows the models of versions and runs answer these rows.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    envvar="MLX_DISTILL_ROOT",
    show_default=True,
    help="The folder that you work in.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
@click.pass_context
def compare(
    ctx: click.Context, a: str, b: str, gate: bool, keep: bool, root: Path, as_json: bool, **options: Any
) -> None:
    """Compare two models on the same rows.

    Is B as good as A, how sure is that, and on which rows not?

    A and B are files of predictions (predictions.jsonl, a file of analyze, or JSON lines of any tool with id
    and text), folders of runs (their final models) or RUN:model, or folders of models, which then answer the
    rows. Differences are B minus A.
    """
    if gate and options["margin"] is None:
        raise click.UsageError(
            "--gate: without --margin nothing can be shown to be as good; add --margin 3pt"
        )

    from mlx_distill.cli.output import echo
    from mlx_distill.comparisons import compare as compare_models
    from mlx_distill.progress import make_progress

    options = {name: value for name, value in options.items() if value is not None}
    if keep:
        from mlx_distill.ledger.database import Ledger
        from mlx_distill.ledger.root import Root
        from mlx_distill.registry.comparisons import keep_comparison

        kept, result = keep_comparison(Ledger(Root.at(root)), a, b, **options, progress=make_progress())
        click.echo(f"kept as {kept.id}", err=True)
    else:
        result = compare_models(a, b, **options, progress=make_progress())
    echo(result, as_json)
    ctx.exit(3 if gate and not result.passed else 0)
