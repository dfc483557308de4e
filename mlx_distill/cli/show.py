"""Results on standard output: for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import click


def echo_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(plain(value), ensure_ascii=False, indent=2))


def plain(value: Any) -> Any:
    """What JSON can hold, of records, paths and nested values.

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


def echo_result(result: Any) -> None:
    """The lines of a result: its own ``lines``, or its text."""
    lines = getattr(result, "lines", None)
    for line in lines() if callable(lines) else lines if lines is not None else [str(result)]:
        click.echo(line)
