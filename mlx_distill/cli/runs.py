"""Commands that take a recipe: the demo, the whole run, and each stage of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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
        help="Do this stage again, and all that follow from it; what an interrupted attempt with the same settings left is gone on with.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what each stage would read and write, and do nothing."),
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
    """Run the whole job on tiny packaged models, offline, in minutes."""
    _run("tiny", out)


@click.command()
@_recipe_command
def run(**options: Any) -> None:
    """Run every stage of a recipe that is not current.

    After an interruption the same command goes on. RECIPE is a YAML file or the name of a packaged recipe
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
            "--profile", is_flag=True, help="Say where a step's time goes; steps are slower for it."
        )(command)
    return click.command(name)(_recipe_command(command))


prepare = _stage_command("prepare", "Turn rows into validated, deduplicated and split chats.")
teach = _stage_command("teach", "Fine-tune the teacher on the labelled rows.")
targets = _stage_command("targets", "Write down, once, what the teacher says of the training rows.")
distill = _stage_command("distill", "Train the student on the teacher's targets.")
quantize = _stage_command("quantize", "Bring the student's weights to few bits.")
evaluate = _stage_command("evaluate", "Measure every model on held-out rows, and write the report.")


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
) -> None:
    from mlx_distill.cli.output import echo
    from mlx_distill.pipeline import run as run_recipe
    from mlx_distill.progress import make_progress
    from mlx_distill.recipe import load_recipe
    from mlx_distill.runtime import rank_and_size

    out = out or Path("runs") / load_recipe(recipe, overrides).name
    options: dict[str, Any] = {
        "overrides": overrides,
        "from_stage": from_stage,
        "only": only,
        "dry_run": dry_run,
    }
    if os.environ.get("MLX_RANK") == "0":  # for ever and without a word, where one does not come
        click.echo("waiting for the other ranks of mlx.launch", err=True)
    speaks = rank_and_size()[0] == 0
    if profile:
        from mlx_distill.train.profiling import Profile

        options["profile"] = Profile()
    taken, result = options.get("profile"), None
    try:
        result = run_recipe(recipe, out, progress=make_progress(), **options)
    finally:
        if (
            speaks and taken and (result is not None or taken.rows)
        ):  # the table of an interrupted training is as good
            echo(taken, as_json)
            click.echo(nl=not as_json)
    if speaks and not (taken and as_json):
        echo(result, as_json)
