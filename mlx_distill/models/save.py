"""A whole model in memory to a folder of ours: what full fine-tuning and low-rank projection leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.models.checkpoint.safetensors import INDEX
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES
from mlx_distill.models.config_files import read_object
from mlx_distill.models.output import with_quantization
from mlx_distill.models.tokenizer_files import copy_tokenizer
from mlx_distill.storage import atomic_path, write_json


def save_model(model: Any, base: str | Path, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write every weight in the type that it has in memory, with the config and tokenizer of ``base``.

    What ``base`` has packed, and was unpacked to compute with but did not train, is written as it stands there, bit for bit.

    Args:
        model: mlx-lm's model, as loaded from ``base``.
        base: The folder of ours that it was loaded from.
        folder: Where to write; ``load`` reads it.
        max_shard_bytes: Largest file.
    """
    base, folder = Path(base), Path(folder)
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    config = read_object(base / "config.json")
    modules = dict(model.named_modules()) | (kept := _untouched(model, base) if "quantization" in config else {})
    flat = [(name, value) for name, value in tree_flatten(model.parameters()) if name.rpartition(".")[0] not in kept]
    flat += [(f"{path}.{name}", value) for path, module in kept.items() for name, value in tree_flatten(module.parameters())]
    for name, value in flat:
        if size and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with atomic_path(folder / file) as path:
            mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
        where |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    types = {
        str(value.dtype).removeprefix("mlx.core.")
        for shard in shards
        for value in shard.values()
        if mx.issubdtype(value.dtype, mx.floating)
    }
    if len(types) == 1:
        config |= {key: next(iter(types)) for key in ("dtype", "torch_dtype") if key in config}
    packed = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in modules.items()
        if "scales" in module
    }
    write_json(folder / "config.json", with_quantization(config, packed))
    copy_tokenizer(base, folder, others=True)


def _untouched(model: Any, base: Path) -> dict[str, Any]:
    """The modules of ``base`` that are packed there and plain here, and of which nothing trains."""
    from mlx_distill.models.load import load_model

    here = dict(model.named_modules())
    return {
        path: module
        for path, module in load_model(base)[0].named_modules()
        if "scales" in module and "scales" not in here[path] and not tree_flatten(here[path].trainable_parameters())
    }
