"""The command analyze."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlx_distill.cli.options import accelerator_of

_COUNT = click.IntRange(1)


@click.command()
@click.argument("model", metavar="MODEL-OR-RUN")
@click.argument("input")
@click.option(
    "--task", help="A packaged task, or a YAML file.  [default: the one that the model was trained on]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file for the answers. After an interruption the same command continues it.  [default: standard "
    "output]",
)
@click.option("--force", is_flag=True, help="Answer all rows again where --out is finished already.")
@click.option(
    "--constrain/--no-constrain",
    default=True,
    show_default=True,
    help="Let the model write only what fits the task's schema.",
)
@click.option("--labels-only", is_flag=True, help="The label and its probabilities, without the answer.")
@click.option(
    "--normalize",
    type=click.Choice(["none", "string", "tokens", "bytes"]),
    help="With --labels-only: by what the score of a label is divided.  [default: none]",
)
@click.option(
    "--shuffle-options",
    type=_COUNT,
    metavar="K",
    help="With --labels-only: ask in K orders of the labels, and average.  [default: 1]",
)
@click.option(
    "--batch-size", type=_COUNT, default=16, show_default=True, help="Rows that are answered together."
)
@click.option("--max-tokens", type=_COUNT, help="Longest answer.  [default: the task's max_answer_tokens]")
@click.option(
    "--max-prompt-tokens",
    type=_COUNT,
    help="Longest prompt.  [default: the model's length, less the longest answer]",
)
@click.option(
    "--long",
    type=click.Choice(["refuse", "cut"]),
    default="refuse",
    show_default=True,
    help="Rows with a longer prompt: an error, or the middle of their longest text is left out.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 where any row has no valid answer.")
@click.pass_context
def analyze(
    ctx: click.Context,
    model: str,
    input: str,
    strict: bool,
    normalize: str | None,
    shuffle_options: int | None,
    **settings: Any,
) -> None:
    """Let a model answer every row of a file.

    MODEL-OR-RUN is the folder or the Hub id of a model, or the folder of a run, which means its newest usable
    model. INPUT is a file with rows in any format that prepare reads, or - for JSON lines on standard input.
    The answers are JSON, one object a line, in the order of the rows; a row that cannot be answered has an
    error in its place. The exit code is 1 if no row has a valid answer.
    """
    given = {"normalize": normalize, "shuffle_options": shuffle_options}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not settings["labels_only"]:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{flags}: only with --labels-only")
    if settings["labels_only"] and settings["max_tokens"]:
        raise click.UsageError("--max-tokens: not with --labels-only, which generates nothing")

    from mlx_distill.infer.analyze_file import analyze_file
    from mlx_distill.infer.label_scorer import LabelOptions

    # The defaults are left out: answers that were begun without the flags are continued with them.
    options = {name: value for name, value in given.items() if value != getattr(LabelOptions, name)}
    if options:
        settings["label_options"] = options
    rows = sys.stdin.buffer if input == "-" else input
    with accelerator_of(f"analyze {model} {input}"):
        summary = analyze_file(model, rows, write=click.echo, **settings)
    click.echo(summary.line(), err=True)
    ctx.exit(1 if summary.errors and (strict or summary.errors == summary.answers) else 0)
