"""Commands about one model: convert, export, inspect, analyze."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")


@click.command()
@click.argument("source")
@click.argument("destination", type=_PATH)
@click.option(
    "--quantize",
    metavar="MODE",
    help="affine1 to affine8, mxfp4, nvfp4 or mxfp8; or mixed4, mixed-mxfp4 or mixed-nvfp4, with embeddings "
    "and output head in 8 bits.  [default: not quantized further]",
)
@click.option("--group-size", type=int, help="Weights that share a scale.  [default: the mode's own]")
@click.option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16.  [default: each tensor's own]")
@click.option("--revision", help="Commit, tag or branch of SOURCE on the Hub.")
@click.option("--base", help="The base model of an adapter.  [default: the one that the adapter names]")
@click.option("--max-shard-bytes", type=click.IntRange(1), help="Maximum size of a file.  [default: 2 GiB]")
@click.option(
    "--memory-bytes", type=click.IntRange(1), help="Maximum size of the buffers.  [default: 32 MiB]"
)
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@_JSON
def convert(source: str, destination: Path, as_json: bool, **options: Any) -> None:
    """Convert a Hugging Face checkpoint to an MLX folder.

    SOURCE is a folder or a Hub id of a model, or of an adapter of PEFT or mlx-lm, which becomes an MLX
    adapter. The result is numerically the same, unless --quantize or --dtype changes it.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.models.convert import convert as convert_model
    from mlx_distill.progress import make_progress

    chosen = {name: value for name, value in options.items() if value is not None}
    echo(convert_model(source, destination, **chosen, progress=make_progress()), as_json)


@click.command()
@click.argument("model", type=_PATH)
@click.argument("destination", type=_PATH)
@click.option(
    "--to",
    "layout",
    type=click.Choice(["hf", "peft"]),
    required=True,
    help="A whole checkpoint, or an adapter for PEFT.",
)
@click.option(
    "--adapter",
    type=click.Choice(["merge", "keep"]),
    default="merge",
    show_default=True,
    help="For hf: merge the adapter into the weights, or write it for PEFT beside the unchanged base.",
)
@click.option(
    "--report",
    type=_PATH,
    help="The run, or its report.json, with figures for the model card.  [default: the model's run]",
)
@_JSON
def export(
    model: Path, destination: Path, layout: str, adapter: str, report: Path | None, as_json: bool
) -> None:
    """Export a model to Hugging Face's or PEFT's format.

    MODEL is the folder of an MLX model or adapter.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.exports import export as export_model

    echo(export_model(model, destination, layout, adapter=adapter, report=report), as_json)


@click.command()
@click.argument("path", type=_PATH)
@click.option(
    "--verify", is_flag=True, help="Read and hash every file, instead of comparing sizes and times."
)
@_JSON
@click.pass_context
def inspect(ctx: click.Context, path: Path, verify: bool, as_json: bool) -> None:
    """Describe a folder and check it.

    PATH is the folder of a model, an adapter, a stage or a run. The exit code is 1 if something is wrong.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.inspection import inspect as inspect_folder

    report = inspect_folder(path, verify=verify)
    echo(report, as_json)
    ctx.exit(1 if report.problems else 0)


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
def analyze(
    model: str,
    input: str,
    task: str | None,
    out: Path | None,
    batch_size: int,
    max_prompt_tokens: int | None,
) -> None:
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
        for prediction in iter_analysis(
            model, task, items, batch_size=batch_size, max_prompt_tokens=max_prompt_tokens
        ):
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
