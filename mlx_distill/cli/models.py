"""Commands about one model: convert, export, inspect, analyze."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")


@click.command()
@click.argument("source")
@click.argument("destination", type=_PATH)
@click.option("--quantize", metavar="MODE", help="affine4, affine8, mxfp4, nvfp4 or mxfp8; without it each weight keeps its type.")
@click.option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; without it each tensor keeps its own.")
@click.option("--revision", help="Commit, tag or branch of a Hub model.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@_JSON
def convert(
    source: str, destination: Path, quantize: str | None, dtype: str | None, revision: str | None, dry_run: bool, as_json: bool
) -> None:
    """Convert a Hugging Face checkpoint to an MLX folder.

    SOURCE is a folder or a Hub id. The result is numerically the same model, unless --quantize or --dtype asks for another.
    """
    from mlx_distill.cli.show import echo
    from mlx_distill.models.convert import convert as convert_model
    from mlx_distill.progress import make_progress

    echo(convert_model(source, destination, quantize, dtype, revision=revision, dry_run=dry_run, progress=make_progress()), as_json)


@click.command()
@click.argument("model", type=_PATH)
@click.argument("destination", type=_PATH)
@click.option("--to", "layout", type=click.Choice(["hf", "peft"]), required=True, help="A whole checkpoint, or an adapter for PEFT.")
def export(model: Path, destination: Path, layout: str) -> None:
    """Write a model in the layout that other tools read.

    MODEL is a model folder or an adapter folder of ours; for hf an adapter is merged.
    """
    from mlx_distill.cli.show import echo
    from mlx_distill.progress import make_progress

    if layout == "hf":
        from mlx_distill.models.export import to_hf

        echo(to_hf(model, destination, progress=make_progress()))
    else:
        from mlx_distill.models.peft import to_peft

        click.echo(f"written to {destination}: adapters of {len(to_peft(model, destination))} modules")


@click.command()
@click.argument("path", type=_PATH)
@click.option("--verify", is_flag=True, help="Read and hash every file, where otherwise sizes and times decide.")
@_JSON
@click.pass_context
def inspect(ctx: click.Context, path: Path, verify: bool, as_json: bool) -> None:
    """Say what lies at PATH.

    PATH is a model, an adapter, the folder of a stage, or that of a run. Exit code 1 where something is wrong with it.
    """
    from mlx_distill.cli.show import echo
    from mlx_distill.models.inspect import inspect as look

    report = look(path, verify=verify)
    echo(report, as_json)
    ctx.exit(1 if report.problems else 0)


@click.command()
@click.argument("model")
@click.argument("input", metavar="INPUT", type=_PATH)
@click.option("--task", required=True, help="A packaged task, or a YAML file.")
@click.option("--out", type=_PATH, help="Where the answers go, one JSON object a line.  [default: standard output]")
def analyze(model: str, input: Path, task: str, out: Path | None) -> None:
    """Let a model answer for every row of a file.

    INPUT is a JSONL file with the fields that the task's prompt names; the answers come as JSONL too.
    """
    from mlx_distill.cli.show import echo_jsonl, plain
    from mlx_distill.files import read_jsonl, write_jsonl
    from mlx_distill.infer import analyze as answer

    items = [row for _, row in read_jsonl(input)]
    rows = [plain(prediction) for prediction in answer(model, task, items)]
    if out:
        write_jsonl(out, rows)
        click.echo(f"written to {out}: {len(rows)} answers", err=True)
    else:
        echo_jsonl(rows)
