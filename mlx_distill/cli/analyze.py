"""The command analyze."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("model", metavar="MODEL-OR-RUN")
@click.argument("input")
@click.option(
    "--task", help="A packaged task, or a YAML file.  [default: the one that the model was trained on]"
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file for the answers, one JSON object a line.  [default: standard output]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Rows that are answered together.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(1),
    help="Rows with a longer prompt get an error instead of an answer.  [default: the model's own length]",
)
@click.option(
    "--constrain/--no-constrain",
    default=True,
    show_default=True,
    help="Let the model write only what fits the task's schema.",
)
@click.option("--labels-only", is_flag=True, help="The label and its probabilities, without the answer.")
def analyze(model: str, input: str, task: str | None, out: Path | None, **settings: Any) -> None:
    """Let a model answer every row of a file.

    MODEL-OR-RUN is the folder or the Hub id of a model, or the folder of a run, which means its newest usable
    model. INPUT is a file with rows in any format that prepare reads, or - for JSON lines on standard input.
    The answers are JSON, one object a line.
    """
    from mlx_distill.cli.output import echo_jsonl, plain
    from mlx_distill.config import resolve_asset
    from mlx_distill.data.sources import read_source
    from mlx_distill.errors import DataError
    from mlx_distill.infer.analyze import iter_analysis
    from mlx_distill.recipe import SourceConfig
    from mlx_distill.storage import read_jsonl, write_jsonl
    from mlx_distill.text import counted

    if input != "-" and not Path(resolve_asset(input)).exists():
        raise DataError(f"{input}: no such file", fix="check the path; - is standard input")
    rows = read_jsonl("/dev/stdin") if input == "-" else read_source(SourceConfig(path=input))
    items = [row for _, row in rows]
    if not items:
        raise DataError("standard input: no rows", fix="one JSON object a line is needed")
    invalid: list[str] = []

    def answers() -> Iterator[dict[str, Any]]:
        for prediction in iter_analysis(model, task, items, **settings):
            if prediction.error:
                invalid.append(f"{prediction.id}: {prediction.error}")
            yield plain(prediction)

    if out:
        write_jsonl(out, answers())
    else:
        echo_jsonl(answers())
    where = f"written to {out}: " if out else ""
    share = f", {len(invalid)} of them invalid (first {invalid[0]})" if invalid else ""
    click.echo(f"{where}{counted(len(items), 'answer')}{share}", err=True)
