"""Which weights move: what each method of training leaves unfrozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.models.modules import check_rank, find_modules_to_save, linear_layers, unfreeze_weights
from mlx_distill.recipe import TrainConfig


def make_trainable(model: Any, settings: TrainConfig) -> list[str]:
    """Freeze and unfreeze a model, in place, for ``settings.method``.

    - ``lora``, ``dora``: adapters on ``target_modules``, all else frozen;
    - ``galore``, ``apollo``, ``apollo-mini``: the weights of ``target_modules`` themselves, which the
      optimizer projects; all else frozen;
    - ``full``: every plain weight; packed ones cannot move.

    With the first five, ``modules_to_save`` (embeddings, norms, head) move whole beside, by AdamW.

    Args:
        model: As loaded.
        settings: Method, targets, ranks and seed.

    Returns:
        The paths of the modules that move, those that move whole at the end; empty for ``full``.

    Raises:
        ModelError: a name that matches nothing, or packed weights.
        ConfigError: a rank above a dimension, or a module named twice.
    """
    lora = adapter_of(settings)
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
    found = linear_layers(model, settings.target_modules)
    paths = [path for path, _ in found]
    whole = find_modules_to_save(model, settings.modules_to_save, paths)
    _check_plain(found, settings)
    model.freeze()
    for _, module in found:
        module.unfreeze(keys=["weight"], recurse=False)
    return paths + unfreeze_weights(whole)


def adapter_of(settings: TrainConfig) -> LoraSettings | None:
    """What ``settings`` say of the adapters; None where weights of the model itself move.

    >>> adapter_of(TrainConfig(method="lora", lora_rank=4, lora_alpha=8.0)).scale, adapter_of(TrainConfig(method="full"))
    (2.0, None)
    """
    if settings.method not in ("lora", "dora"):
        return None
    rank, alpha, dropout = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
    targets, whole = settings.target_modules, settings.modules_to_save
    return LoraSettings(rank, alpha, dropout, targets, settings.method, settings.use_rslora, whole)


def _check_plain(found: Sequence[tuple[str, nn.Module]], settings: TrainConfig) -> None:
    for path, module in found:
        if module.get("weight") is None or "scales" in module:
            raise ModelError(
                f"{path}: {settings.method} moves plain weights, and these are packed",
                fix="convert without quantize, or use method: lora, or set dequantize: true",
            )
    rank = {"galore": settings.galore_rank, "apollo": settings.apollo_rank}.get(settings.method, 1)
    check_rank(found, rank, f"{settings.method}_rank")
