"""The command line: each command parses its options, calls the library and prints the result."""

from __future__ import annotations

from mlx_distill.cli.main import cli

__all__ = ["cli"]
