"""The code blocks of a page of the documentation, which its test runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"


class Block(NamedTuple):
    """A code block: its language, the name of its file or an empty text, and what stands in it."""

    language: str
    name: str
    text: str


def code_blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [Block(*parts) for parts in re.findall(r"^```(\w+) ?([\w.-]*)\n(.*?)^```$", text, re.M | re.S)]


def write_files(blocks: Iterable[Block], folder: Path) -> None:
    """Write the blocks that are files into a folder."""
    for _, name, text in blocks:
        if name:
            (folder / name).write_text(text, encoding="utf-8")
