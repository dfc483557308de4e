"""The command validate."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_distill.cli.options import accelerator_of


@click.command()
@click.argument("recipe")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="How many folds.")
@click.option(
    "--models",
    default="teacher",
    show_default=True,
    metavar="NAMES",
    help="The models to measure, with commas: teacher_before, teacher, student_before, student, quantized.",
)
@click.option(
    "--learning-curve",
    is_flag=False,
    flag_value="one",
    type=click.Choice(["one", "each"]),
    help="Train the teacher on 25, 50 and 75 % of the training rows too, of one fold or of each.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The folder.  [default: runs/NAME-validation]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key of the recipe, such as teach.epochs=2.",
)
@click.option("--dry-run", is_flag=True, help="Show what it costs, and write nothing.")
@click.option("--gate", is_flag=True, help="Exit with 3 unless every goal for these models is met.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
@click.pass_context
def validate(
    ctx: click.Context,
    recipe: str,
    folds: int,
    models: str,
    learning_curve: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    gate: bool,
    as_json: bool,
) -> None:
    """Cross-validate a recipe, one run a fold.

    Every row is tested once, by a model that has not seen it. RECIPE is a YAML file or the name of a packaged
    recipe (see: mlx-distill recipes). Each fold is a run in a folder of its own; after an interruption the
    same command continues. What it costs is printed first.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.progress import make_progress
    from mlx_distill.validation import validate as validate_recipe
    from mlx_distill.validation_plan import ValidationPlan

    names = [name.strip() for name in models.split(",")]
    if gate:
        _require_goals_for(recipe, overrides, names)
    with accelerator_of(f"validate {recipe}", not dry_run):
        result = validate_recipe(
            recipe,
            out,
            folds=folds,
            models=names,
            learning_curve=learning_curve or False,
            overrides=overrides,
            dry_run=dry_run,
            progress=make_progress(),
        )
    echo(result, as_json)
    if gate and not isinstance(result, ValidationPlan):
        report = result.report  # goals of other models are listed as not measured, and close no gate
        judged = [goal for goal in report["goals"] if goal["model"] in report["models"]]
        ctx.exit(0 if all(goal["state"] == "met" for goal in judged) else 3)


def _require_goals_for(recipe: str, overrides: tuple[str, ...], models: list[str]) -> None:
    """Refuse a gate without a condition before anything is trained."""
    from mlx_distill.errors import ConfigError
    from mlx_distill.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if not any(goal.model in models for goal in loaded.goals):
        raise ConfigError(
            f"--gate: the recipe {loaded.name!r} has no goals for {', '.join(models)}",
            fix=f"add goals: [{{model: {models[0]}, metric: accuracy, at_least: 0.85}}] to it",
        )
