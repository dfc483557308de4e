"""The commands jobs submit, list, show, watch, move, pause, resume and cancel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

_ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    envvar="MLX_DISTILL_ROOT",
    show_default=True,
    show_envvar=True,
    help="The folder that you work in.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")


@click.group()
def jobs() -> None:
    """Run commands in the background, one at a time."""


def _ledger(root: Path) -> Any:
    from mlx_distill.ledger.database import Ledger
    from mlx_distill.ledger.root import Root

    return Ledger(Root.at(root))


@jobs.command(hidden=True)
@click.argument("job_id")
@_ROOT
@click.pass_context
def execute(ctx: click.Context, job_id: str, root: Path) -> None:
    """Be the process of a job."""
    from mlx_distill.jobs.execute import execute as execute_job

    ctx.exit(execute_job(_ledger(root), job_id, run_command))


def run_command(arguments: Sequence[str]) -> Any:
    """Run a command line of this program in this process, and say how it ended."""
    from mlx_distill.cli.main import cli, explain
    from mlx_distill.errors import DistillError
    from mlx_distill.jobs.execute import Ended

    try:
        value = cli.main(["--debug", *arguments], prog_name="mlx-distill", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return Ended(error.exit_code, "usage", error.format_message())
    except click.Abort:
        return Ended(130)
    except (Exception, KeyboardInterrupt) as error:
        message, fix, code = explain(error)
        if not isinstance(error, DistillError | KeyboardInterrupt):
            import traceback

            traceback.print_exc()
        click.echo(f"error: {message}", err=True)
        if fix:
            click.echo(f"fix: {fix}", err=True)
        return Ended(code, error_code(error, code), message, fix)
    if isinstance(value, int) and value:
        gate = value == 3
        return Ended(
            value,
            "quality_gate" if gate else "failed",
            "a quality gate failed" if gate else f"it ended with the exit code {value}",
            "see what it printed: mlx-distill jobs show ID" if gate else None,
        )
    return Ended(0, value=value)


def error_code(error: BaseException, exit_code: int) -> str | None:
    """A word for the kind of an error.

    >>> from mlx_distill.errors import DataError
    >>> error_code(DataError("x"), 1), error_code(OSError("x"), 1), error_code(KeyError("x"), 1)
    ('data', 'file', 'unexpected')
    """
    from mlx_distill.errors import ConfigError, DataError, FileError, ModelError, QualityGateError

    if exit_code == 130:
        return None
    kinds: list[tuple[Any, str]] = [
        (QualityGateError, "quality_gate"),
        (ConfigError, "config"),
        (DataError, "data"),
        (ModelError, "model"),
        ((FileError, OSError), "file"),
        (MemoryError, "out_of_memory"),
    ]
    return next((name for kind, name in kinds if isinstance(error, kind)), "unexpected")
