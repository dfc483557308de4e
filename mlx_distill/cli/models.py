"""Commands about one model: convert, export, inspect, analyze."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source")
@click.argument("destination", type=_PATH)
@click.option("--quantize", metavar="MODE", help="affine4, affine8, mxfp4, nvfp4 or mxfp8; without it each weight keeps its type.")
@click.option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; without it each tensor keeps its own.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
def convert(source: str, destination: Path, quantize: str | None, dtype: str | None, dry_run: bool) -> None:
    """Convert a Hugging Face checkpoint to an MLX folder.

    SOURCE is a folder or a Hub id. The result is numerically the same model, unless --quantize or --dtype asks for another.
    """
    from mlx_distill.cli.show import echo_result
    from mlx_distill.models.convert import convert as convert_model

    echo_result(convert_model(source, destination, quantize=quantize, dtype=dtype, dry_run=dry_run))


@click.command()
@click.argument("model", type=_PATH)
@click.argument("destination", type=_PATH)
@click.option("--to", "layout", type=click.Choice(["hf", "peft"]), required=True, help="A whole checkpoint, or an adapter for PEFT.")
def export(model: Path, destination: Path, layout: str) -> None:
    """Write MODEL in the layout that other tools read."""
    from mlx_distill.models import export as exporters

    (exporters.to_hf if layout == "hf" else exporters.to_peft)(model, destination)
    click.echo(f"written: {destination}")


@click.command()
@click.argument("path", type=_PATH)
@click.option("--verify", is_flag=True, help="Hash every file, where otherwise sizes and times decide.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def inspect(path: Path, verify: bool, as_json: bool) -> None:
    """Say what lies at PATH.

    PATH is a model, an adapter, the folder of a stage, or that of a run.
    """
    from mlx_distill.cli.show import echo_json, echo_result
    from mlx_distill.models.inspect import inspect as look

    (echo_json if as_json else echo_result)(look(path, verify=verify))


@click.command()
@click.argument("model")
@click.argument("input", metavar="INPUT", type=_PATH)
@click.option("--task", required=True, help="A packaged task, or a YAML file.")
@click.option("--out", type=_PATH, help="Where the answers go, one JSON object a line.  [default: standard output]")
def analyze(model: str, input: Path, task: str, out: Path | None) -> None:
    """Let a model answer for every row of a file.

    INPUT is a JSONL file with the task's fields; the answers come as JSONL too.
    """
    from mlx_distill.cli.show import plain
    from mlx_distill.files import read_jsonl, write_jsonl
    from mlx_distill.infer import analyze as answer

    rows = [plain(prediction) for prediction in answer(model, task, [row for _, row in read_jsonl(input)])]
    if out:
        write_jsonl(out, rows)
        click.echo(f"written: {out} ({len(rows)} rows)", err=True)
    else:
        import json

        for row in rows:
            click.echo(json.dumps(row, ensure_ascii=False))
