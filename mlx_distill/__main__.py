"""``python -m mlx_distill`` and the installed command ``mlx-distill``."""

from __future__ import annotations

from mlx_distill.cli import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="mlx-distill")


if __name__ == "__main__":
    main()
