"""Folders that this package makes: what they are keyed by, what may be replaced, and how they come into place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_distill import files
from mlx_distill.errors import FileError
from mlx_distill.files import MANIFEST, Manifest, check_folder, digest, read_manifest, sha256
from mlx_distill.models.checkpoint import open_checkpoint

FORMAT = 1


def source_key(folder: Path) -> str:
    """What a source is, without reading its weights: its config and the names, types, shapes and sizes of its tensors."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: [info.dtype, list(info.shape), info.file.name, info.offset] for name, info in checkpoint.tensors.items()}
    texts = {p.name: sha256(p) for p in sorted(folder.glob("*.json")) + sorted(folder.glob("*.jinja")) if p.name != MANIFEST}
    return digest([tensors, texts])


def check_destination(destination: Path, source: Path) -> None:
    """Refuse to replace what this package did not make.

    Raises:
        FileError: the destination is the source, a file, or a folder with other things in it.
    """
    if destination.resolve() == source.resolve():
        raise FileError(f"{destination} is the source itself", fix="choose another destination")
    if destination.is_file():
        raise FileError(f"{destination}: a file stands where a folder is needed", fix="choose another destination")
    if destination.is_dir() and read_manifest(destination) is None and any(destination.iterdir()):
        raise FileError(
            f"{destination} is not empty and was not made by a conversion", fix="choose another destination, or empty it yourself"
        )


def publish(
    destination: Path,
    stage: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    recorded: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> Manifest:
    """Write the manifest (the shards' hashes are known) and rename the partial folder into place."""
    return files.publish(destination, stage, FORMAT, config, parents, recorded, hashes)


def is_current(destination: Path, key: str) -> bool:
    """Whether a finished conversion with this key stands there, whole."""
    manifest = read_manifest(destination)
    return manifest is not None and manifest.key == key and check_folder(destination, manifest) is None
