"""The group of all commands; errors become two lines and an exit code."""

from __future__ import annotations

import errno
from importlib import import_module
from typing import Any

import click

from mlx_distill import __version__
from mlx_distill.errors import DistillError, from_os_error
from mlx_distill.text import did_you_mean

# In the order of --help: name -> module:attribute under mlx_distill.cli.
COMMANDS = {
    "demo": "runs:demo",
    "run": "runs:run",
    "prepare": "runs:prepare",
    "teach": "runs:teach",
    "targets": "runs:targets",
    "distill": "runs:distill",
    "quantize": "runs:quantize",
    "evaluate": "runs:evaluate",
    "validate": "validate:validate",
    "convert": "models:convert",
    "export": "models:export",
    "inspect": "models:inspect",
    "analyze": "analyze:analyze",
    "compare": "compare:compare",
    "data": "data:data",
    "registry": "registry:registry",
    "costs": "costs:costs",
    "ledger": "ledger:ledger",
    "jobs": "jobs:jobs",
    "recipes": "recipes:recipes",
    "doctor": "recipes:doctor",
    "serve": "serve:serve",
}


class Commands(click.Group):
    """A group that imports a command when it is used, and shows errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        return _with_debug(getattr(import_module(f"mlx_distill.cli.{module}"), attribute))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"{error.message} {hint.capitalize()}".strip(), ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an error into two lines and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("debug") or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            message, fix, code = explain(error)
            click.echo(f"error: {message}", err=True)
            if fix:
                click.echo(f"fix: {fix}", err=True)
            ctx.exit(code)


def _with_debug(command: click.Command) -> click.Command:
    """Let a command take ``--debug`` after its name too."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().params["debug"] = True

    if all(parameter.name != "debug" for parameter in command.params):
        command.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, hidden=True, callback=remember)
        )
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        _with_debug(child)
    return command


def explain(error: BaseException) -> tuple[str, str | None, int]:
    """The message, the fix and the exit code of an error.

    >>> explain(FileNotFoundError(2, "No such file or directory", "rows.jsonl"))
    ('rows.jsonl: no such file or directory', 'check the path', 1)
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "the same command continues where it stopped", 130
    if isinstance(error, OSError):
        error = from_os_error(error)
    if isinstance(error, DistillError):
        return _one_line(error.message), error.fix and _one_line(error.fix), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is not installed", "see what is missing: mlx-distill doctor", 1
    if isinstance(error, MemoryError):
        return "out of memory", "close other programs, or lower batch_size or max_length", 1
    text = f"unexpected {type(error).__name__}: {_one_line(str(error))}"
    return text, "run it again as mlx-distill --debug ... and report the traceback", 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the whole traceback of an error.")
@click.version_option(__version__, prog_name="mlx-distill")
def cli(debug: bool) -> None:
    """Fine-tune a teacher, distill it into a student with another tokenizer, quantize it, and prove that it
    is as good.

    Start with: mlx-distill demo
    """
