"""General text: paragraphs that are not of the task, on which it is measured what a model has forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.config import ASSETS
from mlx_distill.errors import DataError
from mlx_distill.storage import os_errors, read_jsonl

PACKAGED = ASSETS / "general_text" / "general.txt"
"""Written for this project."""
MAX_BYTES = 100_000
"""Of the paragraphs that are measured; those behind are left out."""
MAX_PARAGRAPH = 1000
"""Characters; a longer paragraph is several."""
MIN_PARAGRAPHS = 10
"""Fewer give no interval worth the name."""


@dataclass(frozen=True)
class GeneralText:
    """The paragraphs of a file.

    Args:
        name: Of the file.
        paragraphs: In their order.
        left_out: Paragraphs behind the first :data:`MAX_BYTES`.
    """

    name: str
    paragraphs: tuple[str, ...]
    left_out: int = 0

    @property
    def bytes(self) -> int:
        """Of all paragraphs."""
        return sum(len(text.encode()) for text in self.paragraphs)


def read_general_text(path: str | Path) -> GeneralText:
    """The paragraphs of a text file, which empty lines separate; of a ``.jsonl`` file those of each line's
    ``text``.

    Raises:
        DataError: fewer than :data:`MIN_PARAGRAPHS` paragraphs, a line without a text, or text that is not
            UTF-8.
        FileError: the file cannot be read.

    >>> read_general_text(PACKAGED).paragraphs[0][:34]
    'The ferry leaves the island at sev'
    """
    path = Path(path)
    kept, left_out, size = list[str](), 0, 0
    for text in _texts(path):
        for paragraph in re.split(r"\n[ \t\r]*\n", text):
            for part in _parts(paragraph.strip()):
                size += len(part.encode())
                if size > MAX_BYTES:
                    left_out += 1
                else:
                    kept.append(part)
    if len(kept) < MIN_PARAGRAPHS:
        raise DataError(
            f"{path}: {len(kept)} paragraphs of general text, and {MIN_PARAGRAPHS} are needed",
            fix="separate paragraphs by empty lines, use a longer text, or leave evaluate.general_text out",
        )
    return GeneralText(path.name, tuple(kept), left_out)


def _texts(path: Path) -> Iterator[str]:
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in read_jsonl(path):
            yield _text_of(line, f"{path}:{number}")
        return
    try:
        with os_errors():
            yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}", fix="save the text as UTF-8") from error


def _text_of(line: Mapping[str, Any], where: str) -> str:
    if not isinstance(text := line.get("text"), str):
        raise DataError(f"{where}: no text", fix='give objects with a "text"')
    return text


def _parts(paragraph: str) -> Iterator[str]:
    """A paragraph in pieces of at most :data:`MAX_PARAGRAPH` characters, cut behind a space where there is
    one.
    """
    while len(paragraph) > MAX_PARAGRAPH:
        cut = paragraph.rfind(" ", MAX_PARAGRAPH // 2, MAX_PARAGRAPH) + 1 or MAX_PARAGRAPH
        yield paragraph[:cut]
        paragraph = paragraph[cut:]
    if paragraph:
        yield paragraph
