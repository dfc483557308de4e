"""Which parameters each training method makes trainable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.models.modules import check_rank, find_modules_to_save, linear_layers, unfreeze_weights
from mlx_distill.recipe import TrainConfig


def make_trainable(model: Any, settings: TrainConfig) -> list[str]:
    """Freeze and unfreeze a model's parameters, in place, for ``settings.method``.

    - ``lora``, ``dora``: adapters on ``target_modules``; everything else is frozen;
    - ``galore``, ``apollo``, ``apollo-mini``: the weights of ``target_modules`` themselves, which the
      optimizer projects; everything else is frozen;
    - ``full``: every weight that is not quantized.

    With the first five, all parameters of ``modules_to_save`` (embeddings, norms, head) are trainable too,
    and AdamW updates them.

    Args:
        model: As loaded.
        settings: Method, targets, ranks and seed.

    Returns:
        The paths of the trainable modules, those of ``modules_to_save`` at the end; empty for ``full``.

    Raises:
        ModelError: a name that matches nothing, or quantized weights.
        ConfigError: a rank above a dimension, or a module named twice.
    """
    lora = adapter_settings(settings)
    if lora is not None:
        return add_lora(model, lora, settings.seed)
    if settings.method == "full":
        model.unfreeze()
        for _, module in model.named_modules():
            if "scales" in module:
                module.freeze(
                    keys=[key for key in ("weight", "scales", "biases") if key in module], recurse=False
                )
        return []
    layers = linear_layers(model, settings.target_modules)
    paths = [path for path, _ in layers]
    whole = find_modules_to_save(model, settings.modules_to_save, paths)
    _check_layers(layers, settings)
    model.freeze()
    for _, module in layers:
        module.unfreeze(keys=["weight"], recurse=False)
    return paths + unfreeze_weights(whole)


def adapter_settings(settings: TrainConfig) -> LoraSettings | None:
    """The settings of the adapters; None for a method that trains the model's own weights.

    >>> adapter_settings(TrainConfig(method="lora", lora_rank=4, lora_alpha=8.0)).scale
    2.0
    """
    if settings.method not in ("lora", "dora"):
        return None
    rank, alpha, dropout = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
    targets, whole = settings.target_modules, settings.modules_to_save
    return LoraSettings(rank, alpha, dropout, targets, settings.method, settings.use_rslora, whole)


def _check_layers(layers: Sequence[tuple[str, nn.Module]], settings: TrainConfig) -> None:
    """Refuse quantized weights, and a rank above a dimension."""
    for path, module in layers:
        if module.get("weight") is None or "scales" in module:
            raise ModelError(
                f"{path}: {settings.method} trains plain weights, and these are quantized",
                fix="convert without quantize, or use method: lora, or set dequantize: true",
            )
    rank = {"galore": settings.galore_rank, "apollo": settings.apollo_rank}.get(settings.method, 1)
    check_rank(layers, rank, f"{settings.method}_rank")
