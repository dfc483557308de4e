"""Folders that this package makes: what they are keyed by, what may be replaced, and how they come into
place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.models.checkpoint.safetensors import open_checkpoint
from mlx_distill.models.config_files import ADAPTER_CONFIG, ADAPTER_FILE, adapter_base, is_adapter
from mlx_distill.storage import (
    MANIFEST,
    check_folder,
    digest,
    lock_folder,
    open_partial,
    publish,
    read_manifest,
    recover,
    scratch,
    sha256,
    stage_key,
)

FORMAT = 1


def source_key(folder: Path) -> str:
    """What a source is, without reading its weights: its config and the names, types, shapes and sizes of its
    tensors.

    An adapter is its own bytes on such a base.
    """
    if is_adapter(folder):
        return digest(
            [source_key(adapter_base(folder)), sha256(folder / ADAPTER_FILE), sha256(folder / ADAPTER_CONFIG)]
        )
    checkpoint = open_checkpoint(folder)
    tensors = {
        name: [info.dtype, list(info.shape), info.file.name, info.offset]
        for name, info in checkpoint.tensors.items()
    }
    texts = {
        p.name: sha256(p)
        for p in sorted(folder.glob("*.json")) + sorted(folder.glob("*.jinja"))
        if p.name != MANIFEST
    }
    return digest([tensors, texts])


@dataclass(frozen=True)
class StagedFolder:
    """A folder in the making: where to write, what the manifest will record, and the hashes that are known
    already.
    """

    folder: Path
    recorded: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


@contextmanager
def staged_folder(
    destination: Path, source: Path, stage: str, settings: Mapping[str, Any], parents: Mapping[str, str]
) -> Iterator[StagedFolder]:
    """Yield a partial folder, empty or as a killed run left it; it takes the destination's place when the
    block ends well.

    Raises:
        FileError: the destination is the source, a file, or a folder with other things in it; or another run
            is making it.
    """
    recover(destination)
    check_destination(destination, source)
    key = digest([stage_key(stage, FORMAT, settings, parents), str(source.resolve())])
    partial = open_partial(destination, key)
    with lock_folder(scratch(partial)):
        work = StagedFolder(partial)
        yield work
        publish(destination, stage, FORMAT, settings, parents, work.recorded, work.hashes)


def check_destination(destination: Path, source: Path) -> None:
    """Refuse to replace what this package did not make.

    Raises:
        FileError: the destination is the source, a file, or a folder with other things in it.
    """
    if destination.resolve() == source.resolve():
        raise FileError(f"{destination} is the source itself", fix="choose another destination")
    if destination.is_file():
        raise FileError(
            f"{destination}: a file stands where a folder is needed", fix="choose another destination"
        )
    if destination.is_dir() and read_manifest(destination) is None and any(destination.iterdir()):
        raise FileError(
            f"{destination} is not empty and was not made by a conversion",
            fix="choose another destination, or empty it yourself",
        )


def is_current(destination: Path, key: str) -> bool:
    """Whether a finished conversion with this key stands there, whole."""
    manifest = read_manifest(destination)
    return manifest is not None and manifest.key == key and check_folder(destination, manifest) is None
