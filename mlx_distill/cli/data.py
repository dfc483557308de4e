"""The commands data add, list, show, check and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_distill.cli.options import find_ledger, json_option, open_ledger, root_option

_TASK = click.option(
    "--task",
    help="By which the rows are read: a packaged task, or a YAML file.  [default: chats of any kind]",
)
_OWN_TASK = click.option("--task", help="By which the rows are read.  [default: that of the data set]")


@click.group()
def data() -> None:
    """Keep data sets by name: statistics, duplicates, leaks, exports."""


def _under(root: Path, name: str) -> str:
    """A path from the working directory as one that starts at the root; a name as it is."""
    from mlx_distill.ledger.root import Root

    return Root.at(root).relative(Path(name).resolve()) if Path(name).exists() else name


@data.command()
@click.argument("path")
@click.option("--name", help="What the data set is called.  [default: as its file]")
@_TASK
@root_option
@json_option
def add(path: str, name: str | None, task: str | None, root: Path, as_json: bool) -> None:
    """Describe the rows of PATH, a file or a folder under the root, and keep that under a name.

    The rows stay where they are. The same command describes them anew.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.data_sets import add_data_set

    echo(add_data_set(open_ledger(root), _under(root, path), name=name, task=task), as_json)


@data.command("list")
@root_option
@json_option
def list_all(root: Path, as_json: bool) -> None:
    """List the data sets."""
    import json

    from mlx_distill.cli.output import plain
    from mlx_distill.data_sets import list_data_sets

    ledger = find_ledger(root)
    found = [] if ledger is None else list_data_sets(ledger)
    if as_json:
        click.echo(json.dumps(plain(found), ensure_ascii=False, indent=2))
        return
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        click.echo(f"{one.name:<{width}}  {one.rows:>9,} rows  {one.task or 'chats':<12}  {one.path}")
    if not found:
        click.echo("no data sets yet; add one with: mlx-distill data add PATH")


@data.command()
@click.argument("name")
@root_option
@json_option
def show(name: str, root: Path, as_json: bool) -> None:
    """Show what was in the data set NAME when it was added, and whether it has changed since."""
    from mlx_distill.cli.output import echo
    from mlx_distill.data_sets import get_data_set

    echo(get_data_set(open_ledger(root, create=False), name), as_json)


@data.command()
@click.argument("name", metavar="NAME-OR-PATH")
@_OWN_TASK
@root_option
@json_option
@click.pass_context
def check(ctx: click.Context, name: str, task: str | None, root: Path, as_json: bool) -> None:
    """Read a data set again: rows that cannot be used, duplicates, training rows that are held out too.

    The exit code is 1 if something should be corrected.
    """
    from mlx_distill.cli.output import echo
    from mlx_distill.data_sets import check_data_set

    found = check_data_set(open_ledger(root), _under(root, name), task=task)
    echo(found, as_json)
    ctx.exit(1 if found.problems else 0)


@data.command()
@click.argument("name", metavar="NAME-OR-PATH")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--to", "layout", type=click.Choice(["openai", "alpaca", "chatml"]), required=True, help="The layout."
)
@click.option("--split", help="train, valid or test: the rows of that split alone; or all.")
@click.option("--bare", is_flag=True, help="Leave out ids and other columns, which some tools refuse.")
@_OWN_TASK
@root_option
def export(name: str, file: Path, layout: str, root: Path, **options: Any) -> None:
    """Write the rows of a data set to FILE, as JSON lines that another tool reads.

    Read back, the file gives the same rows. Where the layout cannot hold a row, nothing is written, and the
    error names the rows and the reason.
    """
    from mlx_distill.data_sets import export_data_set
    from mlx_distill.text import counted

    count = export_data_set(open_ledger(root), _under(root, name), file, layout, **options)
    click.echo(f"written: {file}: {counted(count, 'row')}, the same when it is read back")
