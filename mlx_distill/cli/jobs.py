"""The commands jobs submit, list, show, watch, first, pause, resume and cancel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlx_distill.cli.job_text import event_line, job_facts, job_line, job_lines, progress_lines
from mlx_distill.cli.options import find_ledger, json_option, open_ledger, root_option

_POLL_S = 0.5  # seconds between two looks of watch


@click.group()
def jobs() -> None:
    """Run commands in the background, one at a time.

    ID is a job's identifier or its beginning, with or without job-.
    """


@jobs.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--title", help="What it is, for people.  [default: the command]")
@click.option(
    "--relax-gpu-timeout", is_flag=True, help="Let macOS wait longer before it ends the work of the GPU."
)
@root_option
@json_option
@click.argument("kind", metavar="COMMAND")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def submit(
    kind: str,
    arguments: tuple[str, ...],
    title: str | None,
    relax_gpu_timeout: bool,
    root: Path,
    as_json: bool,
) -> None:
    """Put a command into the queue, such as: jobs submit run RECIPE --out runs/mine.

    Options of jobs submit stand before COMMAND. Paths are relative to the root, in which the job runs.
    """
    from mlx_distill.jobs import dispatch, get
    from mlx_distill.jobs import submit as submit_job

    run_path, request = check_command(kind, arguments, root)
    ledger = open_ledger(root)
    job = submit_job(
        ledger,
        kind,
        arguments,
        title=title,
        run_path=run_path,
        request=request,
        relax_gpu_timeout=relax_gpu_timeout,
    )
    dispatch(ledger)
    job = get(ledger, job.id)
    _echo_job(job, as_json, *_waits(ledger, job), f"watch it: mlx-distill jobs watch {job.id}")


@jobs.command("list")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="So many at most.")
@root_option
@json_option
def list_(states: tuple[str, ...], limit: int, root: Path, as_json: bool) -> None:
    """Show the jobs, the newest first."""
    from mlx_distill.errors import ConfigError
    from mlx_distill.jobs import STATES, dispatch, list_jobs
    from mlx_distill.text import known_names

    for state in states:
        if state not in STATES:
            raise ConfigError(f"no state {state!r}", fix=known_names(state, STATES, "states"))
    ledger = find_ledger(root)
    found = []
    if ledger is not None:
        dispatch(ledger)
        found = list_jobs(ledger, state=states or None, limit=limit)
    lines = [job_line(job) for job in found] or ["no jobs; start one: mlx-distill jobs submit run RECIPE"]
    _echo([job_facts(job) for job in found], lines, as_json)


@jobs.command()
@click.argument("job_id", metavar="ID")
@root_option
@json_option
def show(job_id: str, root: Path, as_json: bool) -> None:
    """Show a job: its state, its progress and its last events."""
    from mlx_distill.cli.output import plain
    from mlx_distill.jobs import dispatch, events, get, progress

    ledger, job_id = _find(root, job_id)
    dispatch(ledger)
    job = get(ledger, job_id)
    done = progress(ledger, job)
    last = events(ledger, job_id, newest=20)
    lines = [*job_lines(job, ledger.root), *_waits(ledger, job), *progress_lines(done)]
    lines += map(event_line, last)
    _echo({**job_facts(job), "progress": plain(done), "events": plain(last)}, lines, as_json)


@jobs.command()
@click.argument("job_id", metavar="ID")
@root_option
@click.pass_context
def watch(ctx: click.Context, job_id: str, root: Path) -> None:
    """Follow a job until it ends, and exit with its exit code. Ctrl-C leaves the job running."""
    import time

    from mlx_distill.jobs import dispatch, events, get, progress

    ledger, job_id = _find(root, job_id)
    seen, shown = 0, ""
    while True:
        dispatch(ledger)
        job = get(ledger, job_id)
        for event in events(ledger, job_id, after=seen):
            seen = event.id
            click.echo(event_line(event))
        if job.state not in ("queued", "running"):
            break
        line = " ".join(progress_lines(progress(ledger, job, max_rows=0)))
        if job.state == "running" and line and line != shown:
            shown = line
            click.echo(line)
        time.sleep(_POLL_S)
    click.echo(job_line(job))
    if job.state != "succeeded":
        ctx.exit(job.exit_code or (130 if job.state in ("paused", "cancelled") else 1))


def _action(name: str, summary: str) -> click.Command:
    """A command that does one thing to one job."""

    @click.command(name, help=summary)
    @click.argument("job_id", metavar="ID")
    @root_option
    @json_option
    def command(job_id: str, root: Path, as_json: bool) -> None:
        from mlx_distill.jobs import dispatch, get, move_first, pause, resume

        ledger, job_id = _find(root, job_id)
        {"first": move_first, "pause": pause, "resume": resume}[name](ledger, job_id)
        dispatch(ledger)
        _echo_job(get(ledger, job_id), as_json)

    return command


for _name, _summary in {
    "first": "Let a queued job be the next one.",
    "pause": "Let a job save and stop; resume continues it.",
    "resume": "Put a paused, cancelled or failed job into the queue again; it continues where it stopped.",
}.items():
    jobs.add_command(_action(_name, _summary))


@jobs.command()
@click.argument("job_id", metavar="ID")
@click.option("--discard", is_flag=True, help="Remove what is not finished, with its checkpoints.")
@root_option
@json_option
def cancel(job_id: str, discard: bool, root: Path, as_json: bool) -> None:
    """Let a job save and stop; after 30 s it is killed. Finished stages always stay."""
    from mlx_distill.jobs import cancel as cancel_job
    from mlx_distill.jobs import dispatch, get

    ledger, job_id = _find(root, job_id)
    cancel_job(ledger, job_id, discard=discard)
    dispatch(ledger)
    _echo_job(get(ledger, job_id), as_json)


def check_command(
    kind: str, arguments: Sequence[str], root: Path
) -> tuple[str | None, dict[str, Any] | None]:
    """Refuse a command line that the job could not even begin with.

    Returns:
        For commands that take a recipe: the folder of the run that it makes; and where the recipe comes from,
        what is set, and the whole of it, None where it is not under the root.

    Raises:
        ConfigError: no such command, or its recipe is wrong.
        click.UsageError: its options are wrong.
    """
    from mlx_distill.cli.main import cli
    from mlx_distill.config import override
    from mlx_distill.errors import ConfigError
    from mlx_distill.jobs import KINDS
    from mlx_distill.ledger.root import Root
    from mlx_distill.recipe import load_recipe
    from mlx_distill.serve.pages.recipe_checks import read_recipe
    from mlx_distill.text import known_names

    command = cli.get_command(click.Context(cli), kind) if kind in KINDS else None
    if command is None:
        raise ConfigError(f"{kind!r} cannot be a job", fix=known_names(kind, KINDS, "commands"))
    params = command.make_context(f"mlx-distill {kind}", list(arguments)).params
    recipe = params.get("recipe")
    if recipe is None:
        return None, None
    path, overrides = root / str(recipe), list(params.get("overrides") or ())
    loaded = load_recipe(path if path.is_file() else str(recipe), overrides)
    run_path = str(params.get("out") or Path("runs") / loaded.name)
    kind_of_source = "file" if path.is_file() else "recipe"
    if kind_of_source == "file" and not path.resolve().is_relative_to(root.resolve()):
        return run_path, None
    raw = override(read_recipe(Root.at(root), str(recipe)), overrides)
    return run_path, {"from": f"{kind_of_source}:{recipe}", "set": overrides, "recipe": raw}


def _find(root: Path, text: str) -> tuple[Any, str]:
    """The ledger, and the identifier of the job that begins with a text."""
    from mlx_distill.jobs import full_id

    ledger = open_ledger(root, create=False)
    return ledger, full_id(ledger, text)


def _waits(ledger: Any, job: Any) -> list[str]:
    """Why a queued job does not run, in a line."""
    from mlx_distill.jobs import waits_for

    why = waits_for(ledger) if job.state == "queued" else None
    return [f"  {why}"] if why else []


def _echo(value: Any, lines: Sequence[str], as_json: bool) -> None:
    import json

    from mlx_distill.cli.output import plain

    click.echo(json.dumps(plain(value), ensure_ascii=False, indent=2) if as_json else "\n".join(lines))


def _echo_job(job: Any, as_json: bool, *more: str) -> None:
    _echo(job_facts(job), [job_line(job), *more], as_json)


@jobs.command(hidden=True)
@click.argument("job_id")
@root_option
@click.pass_context
def execute(ctx: click.Context, job_id: str, root: Path) -> None:
    """Be the process of a job."""
    from mlx_distill.jobs.execute import execute as execute_job

    ctx.exit(execute_job(open_ledger(root), job_id, run_command))


def run_command(arguments: Sequence[str]) -> Any:
    """Run a command line of this program in this process, and say how it ended."""
    from mlx_distill.cli.main import cli, explain
    from mlx_distill.errors import DistillError
    from mlx_distill.jobs.ended import Ended

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
    return Ended(0)


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
