"""Load a model: from the Hub, a Hugging Face folder, a folder of ours, or an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import build_model
from mlx_distill.models.arrays import to_mlx
from mlx_distill.models.checkpoint.plan import Prepared, prepare
from mlx_distill.models.config_files import ADAPTER_CONFIG, is_adapter, load_config, read_object
from mlx_distill.models.hub import resolve
from mlx_distill.models.plain import dequantized, plain_like

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


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
    if is_adapter(folder):
        from mlx_distill.models.adapters import adapter_base, load_adapter

        model, config = load_model(adapter_base(folder), dtype=dtype)
        load_adapter(model, folder)
    else:
        ready = prepare(folder)
        model, config = _load_weights(ready), ready.config
    if dtype is not None:
        cast(model, dtype)
    model.eval()
    mx.eval(model.parameters())
    return model, config


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


def skeleton(folder: str | Path) -> Any:
    """The model of a folder without its weights: modules, names, shapes and packings, from config.json and the shards' headers.

    Its arrays are random and never computed, so it costs no memory; what can be asked of a model's form can be asked of it.
    """
    return _build(prepare(Path(folder)))


def _build(ready: Prepared) -> Any:
    model = build_model(ready.config, str(ready.folder / "config.json"))
    if ready.packings:
        nn.quantize(model, class_predicate=lambda path, module: ready.packings[path].config if path in ready.packings else False)
    return model


def _load_weights(ready: Prepared) -> Any:
    model = _build(ready)
    model.load_weights([(p.name, to_mlx(p)) for p in ready.planned])
    return model


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
    return bool(mx.issubdtype(x.dtype, mx.floating)) and not path.endswith((".lora_a", ".lora_b", ".m"))


def unpack(model: Any, dtype: str | mx.Dtype = mx.float32) -> list[str]:
    """Replace packed weights (linear layers, embeddings, stacks of experts) by plain ones of the same value, in place; return the paths.

    More memory, the same numbers to rounding: for a backend whose packed products are slow (the CPU's, twice as slow in training a tiny
    gpt-oss), and for weights that are to move. What is saved afterwards is still only what was trained.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    plain = [
        (path, plain_like(module, dequantized(module).astype(kind)))
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear)
    ]
    model.update_modules(tree_unflatten(plain))
    return [path for path, _ in plain]


def hidden_states(model: Any, inputs: Int[mx.array, "b l"], cache: Any = None) -> Float[mx.array, "b l d"]:
    """The trunk: embeddings to the final norm. ``project(head(model), hidden_states(model, x))`` are the logits."""
    return model.model(inputs, cache)


def head(model: Any) -> Any:
    """The head: the linear layer, or the embedding that it is tied to."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def project(head: Any, hidden: Float[mx.array, "*b d"]) -> Float[mx.array, "*b v"]:
    """Logits over the head's columns (which may be more than the tokenizer's tokens)."""
    return head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
