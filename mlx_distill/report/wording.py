"""What only the page says: classes of its style, names of curves, fields of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.text import MODELS, NONE, words

_SERIES = {"loss": "loss", "valid_loss": "validation"}


def model_class(name: str) -> str:
    """The CSS class with a model's colour."""
    return f"m-{name.replace('_', '-')}" if name in MODELS else "m-control"


def series_name(name: str) -> str:
    """A curve's name in a legend."""
    return _SERIES.get(name, words(name))


def text_of(value: Any) -> str:
    """A field of an answer in a table cell.

    >>> text_of(["a", "b"]), text_of(None), text_of(True), text_of([])
    ('a, b', '–', 'true', 'none')
    """
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value)) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {text_of(item)}" for key, item in value.items()) or "none"
    return str(value)


def beginning(text: str, most: int = 90) -> str:
    """The first words of a text, on one line.

    >>> beginning("One line,\\nand another one.", 20), beginning("short"), beginning("x" * 12, 10)
    ('One line, and…', 'short', 'xxxxxxxxxx…')
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    cut = line[: most + 1]
    return (cut.rsplit(" ", 1)[0] if " " in cut else cut[:most]) + "…"
