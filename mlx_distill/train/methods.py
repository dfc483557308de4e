"""Which weights move: what each method of training leaves unfrozen."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.recipe import TrainConfig


def make_trainable(model: Any, settings: TrainConfig) -> list[str]:
    """Freeze and unfreeze a model, in place, for ``settings.method``.

    - ``lora``, ``dora``: adapters on ``target_modules``, all else frozen;
    - ``galore``: the weights of ``target_modules`` themselves, which the optimizer projects; all else frozen;
    - ``full``: every plain weight; packed ones cannot move.

    Args:
        model: As loaded.
        settings: Method, targets, ranks and seed.

    Returns:
        The paths of the modules that move; empty for ``full``.

    Raises:
        ModelError: a target that matches nothing or has packed weights.
        ConfigError: a rank above a dimension.
    """
    if settings.method in ("lora", "dora"):
        lora = LoraSettings(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.target_modules, settings.method)
        return add_lora(model, lora, settings.seed)
    if settings.method == "full":
        model.unfreeze()
        for _, module in model.named_modules():
            if "scales" in module:
                module.freeze(keys=[key for key in ("weight", "scales", "biases") if key in module], recurse=False)
        return []
    found = [(path, module) for path, module in model.named_modules() if any(_ends(path, name) for name in settings.target_modules)]
    model.freeze()
    for name in settings.target_modules:
        if not any(_ends(path, name) for path, _ in found):
            raise ModelError(f"target module {name!r} matches nothing in this model", fix="see the names with: mlx-distill inspect MODEL")
    for path, module in found:
        _unfreeze(path, module, settings.galore_rank)
    return [path for path, _ in found]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _unfreeze(path: str, module: nn.Module, rank: int) -> None:
    weight = module.get("weight")
    if weight is None or "scales" in module:
        raise ModelError(f"{path}: GaLore moves plain weights, and these are packed", fix="convert without quantize, or use method: lora")
    smaller = min(weight.shape[-2:])
    if rank > smaller:
        raise ConfigError(f"{path}: galore_rank {rank} for a matrix of {weight.shape[-2]} x {weight.shape[-1]}", fix=f"at most {smaller}")
    module.unfreeze(keys=["weight"], recurse=False)
