"""The commands: parse, config, call, echo. Each command's module is imported when it is asked for."""

from __future__ import annotations

from mlx_distill.cli.main import cli

__all__ = ["cli"]
