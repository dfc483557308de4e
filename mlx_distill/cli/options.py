"""Options that several commands have."""

from __future__ import annotations

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


def open_ledger(root: Path, *, create: bool = True) -> Ledger:
    """The ledger of a root."""
    from mlx_distill.ledger.database import Ledger
    from mlx_distill.ledger.root import Root

    return Ledger(Root.at(root), create=create)
