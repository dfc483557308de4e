"""Commands about one model: convert, export, inspect."""

from __future__ import annotations

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
@click.option(
    "--check",
    type=click.IntRange(0),
    metavar="N",
    help="Let the trained, merged, exported and reloaded model answer N held-out rows; 0 checks nothing.  "
    "[default: 50 where the rows are known]",
)
@click.option("--rows", help="The rows for --check.  [default: the held-out rows of the model's run]")
@click.option("--task", help="The task for --check.  [default: that of the training]")
@_JSON
def export(model: Path, destination: Path, layout: str, as_json: bool, **options: Any) -> None:
    """Export a model to Hugging Face's or PEFT's format.

    MODEL is the folder of an MLX model or adapter, or of a run: its last trained model. The exit code is 3 if
    the export does not give the answers of the trained model; artifact.json in DESTINATION says why.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.evaluate.artifact import require_same_answers
    from mlx_distill.exports import write_export

    written = write_export(model, destination, layout, **options)
    echo(written, as_json)
    require_same_answers(written.artifact)


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
