"""Options that several commands have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlx_distill.ledger.database import Ledger

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    envvar="MLX_DISTILL_ROOT",
    show_default=True,
    show_envvar=True,
    help="The folder that you work in.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")


def accelerator_of(command: str, needed: bool = True) -> AbstractContextManager[None]:
    """Hold the accelerator's lease for a command, where the working folder has a ledger."""
    from mlx_distill.jobs.alongside import accelerator

    return accelerator(f"mlx-distill {command}") if needed else nullcontext()


def find_ledger(root: Path) -> Ledger | None:
    """The ledger of a root for a command that only looks; None where there is none, so that looking makes
    nothing. One that was lost is an error.
    """
    from mlx_distill.ledger.backups import newest_backup
    from mlx_distill.ledger.root import Root

    found = Root.at(root)
    if not found.ledger.is_file() and newest_backup(found) is None:
        return None
    return open_ledger(root)


def open_ledger(root: Path, *, create: bool = True) -> Ledger:
    """The ledger of a root."""
    from mlx_distill.ledger.database import Ledger
    from mlx_distill.ledger.root import Root

    return Ledger(Root.at(root), create=create)
