"""Which modules a training is about: chosen by the end of their paths, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_distill.errors import ConfigError, ModelError


def linear_layers(model: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    """The linear layers and stacks of experts, packed or not, whose path ends in one of ``names``, sorted by
    path.

    Raises:
        ModelError: a name that matches nothing, or no name.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    found = _named(model, names, lambda module: isinstance(module, kinds), "target module")
    if not found:
        raise ModelError("no target modules", fix="name at least one, such as q_proj")
    return found


def find_modules_to_save(
    model: Any, names: Sequence[str], adapted: Collection[str] = ()
) -> list[tuple[str, Any]]:
    """The modules with a plain weight of their own whose path ends in one of ``names``, sorted by path:
    PEFT's ``modules_to_save``.

    A name is a path's last part or its last parts: ``norm`` is the last norm alone. (PEFT compares letters,
    so that its ``norm`` is ``q_norm`` too; we write whole paths into its files.)

    Args:
        model: mlx-lm's model.
        names: Such as ``embed_tokens``, ``norm``, ``lm_head``; none chooses nothing.
        adapted: Paths of modules that get an adapter or a projection.

    Raises:
        ModelError: a name that matches nothing, or packed weights.
        ConfigError: a module that is adapted too.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2))
    >>> [path for path, _ in whole_modules(model, ["layers.1"])]
    ['layers.1']
    """
    found = _named(model, names, lambda module: "weight" in module, "module to save")
    for path, module in found:
        if "scales" in module:
            raise ModelError(
                f"{path}: modules_to_save trains plain weights, and these are packed",
                fix="convert without quantize, or leave it out, or set dequantize: true",
            )
        if path in adapted:
            raise ConfigError(
                f"{path} in target_modules and in modules_to_save", fix="name it in one of them"
            )
    return found


def matrix_shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, or of each of a stack of experts, packed or not.

    >>> matrix_shape(nn.Linear(64, 2).to_quantized(32, 4))
    (2, 64)
    """
    outputs, inputs = module.weight.shape[-2:]
    return outputs, inputs * 32 // module.bits if hasattr(module, "bits") else inputs


def check_rank(found: Sequence[tuple[str, Any]], rank: int, name: str = "lora_rank") -> None:
    """Refuse a rank, the setting ``name``, that does not fit the smallest of some matrices.

    Raises:
        ConfigError: with the setting, and the most that fits all of them.
    """
    if not found:
        return
    path, shape = min(((path, matrix_shape(module)) for path, module in found), key=lambda item: min(item[1]))
    if not 1 <= rank <= min(shape):
        fix = f"at most {min(shape)}" if rank > 0 else "at least 1"
        raise ConfigError(f"{path}: {name} {rank} for a matrix of {shape[0]} x {shape[1]}", fix=fix)


def unfreeze_weights(modules: Sequence[tuple[str, Any]]) -> list[str]:
    """Let the weights and biases of some modules move, in place; return the paths."""
    for _, module in modules:
        module.unfreeze(keys=[key for key in ("weight", "bias") if key in module], recurse=False)
    return [path for path, _ in modules]


def _named(model: Any, names: Sequence[str], fits: Any, what: str) -> list[tuple[str, Any]]:
    there = sorted((path, module) for path, module in model.named_modules() if fits(module))
    for name in names:
        if not any(_ends(path, name) for path, _ in there):
            leaves = sorted({path.rsplit(".", 1)[-1] for path, _ in there})
            raise ModelError(
                f"{what} {name!r} matches nothing in this model", fix=f"it has {', '.join(leaves)}"
            )
    return [(path, module) for path, module in there if any(_ends(path, name) for name in names)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def dequantized_weight(module: Any, expert: int | None = None) -> Float[mx.array, "*e o i"]:
    """The weight of a linear layer or of a stack of experts (or of one of them) in float32, unpacked where it
    is packed.

    >>> dequantized(nn.Linear(3, 2)).shape
    (2, 3)
    """
    parts = {name: module.get(name) for name in ("weight", "scales", "biases", "global_scale")}
    parts = {name: part if part is None or expert is None else part[expert] for name, part in parts.items()}
    if parts["scales"] is None:
        return parts["weight"].astype(mx.float32)
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts["biases"],
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=parts["global_scale"],
        dtype=mx.float32,
    )


def unquantized_like(module: Any, weight: Float[mx.array, "*e o i"]) -> Any:
    """A frozen plain layer of the same kind (linear, embedding or stack of experts) with that weight and the
    module's own bias.

    >>> plain_like(nn.Linear(32, 2).to_quantized(32, 4), mx.ones((2, 32)))
    Linear(input_dims=32, output_dims=2, bias=True)
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        out: Any = nn.Embedding(1, 1)
    else:
        out = SwitchLinear(1, 1, 1, bias=False) if weight.ndim == 3 else nn.Linear(1, 1, bias=False)
    out.weight = weight
    if "bias" in module:
        out.bias = module.bias
    out.freeze()
    return out


DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def cast_model(model: Any, dtype: str | mx.Dtype) -> Any:
    """Cast the floating-point parameters (scales and biases of affine weights among them), in place; packed
    weights and adapters stay.

    Returns the model. bfloat16 to float32 is exact. On the CPU backend bfloat16 is slow, and dense experts
    run in float32 only.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown type {dtype!r}", fix=f"one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    model.update(
        tree_map_with_path(lambda path, x: x.astype(dtype) if _is_cast(path, x) else x, model.parameters())
    )
    return model


def _is_cast(path: str, x: mx.array) -> bool:
    return bool(mx.issubdtype(x.dtype, mx.floating)) and not path.endswith((".lora_a", ".lora_b", ".m"))


def dequantize_model(model: Any, dtype: str | mx.Dtype = mx.float32) -> list[str]:
    """Replace packed weights (linear layers, embeddings, stacks of experts) by plain ones of the same value,
    in place; return the paths.

    More memory, the same numbers to rounding: for a backend whose packed products are slow (the CPU's, twice
    as slow in training a tiny gpt-oss), and for weights that are to move. What is saved afterwards is still
    only what was trained.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    plain = [
        (path, unquantized_like(module, dequantized_weight(module).astype(kind)))
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear)
    ]
    model.update_modules(tree_unflatten(plain))
    return [path for path, _ in plain]
