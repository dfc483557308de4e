"""Load a model: from the Hub, a Hugging Face folder, a folder of ours, or an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.errors import ModelError
from mlx_distill.files import os_errors
from mlx_distill.models.checkpoint import Checkpoint, open_checkpoint
from mlx_distill.models.hub import resolve
from mlx_distill.models.registry import architecture_of, build_model
from mlx_distill.models.rules import Planned, forward_plan, source_name

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
ADAPTER_CONFIG = "adapter_config.json"
_MLX = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
}  # fmt: skip


def load(path_or_repo: str | Path, revision: str | None = None, *, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer, numerically equal to the original.

    Args:
        path_or_repo: A Hub id (``org/name``), a folder in the Hugging Face layout or ours, or an adapter folder.
        revision: Commit, tag or branch of a Hub model.
        dtype: Compute in this type (``float32``, ``bfloat16``, ``float16``); None keeps each tensor's own.

    Returns:
        mlx-lm's model, in evaluation mode, and its ``TokenizerWrapper``.

    Raises:
        ModelError: remote code, pickles, an unknown ``model_type``, damaged shards, missing, extra or misshapen tensors: with file,
            tensor and cure.
    """
    folder = resolve(path_or_repo, revision)
    model, config = load_model(folder, dtype=dtype)
    return model, load_tokenizer(folder, config)


def load_model(folder: str | Path, *, dtype: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The model alone, and the config of its base."""
    folder = resolve(folder)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        from mlx_distill.models.adapters import adapter_base, load_adapter

        model, config = load_model(adapter_base(folder))
        load_adapter(model, folder)
    else:
        config = load_config(folder)
        model = _load_weights(open_checkpoint(folder), config)
    if dtype is not None:
        cast(model, dtype)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def load_config(path: str | Path) -> dict[str, Any]:
    """config.json of a folder, with the end-of-text tokens of generation_config.json; an adapter folder gives its base's.

    Raises:
        ModelError: missing, not JSON, asks for remote code, or of an unknown ``model_type``.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        from mlx_distill.models.adapters import adapter_base

        return load_config(adapter_base(folder))
    config = read_object(folder / "config.json")
    architecture_of(config, str(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        stop = read_object(folder / "generation_config.json").get("eos_token_id")
        if stop is not None:
            config["eos_token_id"] = stop
    return config


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; what is wrong with it is a :class:`ModelError`."""
    if not path.is_file():
        raise ModelError(f"{path} is missing", fix="give a folder that holds a whole checkpoint")
    with os_errors():
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}", fix="download or copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", fix="download or copy the checkpoint again")
    return value


def load_tokenizer(path: str | Path, config: Mapping[str, Any] | None = None) -> Any:
    """mlx-lm's ``TokenizerWrapper`` of a folder, with ``chat_template.jinja`` where there is one; never remote code.

    Raises:
        ModelError: no tokenizer, or a damaged one.
    """
    folder = Path(path)
    if config is None:
        has_config = (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()
        config = load_config(folder) if has_config else {}
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder}: no tokenizer.json", fix="copy the tokenizer's files from the original checkpoint")
    if (folder / "tokenizer_config.json").is_file() and read_object(folder / "tokenizer_config.json").get("auto_map"):
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: auto_map asks to run code that comes with the checkpoint",
            fix="remote code is never run; use a checkpoint without it",
        )
    from mlx_lm.tokenizer_utils import load as load_wrapper

    try:
        return load_wrapper(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ModelError(
            f"{folder}: the tokenizer cannot be read: {error}", fix="copy the tokenizer's files from the original checkpoint"
        ) from error


def _load_weights(checkpoint: Checkpoint, config: dict[str, Any]) -> Any:
    where = str(checkpoint.folder / "config.json")
    architecture = architecture_of(config, where)
    model = build_model(config, where)
    planned, _ = forward_plan(architecture, checkpoint.tensors, config)
    prepare_quantized(model, config, {p.name: p for p in planned})
    check_tensors(checkpoint, config, model, planned)
    model.load_weights([(p.name, to_mlx(p)) for p in planned])
    return model


def to_mlx(plan: Planned) -> mx.array:
    """A planned tensor as an array, bit for bit."""
    if plan.dtype not in _MLX:
        raise ModelError(
            f"{plan.where} has the type {plan.dtype}, which MLX lacks", fix="convert it with a tool that knows this type first"
        )
    return from_raw(plan.read(0, plan.rows), plan.dtype).reshape(plan.shape)


def from_raw(block: np.ndarray, dtype: str) -> mx.array:
    """Raw bits ``[n, c]`` of a safetensors type as an MLX array of that type."""
    return mx.array(block).view(_MLX[dtype])


def prepare_quantized(model: Any, config: Mapping[str, Any], planned: Mapping[str, Planned]) -> None:
    """Replace the modules whose weights are packed by quantized ones (lazily; nothing is computed)."""
    settings = config.get("quantization") or {}
    if not any(name.endswith(".scales") for name in planned):
        return

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in planned or f"{path}.weight" not in planned:
            return False
        given = settings.get(path)
        return dict(given) if isinstance(given, dict) else packing(planned, path, module.weight.shape[-1])

    nn.quantize(model, class_predicate=predicate)


def packing(planned: Mapping[str, Planned], path: str, columns: int) -> dict[str, Any]:
    """``{group_size, bits, mode}`` of packed weights, from their shapes and types; ``columns`` is the width of the plain weight."""
    weight, scales = planned[f"{path}.weight"], planned[f"{path}.scales"]
    bits, group_size = weight.shape[-1] * 32 // columns, columns // max(scales.shape[-1], 1)
    if scales.dtype != "U8":
        return {"group_size": group_size, "bits": bits, "mode": "affine"}
    modes = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
    if (bits, group_size) not in modes:
        raise ModelError(
            f"{weight.where}: {bits} bits in groups of {group_size} are no known quantization", fix="convert the checkpoint again"
        )
    return {"group_size": group_size, "bits": bits, "mode": modes[bits, group_size]}


def check_tensors(checkpoint: Checkpoint, config: Mapping[str, Any], model: Any, planned: list[Planned]) -> None:
    """Every parameter of the model is there, in its shape, and nothing else is."""
    expected = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
    found = {p.name: p for p in planned}
    architecture = architecture_of(config)
    for name, shape in expected.items():
        if name not in found:
            missing = source_name(architecture, name, checkpoint.tensors)
            raise ModelError(
                f"{checkpoint.folder}: tensor {missing!r} is missing", fix="download the checkpoint again, or correct config.json"
            )
        if found[name].shape != shape:
            raise ModelError(
                f"{found[name].where} gives {name} the shape {list(found[name].shape)}; config.json says {list(shape)}",
                fix="check that config and weights belong together",
            )
    for name, plan in found.items():
        if name not in expected:
            raise ModelError(
                f"{plan.where} is not part of a {architecture.model_type} with this config", fix="correct config.json, or remove the tensor"
            )


def cast(model: Any, dtype: str | mx.Dtype) -> Any:
    """Cast the floating-point parameters (scales and biases of affine weights among them), in place; packed weights and adapters stay.

    Returns the model. bfloat16 to float32 is exact. On the CPU backend bfloat16 is slow, and dense experts run in float32 only.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown type {dtype!r}", fix=f"one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    model.update(tree_map_with_path(lambda path, x: x.astype(dtype) if _casts(path, x) else x, model.parameters()))
    return model


def _casts(path: str, x: mx.array) -> bool:
    return bool(mx.issubdtype(x.dtype, mx.floating)) and not path.endswith((".lora_a", ".lora_b"))


def hidden_states(model: Any, inputs: Int[mx.array, "b l"], cache: Any = None) -> Float[mx.array, "b l d"]:
    """The trunk: embeddings to the final norm. ``project(head(model), hidden_states(model, x))`` are the logits."""
    return model.model(inputs, cache)


def head(model: Any) -> Any:
    """The head: the linear layer, or the embedding that it is tied to."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def project(head: Any, hidden: Float[mx.array, "*b d"]) -> Float[mx.array, "*b v"]:
    """Logits over the head's columns (which may be more than the tokenizer's tokens)."""
    return head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
