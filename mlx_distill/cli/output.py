"""Results on standard output: for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import click


def echo(result: Any, as_json: bool = False) -> None:
    """Print a result: its ``lines`` (a list, or a method that returns one), or its plain values as one JSON
    document.
    """
    if as_json:
        click.echo(json.dumps(plain(result), ensure_ascii=False, indent=2))
        return
    lines = result.lines() if callable(result.lines) else result.lines
    for line in lines:
        click.echo(line)


def plain(value: Any) -> Any:
    """Records, paths and nested values as values that JSON can hold.

    >>> from pathlib import PurePosixPath
    >>> plain({"path": PurePosixPath("a/b"), 3: (1, None)})
    {'path': 'a/b', '3': [1, None]}
    """
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
