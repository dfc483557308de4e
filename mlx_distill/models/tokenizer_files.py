"""The files beside the weights that make a folder usable: tokenizer, template, generation settings. Never code."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_distill.storage import atomic_path, os_errors

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")


def copy_tokenizer(source: Path, destination: Path, *, others: bool = False) -> list[str]:
    """Copy what is there, each whole or not at all; return the names. ``others``: generation settings and licence too."""
    names = [name for name in (*TOKENIZER_FILES, *(OTHER_FILES if others else ())) if (source / name).is_file()]
    folder = source / "additional_chat_templates"
    if folder.is_dir():
        names += [f"{folder.name}/{p.name}" for p in sorted(folder.glob("*.jinja"))]
    for name in names:
        with os_errors():
            if (destination / name).is_file() and (destination / name).read_bytes() == (source / name).read_bytes():
                continue
        with atomic_path(destination / name) as path:
            shutil.copyfile(source / name, path)
    return names
