"""The golden checkpoints, and tools to damage copies of them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Folder of a golden checkpoint."""
    return lambda name: GOLDEN / f"models_{name}"


@pytest.fixture(scope="session")
def logits() -> Callable[[str], tuple[Any, Any]]:
    """Prompt ``[2, 48]`` and transformers' float32 logits of a golden checkpoint."""
    import mlx.core as mx

    arrays = mx.load(str(GOLDEN / "models_logits.safetensors"))
    return lambda name: (arrays[f"{name}.prompt"], arrays[f"{name}.logits"])


@pytest.fixture
def copy(golden: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden checkpoint that a test may damage."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(golden(name), tmp_path / f"copy_{name}"))

    return make


@pytest.fixture(scope="session")
def tools() -> Any:
    """See :class:`Tools`."""
    return Tools


class Tools:
    """Reading and rewriting of safetensors with nothing of the package in it."""

    @staticmethod
    def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
        """Name -> (type, shape, bytes)."""
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        base = 8 + length
        return {
            n: (e["dtype"], e["shape"], raw[base + e["data_offsets"][0] : base + e["data_offsets"][1]])
            for n, e in header.items()
        }

    @staticmethod
    def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        """The reverse."""
        header, offset = {}, 0
        for name, (dtype, shape, data) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        text = json.dumps(header).encode()
        path.write_bytes(
            struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())
        )

    @staticmethod
    def all(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
        """All tensors of a folder."""
        return {
            name: value
            for path in sorted(folder.glob("model*.safetensors"))
            for name, value in Tools.read(path).items()
        }

    @staticmethod
    def file_of(folder: Path, name: str) -> Path:
        """The shard that holds a tensor."""
        return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]

    @staticmethod
    def edit(folder: Path, name: str, change: Callable[[Any], Any], *, index: bool = True) -> Path:
        """Replace, or with None remove, one tensor, in its shard and (with ``index``) in the index."""
        path = Tools.file_of(folder, name)
        tensors = Tools.read(path)
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value
        Tools.write(path, tensors)
        where = folder / "model.safetensors.index.json"
        if index and value is None:
            raw = json.loads(where.read_text())
            del raw["weight_map"][name]
            where.write_text(json.dumps(raw))
        return path

    @staticmethod
    def config(folder: Path, **changes: Any) -> None:
        """Change keys of config.json; None removes one."""
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))

    @staticmethod
    def bits(folder: Path) -> dict[str, bytes]:
        """Every file of a folder that a conversion must reproduce, the manifest apart."""
        return {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "manifest.json"
        }

    @staticmethod
    def bf16(values: np.ndarray) -> bytes:
        """Float32 numbers, exact in bfloat16, as its bytes."""
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
