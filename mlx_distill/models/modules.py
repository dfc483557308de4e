"""Choosing the modules to train by the end of their paths; dequantizing and casting whole models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_distill.errors import ConfigError, ModelError


def linear_layers(model: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    """The linear layers and stacks of experts, quantized or not, whose path ends in one of ``names``.

    Returns:
        Paths and modules, sorted by path.

    Raises:
        ModelError: a name that matches nothing, or no name.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    types = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    layers = _modules_by_name(model, names, lambda module: isinstance(module, types), "target module")
    if not layers:
        raise ModelError("no target modules", fix="name at least one, such as q_proj")
    return layers


def find_modules_to_save(
    model: Any, names: Sequence[str], adapted: Collection[str] = ()
) -> list[tuple[str, Any]]:
    """The modules whose path ends in one of ``names`` and whose own weight is trained: PEFT's
    ``modules_to_save``.

    A name is one or more whole components at the end of a path: ``norm`` is the final norm, not ``q_norm``.
    (PEFT compares characters, so its ``norm`` also means ``q_norm``; its files get whole paths from us.)

    Args:
        model: mlx-lm's model.
        names: Such as ``embed_tokens``, ``norm``, ``lm_head``; may be empty.
        adapted: Paths of modules that get an adapter or a projection.

    Returns:
        Paths and modules, sorted by path.

    Raises:
        ModelError: a name that matches nothing, or quantized weights.
        ConfigError: a module that is also in ``adapted``.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2))
    >>> [path for path, _ in find_modules_to_save(model, ["layers.1"])]
    ['layers.1']
    """
    modules = _modules_by_name(model, names, lambda module: "weight" in module, "module to save")
    for path, module in modules:
        if "scales" in module:
            raise ModelError(
                f"{path}: modules_to_save cannot train quantized weights",
                fix="convert without quantize, or leave it out, or set dequantize: true",
            )
        if path in adapted:
            raise ConfigError(
                f"{path} in target_modules and in modules_to_save", fix="name it in one of them"
            )
    return modules


def matrix_shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, or of each expert of a stack, quantized or not.

    >>> matrix_shape(nn.Linear(64, 2).to_quantized(32, 4))
    (2, 64)
    """
    outputs, inputs = module.weight.shape[-2:]
    return outputs, inputs * 32 // module.bits if hasattr(module, "bits") else inputs


def check_rank(layers: Sequence[tuple[str, Any]], rank: int, name: str = "lora_rank") -> None:
    """Raise if a rank, the setting ``name``, is larger than a dimension of any of the layers.

    Raises:
        ConfigError: with the setting, and the largest rank that fits all layers.
    """
    if not layers:
        return
    shapes = ((path, matrix_shape(module)) for path, module in layers)
    path, shape = min(shapes, key=lambda item: min(item[1]))
    if not 1 <= rank <= min(shape):
        fix = f"at most {min(shape)}" if rank > 0 else "at least 1"
        raise ConfigError(f"{path}: {name} {rank} for a matrix of {shape[0]} x {shape[1]}", fix=fix)


def unfreeze_weights(modules: Sequence[tuple[str, Any]]) -> list[str]:
    """Make the weights and biases of modules trainable, in place; return their paths."""
    for _, module in modules:
        module.unfreeze(keys=[key for key in ("weight", "bias") if key in module], recurse=False)
    return [path for path, _ in modules]


def _modules_by_name(
    model: Any, names: Sequence[str], is_candidate: Callable[[Any], bool], role: str
) -> list[tuple[str, Any]]:
    candidates = sorted((path, module) for path, module in model.named_modules() if is_candidate(module))
    for name in names:
        if not any(_ends_in(path, name) for path, _ in candidates):
            leaves = sorted({path.rsplit(".", 1)[-1] for path, _ in candidates})
            raise ModelError(
                f"{role} {name!r} matches nothing in this model", fix=f"it has {', '.join(leaves)}"
            )
    return [(path, module) for path, module in candidates if any(_ends_in(path, name) for name in names)]


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def dequantized_weight(module: Any, expert: int | None = None) -> Float[mx.array, "*e o i"]:
    """The weight of a linear layer, a stack of experts or one expert of it, dequantized if needed, in
    float32.

    >>> dequantized_weight(nn.Linear(3, 2)).shape
    (2, 3)
    """

    def part(name: str) -> Any:
        array = module.get(name)
        return array if array is None or expert is None else array[expert]

    scales, biases = part("scales"), part("biases")
    if scales is None:
        return part("weight").astype(mx.float32)
    if biases is not None:  # the affine modes compute in the type of their scales, whatever dtype says
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        part("weight"),
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=part("global_scale"),
        dtype=mx.float32,
    )


def unquantized_like(module: Any, weight: Float[mx.array, "*e o i"]) -> Any:
    """An unquantized, frozen layer of the same type (linear, embedding or stack of experts) with this weight.

    The bias of the module is kept.

    >>> unquantized_like(nn.Linear(32, 2).to_quantized(32, 4), mx.ones((2, 32)))
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
    """Cast the floating-point parameters of a model in place, except adapters, and return it.

    Scales and biases of affine quantization are cast too; quantized words are not. bfloat16 to float32 is
    exact. On the CPU backend bfloat16 is slow, and stacks of unquantized experts compute in float32 only.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown type {dtype!r}", fix=f"one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]

    def convert(path: str, value: mx.array) -> mx.array:
        is_adapter = path.endswith((".lora_a", ".lora_b", ".m"))
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and not is_adapter else value

    model.update(tree_map_with_path(convert, model.parameters()))
    return model


def dequantize_model(model: Any, dtype: str | mx.Dtype = mx.float32) -> list[str]:
    """Replace quantized layers (linear, embeddings, stacks of experts) by unquantized ones, in place.

    The model computes the same up to rounding, with more memory. It is for backends whose quantized products
    are slow (on the CPU, training a tiny gpt-oss is twice as fast) and for training weights that were
    quantized. What is saved afterwards is still only what was trained.

    Returns:
        The paths of the replaced modules.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    target = DTYPES[dtype] if isinstance(dtype, str) else dtype
    layers = [
        (path, unquantized_like(module, dequantized_weight(module).astype(target)))
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear)
    ]
    model.update_modules(tree_unflatten(layers))
    return [path for path, _ in layers]
