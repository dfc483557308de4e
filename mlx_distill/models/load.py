"""Loading a model from the Hub, a Hugging Face folder, an MLX folder or an adapter folder; saving one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import load_adapter
from mlx_distill.models.architectures.registry import build_model
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.tensor_job import to_mlx
from mlx_distill.models.checkpoint.writer import (
    MAX_SHARD_BYTES,
    shard_name,
    split_into_shards,
    write_index,
)
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    adapter_base,
    is_adapter,
    load_config,
    read_object,
    tokenizer_folder,
    with_vocabulary,
)
from mlx_distill.models.forward import is_tied
from mlx_distill.models.hub import copy_tokenizer, has_tokenizer, resolve
from mlx_distill.models.modules import cast_model
from mlx_distill.models.quantization import with_quantization
from mlx_distill.models.tokenizer_fields import check_tokenizer_config, settle_tokenizer
from mlx_distill.storage import atomic_path, read_manifest, write_json
from mlx_distill.thinking import read_thinking, set_thinking


def load(
    path_or_repo: str | Path, revision: str | None = None, *, dtype: str | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer; the model computes what transformers computes.

    Args:
        path_or_repo: A Hub id (``org/name``), a folder in the Hugging Face or the MLX layout, or an adapter
            folder.
        revision: Commit, tag or branch of a Hub model.
        dtype: Compute in this type (``float32``, ``bfloat16``, ``float16``); None keeps the type of each
            tensor.

    Returns:
        mlx-lm's model, in evaluation mode, and its ``TokenizerWrapper``.

    Raises:
        ModelError: remote code, pickles, an unknown ``model_type``, damaged shards, or tensors that are
            missing, unknown or of another shape: with file and tensor.
    """
    folder = resolve(path_or_repo, revision)
    model, config = load_model(folder, dtype=dtype)
    return model, load_tokenizer(folder, config)


def load_model(folder: str | Path, *, dtype: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Load a model without its tokenizer.

    What a user has to know of how a checkpoint was read is a ``UserWarning``.

    Returns:
        The model, and its config; of an adapter folder that of the base model.
    """
    folder = resolve(folder)
    if is_adapter(folder):
        model, config = load_model(adapter_base(folder), dtype=dtype)
        load_adapter(model, folder)
        config = with_vocabulary(config, folder)
    else:
        plan = plan_checkpoint(folder)
        if read_manifest(folder) is None:  # else the conversion that wrote the folder has said it
            for note in plan.notes:
                warnings.warn(note, stacklevel=2)
        model, config = _load_weights(plan), plan.config
    if dtype is not None:
        cast_model(model, dtype)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def load_tokenizer(path: str | Path, config: Mapping[str, Any] | None = None) -> Any:
    """mlx-lm's ``TokenizerWrapper`` of a folder, with its chat template and without remote code; its prompts
    leave thinking to the model where the folder says so (:mod:`mlx_distill.thinking`).

    Of an adapter folder without a tokenizer it is that of its base model. A field of its files that changes
    the result elsewhere and not here is a ``UserWarning``.

    Raises:
        ModelError: no tokenizer, a damaged one, one that needs remote code, or one with an added token that
            is not read under its own number.
    """
    folder = Path(path)
    if config is None:
        has_config = (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()
        config = load_config(folder) if has_config else {}
    folder = tokenizer_folder(folder)
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder}: no tokenizer.json", fix="copy the tokenizer files from the original checkpoint"
        )
    check_tokenizer_config(folder)
    from mlx_lm.tokenizer_utils import load as load_wrapper

    try:
        tokenizer = load_wrapper(
            folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
        )
    except Exception as error:  # the parsers of transformers raise many types
        raise ModelError(
            f"{folder}: the tokenizer cannot be read: {error}",
            fix="copy the tokenizer files from the original checkpoint",
        ) from error
    for note in settle_tokenizer(folder, tokenizer, config.get("vocab_size")):
        warnings.warn(note, stacklevel=2)
    set_thinking(tokenizer, read_thinking(folder))
    return tokenizer


def empty_model(folder: str | Path) -> Any:
    """The model of a folder without its weights, with the modules, shapes and quantization of the loaded one.

    It reads config.json and the headers of the shards. Its arrays are random and never computed, so it needs
    no memory.
    """
    return _build(plan_checkpoint(Path(folder)))


def _build(plan: CheckpointPlan) -> Any:
    model = build_model(plan.config, str(plan.folder / "config.json"))
    if plan.quantization:

        def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return plan.quantization[path].config if path in plan.quantization else False

        nn.quantize(model, class_predicate=settings)
    return model


def _load_weights(plan: CheckpointPlan) -> Any:
    model = _build(plan)
    model.load_weights([(p.name, to_mlx(p)) for p in plan.tensors])
    return model


def save_model(
    model: Any, base: str | Path, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write every weight in its type in memory, with the config and the tokenizer of ``base``.

    Modules that are quantized in ``base``, were dequantized to compute with, and were not trained are written
    quantized as in ``base``, bit for bit.

    Args:
        model: mlx-lm's model, as loaded from ``base``.
        base: The MLX folder that it was loaded from.
        folder: Where to write; :func:`load` reads it.
        max_shard_bytes: Largest file.
    """
    base, folder = Path(base), Path(folder)
    config = read_object(base / "config.json")
    quantized = _untrained_quantized(model, base) if "quantization" in config else {}
    arrays = [
        (name, value)
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[0] not in quantized
    ]
    for path, module in quantized.items():
        arrays += [(f"{path}.{name}", value) for name, value in tree_flatten(module.parameters())]
    shards = split_into_shards(arrays, lambda item: int(item[1].nbytes), max_shard_bytes)
    for number, shard in enumerate(shards, 1):
        with atomic_path(folder / shard_name(number, len(shards))) as file:
            mx.save_safetensors(str(file), dict(shard), metadata={"format": "mlx"})
    write_index(folder, [{name: value.nbytes for name, value in shard} for shard in shards])
    types = {
        str(value.dtype).removeprefix("mlx.core.")
        for _, value in arrays
        if mx.issubdtype(value.dtype, mx.floating)
    }
    if len(types) == 1:
        config |= {key: next(iter(types)) for key in ("dtype", "torch_dtype") if key in config}
    modules = dict(model.named_modules()) | quantized
    settings = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in modules.items()
        if "scales" in module
    }
    if "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = is_tied(model)
    write_json(folder / "config.json", with_quantization(config, settings))
    copy_tokenizer(base, folder, others=True)


def _untrained_quantized(model: Any, base: Path) -> dict[str, Any]:
    """The modules of ``base`` that are quantized, and in ``model`` unquantized and not trainable."""
    current = dict(model.named_modules())
    return {
        path: module
        for path, module in load_model(base)[0].named_modules()
        if "scales" in module
        and "scales" not in current[path]
        and not tree_flatten(current[path].trainable_parameters())
    }
