"""A model with its adapter merged in memory: what quantization is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_distill.models.checkpoint.tensor_job import Replacement
from mlx_distill.models.config_files import adapter_base, is_adapter, with_vocabulary
from mlx_distill.models.hub import resolve
from mlx_distill.models.load import load_model
from mlx_distill.models.modules import cast_model, dequantized_weight, unquantized_like
from mlx_distill.models.quantize import adapter_updates, plan_with_adapter


def load_merged(folder: str | Path, *, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
    """Load a model without its tokenizer; the adapter of an adapter folder is added to the weights.

    The sums are computed in float32 as :func:`mlx_distill.models.quantize.quantize_into` computes them.
    Quantized weights that the adapter does not change stay quantized; those that it changes become
    unquantized.

    Args:
        folder: A model folder, or an adapter folder.
        dtype: Compute in this type.

    Returns:
        The model, and its config.
    """
    folder = resolve(folder)
    if not is_adapter(folder):
        return load_model(folder, dtype=dtype)
    plan_with_adapter(folder, True)  # checks that the adapter fits
    model, config = load_model(adapter_base(folder))
    by_path, changed = dict(model.named_modules()), []
    for name, update in adapter_updates(folder).items():
        path, _, leaf = name.rpartition(".")
        module = by_path[path]
        if isinstance(update, Replacement):
            value = update.value.astype(mx.float32)
        else:
            weight = dequantized_weight(module)
            value = update.apply(weight.reshape(-1, weight.shape[-1]), 0, weight.size // weight.shape[-1])
            value = value.reshape(weight.shape)
        if leaf == "weight" and "scales" in module:
            changed.append((path, unquantized_like(module, value)))
        else:
            module[leaf] = value
    model.update_modules(tree_unflatten(changed))
    cast_model(model, dtype)
    model.eval()
    mx.eval(model.parameters())
    return model, with_vocabulary(config, folder)
