"""Commands about the installation: recipes and doctor."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the packaged recipes, show one, or copy one out to edit."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list")
def list_recipes() -> None:
    """The packaged recipes, a line each."""
    from mlx_distill.recipe import load_recipe, recipe_names

    names = recipe_names()
    width = max(map(len, names), default=0)
    for name in names:
        click.echo(f"{name:<{width}}  {load_recipe(name).description}".rstrip())


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(_read(name), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
def copy(name: str, file: Path) -> None:
    """Copy the recipe NAME to FILE."""
    from mlx_distill.errors import FileError
    from mlx_distill.files import write_text

    text = _read(name)
    file = file / f"{name}.yaml" if file.is_dir() else file
    if file.exists():
        raise FileError(f"{file}: exists already", fix="choose another name, or remove it first")
    write_text(file, text)
    click.echo(f"written: {file}; edit it, then: mlx-distill run {file}")


def _read(name: str) -> str:
    from mlx_distill.config import packaged
    from mlx_distill.errors import ConfigError
    from mlx_distill.recipe import recipe_names

    path = packaged(f"recipes/{name}.yaml") if name in recipe_names() else None
    if path is None:
        raise ConfigError(f"no packaged recipe {name!r}", fix=f"packaged: {', '.join(recipe_names())}")
    return path.read_text(encoding="utf-8")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what the machine offers and what is missing.

    Device, memory, versions, BLAS, disk, optional packages; each lack with its cure. Exit code 1 where a command could not run.
    """
    from mlx_distill import doctor as physician
    from mlx_distill.cli.show import echo

    diagnosis = physician.diagnose()
    echo(diagnosis, as_json)
    ctx.exit(0 if diagnosis.healthy else 1)
