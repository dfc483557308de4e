"""The commands ledger backup, restore and check."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_distill.cli.options import open_ledger, root_option

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def ledger() -> None:
    """Back up, restore and check the ledger."""


@ledger.command()
@click.argument("file", type=_FILE, required=False)
@root_option
def backup(file: Path | None, root: Path) -> None:
    """Write a copy of the ledger to FILE.  [default: under .mlx-distill/backups]

    It is one whole file, of one moment, also while a job or the server is at work.
    """
    from mlx_distill.ledger.backups import backup as write_backup

    click.echo(f"written: {write_backup(open_ledger(root, create=False), file)}")


@ledger.command()
@click.argument("file", type=_FILE)
@root_option
def restore(file: Path, root: Path) -> None:
    """Put the backup FILE in the place of the ledger.

    Stop the server and all jobs first. What was there is kept beside the backups.
    """
    from mlx_distill.ledger.backups import restore as put_back
    from mlx_distill.ledger.root import Root

    replaced = put_back(Root.at(root), file)
    open_ledger(root, create=False)
    click.echo(f"restored: {file}" + (f"; what was there: {replaced}" if replaced.exists() else ""))


@ledger.command()
@root_option
def check(root: Path) -> None:
    """Check the ledger, and index the runs under the root again."""
    from mlx_distill.ledger.backups import check_file
    from mlx_distill.ledger.runs import scan_runs
    from mlx_distill.text import counted

    opened = open_ledger(root, create=False)
    check_file(opened.path)
    scan = scan_runs(opened)
    news = f"{len(scan.added)} new, {len(scan.changed)} changed, {len(scan.removed)} gone"
    folds = f" and {counted(scan.folds, 'fold')} of cross-validations" if scan.folds else ""
    runs = f"{counted(scan.total - scan.folds, 'run')}{folds}"
    click.echo(f"{opened.path}: whole; {runs} under {opened.root.path}: {news}")
