"""Commands about the installation: recipes and doctor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlx_distill.config_sections import Key, Section


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List, show, copy and explain recipes and tasks."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list")
def list_recipes() -> None:
    """List the packaged recipes and tasks."""
    from mlx_distill.recipe import load_recipe, recipe_names
    from mlx_distill.tasks.task import load_task, task_names

    recipes = {name: load_recipe(name).description for name in recipe_names()}
    tasks = {name: load_task(name).description for name in task_names()}
    width = max(map(len, [*recipes, *tasks]), default=0)
    for name, description in recipes.items():
        click.echo(f"{name:<{width}}  {description}".rstrip())
    click.echo("\ntasks (for the key task of a recipe; show and copy work on them too):")
    for name, description in tasks.items():
        click.echo(f"{name:<{width}}  {description}".rstrip())


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe or the task NAME."""
    click.echo(_packaged(name).read_text(encoding="utf-8"), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
def copy(name: str, file: Path) -> None:
    """Copy the recipe or the task NAME to FILE."""
    from mlx_distill.errors import FileError
    from mlx_distill.storage import write_text

    source = _packaged(name)
    file = file / f"{name}.yaml" if file.is_dir() else file
    if file.exists():
        raise FileError(f"{file}: exists already", fix="choose another name, or remove it first")
    write_text(file, source.read_text(encoding="utf-8"))
    use = (
        f"; a recipe beside it says task: {file.name}"
        if source.stem == "task"
        else f", then: mlx-distill run {file}"
    )
    click.echo(f"written: {file}; edit it{use}")


def _with_key(every: list[Section], name: str) -> list[Section]:
    """The section of a key, with that key alone."""
    of, _, last = name.rpartition(".")
    found = [(entry, key) for entry in every for key in entry.keys if (entry.name, key.name) == (of, last)]
    return [replace(entry, keys=[key]) for entry, key in found]


@recipes.command()
@click.argument("section", required=False)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def keys(section: str | None, as_json: bool) -> None:
    """Explain the keys of recipes and tasks, with their defaults.

    SECTION is a key, such as distill.token_weight, or one of: recipe (the keys at the top
    level), data, data.sources, data.sources.values,
    convert, teach, targets, distill, quantize, evaluate, controls; task (a file of its own).
    """
    import json

    from mlx_distill.cli.output import plain
    from mlx_distill.config_sections import sections
    from mlx_distill.errors import ConfigError
    from mlx_distill.recipe import recipe_sections
    from mlx_distill.tasks.task import Task
    from mlx_distill.text import known_names

    every = [*recipe_sections(), *sections(Task, "task")]
    shown = [entry for entry in every if section in (None, entry.name)] or _with_key(every, str(section))
    if not shown:
        names = [entry.name for entry in every]
        raise ConfigError(
            f"no section or key {section!r} in a recipe", fix=known_names(str(section), names, "sections")
        )
    if as_json:
        click.echo(json.dumps(plain({"sections": shown}), ensure_ascii=False, indent=2))
        return
    width = max(len(key.name) for entry in every for key in entry.keys)
    for number, entry in enumerate(shown):
        help = entry.help.removeprefix(f"{entry.name.capitalize()}: ")
        click.echo(("\n" if number else "") + f"{entry.name}: {help}")
        for key in entry.keys:
            click.echo(_explain(key, width))


def _explain(key: Key, width: int) -> str:
    """A key, with its help and values wrapped to the right of it."""
    import textwrap

    import yaml

    default = yaml.safe_dump(key.default, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    values = ", ".join(key.choices) if key.choices else key.type
    parts = [values, _limits(key), "needed" if key.needed else f"default: {default}"]
    indent = " " * (width + 4)
    text = textwrap.fill(
        f"{key.help} [{'; '.join(filter(None, parts))}]",
        100,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return f"  {key.name:<{width}}  {text.lstrip()}"


def _limits(key: Key) -> str:
    if key.low is not None and key.high is not None:
        return f"{key.low:g} to {key.high:g}"
    if key.low is not None:
        return f"at least {key.low:g}"
    return f"at most {key.high:g}" if key.high is not None else ""


def _packaged(name: str) -> Path:
    """The file of a packaged recipe or task."""
    from mlx_distill.config import ASSETS
    from mlx_distill.errors import ConfigError
    from mlx_distill.recipe import recipe_names
    from mlx_distill.tasks.task import task_names
    from mlx_distill.text import did_you_mean

    if name in recipe_names():
        return ASSETS / "recipes" / f"{name}.yaml"
    if name in task_names():
        return ASSETS / name / "task.yaml"
    known = f"recipes: {', '.join(recipe_names())}; tasks: {', '.join(task_names())}"
    near = did_you_mean(name, [*recipe_names(), *task_names()])
    raise ConfigError(f"no packaged recipe or task {name!r}", fix=f"{near} {known}".strip())


@click.command()
@click.argument("recipe", required=False)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
@click.pass_context
def doctor(ctx: click.Context, recipe: str | None, as_json: bool) -> None:
    """Check the machine and the installation.

    Device, memory, versions, BLAS, disk and optional packages; each problem with its fix. With a RECIPE also
    what each of its stages downloads and writes. The exit code is 1 if some command cannot run, or the disk
    is too small for the recipe.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.doctor import diagnose

    diagnosis = diagnose(recipe=recipe)
    echo(diagnosis, as_json)
    ctx.exit(0 if diagnosis.healthy else 1)
