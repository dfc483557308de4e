"""Load a model: from the Hub, a Hugging Face folder, a folder of ours, or an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import build_model
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import INDEX
from mlx_distill.models.checkpoint.tensor_job import to_mlx
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES
from mlx_distill.models.config_files import ADAPTER_CONFIG, is_adapter, load_config, read_object
from mlx_distill.models.hub import copy_tokenizer, resolve
from mlx_distill.models.modules import cast_model
from mlx_distill.models.quantization import with_quantization
from mlx_distill.storage import atomic_path, write_json


def load(
    path_or_repo: str | Path, revision: str | None = None, *, dtype: str | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, numerically equal to the original.

    Args:
        path_or_repo: A Hub id (``org/name``), a folder in the Hugging Face layout or ours, or an adapter
            folder.
        revision: Commit, tag or branch of a Hub model.
        dtype: Compute in this type (``float32``, ``bfloat16``, ``float16``); None keeps each tensor's own.

    Returns:
        mlx-lm's model, in evaluation mode, and its ``TokenizerWrapper``.

    Raises:
        ModelError: remote code, pickles, an unknown ``model_type``, damaged shards, missing, extra or
            misshapen tensors: with file, tensor and cure.
    """
    folder = resolve(path_or_repo, revision)
    model, config = load_model(folder, dtype=dtype)
    return model, load_tokenizer(folder, config)


def load_model(folder: str | Path, *, dtype: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The model alone, and the config of its base."""
    folder = resolve(folder)
    if is_adapter(folder):
        from mlx_distill.models.adapters import load_adapter
        from mlx_distill.models.config_files import adapter_base

        model, config = load_model(adapter_base(folder), dtype=dtype)
        load_adapter(model, folder)
    else:
        plan = plan_checkpoint(folder)
        model, config = _load_weights(plan), plan.config
    if dtype is not None:
        cast_model(model, dtype)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def load_tokenizer(path: str | Path, config: Mapping[str, Any] | None = None) -> Any:
    """mlx-lm's ``TokenizerWrapper`` of a folder, with ``chat_template.jinja`` where there is one; never
    remote code.

    Raises:
        ModelError: no tokenizer, or a damaged one.
    """
    folder = Path(path)
    if config is None:
        has_config = (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()
        config = load_config(folder) if has_config else {}
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{folder}: no tokenizer.json", fix="copy the tokenizer's files from the original checkpoint"
        )
    if (folder / "tokenizer_config.json").is_file() and read_object(folder / "tokenizer_config.json").get(
        "auto_map"
    ):
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: auto_map asks to run code that comes with the checkpoint",
            fix="remote code is never run; use a checkpoint without it",
        )
    from mlx_lm.tokenizer_utils import load as load_wrapper

    try:
        return load_wrapper(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ModelError(
            f"{folder}: the tokenizer cannot be read: {error}",
            fix="copy the tokenizer's files from the original checkpoint",
        ) from error


def empty_model(folder: str | Path) -> Any:
    """The model of a folder without its weights: modules, names, shapes and packings, from config.json and
    the shards' headers.

    Its arrays are random and never computed, so it costs no memory; what can be asked of a model's form can
    be asked of it.
    """
    return _build(plan_checkpoint(Path(folder)))


def _build(plan: CheckpointPlan) -> Any:
    model = build_model(plan.config, str(plan.folder / "config.json"))
    if plan.quantization:
        nn.quantize(
            model,
            class_predicate=lambda path, module: (
                plan.quantization[path].config if path in plan.quantization else False
            ),
        )
    return model


def _load_weights(plan: CheckpointPlan) -> Any:
    model = _build(plan)
    model.load_weights([(p.name, to_mlx(p)) for p in plan.tensors])
    return model


def save_model(
    model: Any, base: str | Path, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write every weight in the type that it has in memory, with the config and tokenizer of ``base``.

    What ``base`` has packed, and was unpacked to compute with but did not train, is written as it stands
    there, bit for bit.

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
    modules = dict(model.named_modules()) | (
        kept := _untouched(model, base) if "quantization" in config else {}
    )
    flat = [
        (name, value)
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[0] not in kept
    ]
    flat += [
        (f"{path}.{name}", value)
        for path, module in kept.items()
        for name, value in tree_flatten(module.parameters())
    ]
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

    here = dict(model.named_modules())
    return {
        path: module
        for path, module in load_model(base)[0].named_modules()
        if "scales" in module
        and "scales" not in here[path]
        and not tree_flatten(here[path].trainable_parameters())
    }
