"""Model folders that conversions, quantization and exports write: their keys, and how they are published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.models.checkpoint.safetensors import open_checkpoint
from mlx_distill.models.config_files import ADAPTER_CONFIG, ADAPTER_FILE, adapter_base, is_adapter
from mlx_distill.models.trained_on import TRAINED_ON
from mlx_distill.storage import (
    MANIFEST,
    check_folder,
    check_replaceable,
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

FORMAT = 3  # raised when a conversion of the same source writes other files
_FORMAT_WITHOUT_SCALES = 2  # of conversions in which no scale of a 4-bit float is chosen
LABEL_TEMPERATURE = "label_temperature.json"  # what calibrates a model's label probabilities, beside it
STAGES = ("convert", "quantize", "export", "import")  # that write model folders outside of runs


def conversion_format(quantize: str | None) -> int:
    """The format of what a conversion writes with a quantization mode, or without.

    >>> conversion_format("mixed-nvfp4") > conversion_format("affine4") == conversion_format(None)
    True
    """
    chooses_scales = quantize is not None and quantize.endswith(("mxfp4", "nvfp4"))
    return FORMAT if chooses_scales else _FORMAT_WITHOUT_SCALES


def source_key(folder: Path) -> str:
    """A hash of a model folder: of its JSON files and the names, types, shapes and places of its tensors.

    Weights are not read. The key of an adapter folder is the hash of its files and of the key of its base.
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
        if p.name not in (MANIFEST, TRAINED_ON, LABEL_TEMPERATURE, "artifact.json")
    }
    return digest([tensors, texts])


@dataclass(frozen=True)
class StagedFolder:
    """A folder that is being written, with what its manifest will record and the known file hashes."""

    folder: Path
    recorded: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


@contextmanager
def staged_folder(
    destination: Path,
    source: Path,
    stage: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    format: int = FORMAT,
) -> Iterator[StagedFolder]:
    """Yield a partial folder, empty or as a killed run left it, and publish it when the block ends without
    error.

    Raises:
        FileError: the destination is the source, a file, or a folder with other contents, or another process
            is writing it.
    """
    recover(destination)
    check_destination(destination, source)
    key = digest([stage_key(stage, format, settings, parents), str(source.resolve())])
    partial = open_partial(destination, key)
    with lock_folder(scratch(partial)):
        staged = StagedFolder(partial)
        yield staged
        publish(destination, stage, format, settings, parents, staged.recorded, staged.hashes)


def check_destination(destination: Path, source: Path) -> None:
    """Raise if the destination would replace anything that no conversion has written.

    Raises:
        FileError: the destination is the source, no folder, a run's stage, or a folder with other contents.
    """
    if destination.resolve() == source.resolve():
        raise FileError(f"{destination} is the source itself", fix="choose another destination")
    check_replaceable(destination)
    manifest = read_manifest(destination)
    if manifest is not None and manifest.stage not in STAGES:
        raise FileError(
            f"{destination}: the stage {manifest.stage!r} of a run, not written by a conversion",
            fix="choose another folder for the result",
        )


def is_current(destination: Path, key: str) -> bool:
    """Whether the destination is a complete conversion with this key."""
    manifest = read_manifest(destination)
    return manifest is not None and manifest.key == key and check_folder(destination, manifest) is None
