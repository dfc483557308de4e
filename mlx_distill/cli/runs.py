"""Commands that take a recipe: the demo, the whole run, and each stage of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_distill.cli.options import accelerator_of

_OPTIONS = [
    click.argument("recipe"),
    click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME]"),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one key of the recipe, such as distill.epochs=2.",
    ),
    click.option(
        "--from",
        "from_stage",
        metavar="STAGE",
        help="Make this stage again, and all that follow from it; "
        "an interrupted attempt with the same settings is continued.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Show what each stage would read and write, and write nothing."
    ),
    click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output."),
]


def _recipe_command(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="The run's folder.",
)
def demo(out: Path) -> None:
    """Run everything on tiny packaged models, offline, in minutes."""
    _run("tiny-drawn", out)


_GATE = click.option(
    "--gate", is_flag=True, help="Exit with code 3 unless every goal of the recipe is met; see goals."
)
_FORCE = click.option("--force", is_flag=True, help="Go on where a quality gate fails (targets.min_valid).")


@click.command()
@_FORCE
@_GATE
@_recipe_command
def run(**options: Any) -> None:
    """Run every stage of a recipe that is not current.

    After an interruption the same command continues. RECIPE is a YAML file or the name of a packaged recipe
    (see: mlx-distill recipes).
    """
    _run(**options)


def _stage_command(name: str, summary: str) -> click.Command:
    def command(**options: Any) -> None:
        _run(**options, only=name)

    command.__doc__ = (
        f"{summary}\n\nRECIPE is a YAML file or the name of a packaged recipe (see: mlx-distill recipes)."
    )
    if name in ("teach", "distill"):
        command = click.option(
            "--profile", is_flag=True, help="Measure the parts of each step; this makes steps slower."
        )(command)
    if name == "targets":
        command = _FORCE(command)
    if name == "evaluate":
        command = _GATE(command)
    return click.command(name)(_recipe_command(command))


prepare = _stage_command("prepare", "Turn rows into chats: validated, deduplicated and split.")
teach = _stage_command("teach", "Fine-tune the teacher on the labelled rows.")
targets = _stage_command("targets", "Store the teacher's answers on the training rows.")
distill = _stage_command("distill", "Train the student on the teacher's targets.")
quantize = _stage_command("quantize", "Quantize the student.")
evaluate = _stage_command("evaluate", "Evaluate every model on held-out rows, and write the report.")


def _require_goals_in(recipe: Any) -> None:
    from mlx_distill.errors import ConfigError

    if not recipe.goals:
        raise ConfigError(
            f"--gate: the recipe {recipe.name!r} has no goals",
            fix="add goals: [{model: student, metric: accuracy, at_least: 0.85}] to it",
        )


def _run(
    recipe: str,
    out: Path | None,
    *,
    overrides: tuple[str, ...] = (),
    from_stage: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    as_json: bool = False,
    profile: bool = False,
    force: bool = False,
    gate: bool = False,
) -> None:
    from mlx_distill.cli.output import echo
    from mlx_distill.pipeline import run as run_recipe
    from mlx_distill.progress import make_progress
    from mlx_distill.recipe import load_recipe
    from mlx_distill.report import RunReport
    from mlx_distill.runtime import rank_and_size
    from mlx_distill.status import Plan, check_problems

    loaded = load_recipe(recipe, overrides)
    out = out or Path("runs") / loaded.name
    if gate:
        _require_goals_in(loaded)
    if os.environ.get("MLX_RANK") == "0":  # it waits for the others without a time limit
        click.echo("waiting for the other ranks of mlx.launch", err=True)
    is_first_rank = rank_and_size()[0] == 0
    profiler = None
    if profile:
        from mlx_distill.train.profiling import Profile

        profiler = Profile()
    result = None
    try:
        with accelerator_of(f"{only or 'run'} {recipe}", not dry_run and only != "prepare"):
            result = run_recipe(
                recipe,
                out,
                progress=make_progress(),
                overrides=overrides,
                from_stage=from_stage,
                only=only,
                dry_run=dry_run,
                profile=profiler,
                force=force,
            )
    finally:
        # The profile of an interrupted training is shown too.
        if is_first_rank and profiler and (result is not None or profiler.rows):
            echo(profiler, as_json)
            click.echo(nl=not as_json)
    if is_first_rank and not (profiler and as_json):
        echo(result, as_json)
    if isinstance(result, Plan):
        check_problems(result.problems)
    elif gate and isinstance(result, RunReport):
        result.require_goals()
