"""Quantization modes, and the policy that decides what happens to each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.models.checkpoint.layout import Architecture, TensorPlan
from mlx_distill.models.checkpoint.safetensors import FLOATS
from mlx_distill.recipe import MODES

AFFINE_GROUP_SIZES = (128, 64, 32)
_BITS_AND_GROUP_SIZE = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
# The mode of most weights, and the mode of the embedding and the head. The router is not quantized.
MIXED = {
    "mixed4": ("affine4", "affine8"),
    "mixed-mxfp4": ("mxfp4", "affine8"),
    "mixed-nvfp4": ("nvfp4", "affine8"),
}
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a module are quantized, in mlx's terms."""

    mode: str
    bits: int
    group_size: int

    @property
    def label(self) -> str:
        """For tables: ``affine 4 bits, groups of 64``."""
        return f"{self.mode} {self.bits} bits, groups of {self.group_size}"

    @property
    def config(self) -> dict[str, Any]:
        """The entry of config.json, as mlx-lm writes it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class TensorAction:
    """What a conversion does with a tensor: quantizes it, casts it, or keeps its bits.

    Args:
        dtype: Safetensors type to cast to (of scales and biases, if it is quantized); None keeps the type.
        quantization: How to quantize; None does not.
        reason: Why, for the report.
        requantized: The weights were quantized like this before, so they are near values that it can
            represent.
    """

    dtype: str | None = None
    quantization: Quantization | None = None
    reason: str = ""
    requantized: bool = False

    @property
    def keeps_bits(self) -> bool:
        """Whether the tensor is neither cast nor quantized."""
        return self.quantization is None and self.dtype is None

    @property
    def label(self) -> str:
        """The stored type, for tables and messages."""
        return self.quantization.label if self.quantization else self.dtype or "kept"


QuantizationPolicy = Callable[[TensorPlan], TensorAction]


def parse_mode(name: str, group_size: int = 0) -> Quantization:
    """The quantization of a mode ``affine1`` to ``affine8``, ``mxfp4``, ``nvfp4`` or ``mxfp8``.

    Args:
        name: The mode.
        group_size: Weights that share a scale; 0 for the default of the mode.

    Raises:
        ConfigError: an unknown mode, or a group size that the mode does not have.

    >>> parse_mode("affine4").label
    'affine 4 bits, groups of 64'
    """
    if name in MODES and name.startswith("affine"):
        size = group_size or 64
        if size not in AFFINE_GROUP_SIZES:
            sizes = ", ".join(map(str, sorted(AFFINE_GROUP_SIZES)))
            raise ConfigError(f"groups of {size} with {name}", fix=f"one of {sizes}")
        return Quantization("affine", int(name.removeprefix("affine")), size)
    if name in _BITS_AND_GROUP_SIZE:
        bits, size = _BITS_AND_GROUP_SIZE[name]
        if group_size not in (0, size):
            raise ConfigError(f"groups of {group_size} with {name}", fix=f"{name} has groups of {size}")
        return Quantization(name, bits, size)
    raise ConfigError(f"unknown quantization {name!r}", fix=f"one of {', '.join(MODES)}")


def quantization_policy(
    architecture: Architecture,
    quantizable: Set[str],
    quantize: str | None = None,
    *,
    dtype: str | None = None,
    group_size: int = 0,
    keep: Sequence[str] = ("router",),
    chosen: Mapping[str, Quantization] | None = None,
) -> QuantizationPolicy:
    """A function that decides what a conversion does with each tensor.

    Args:
        architecture: Names the routers, the embedding and the head.
        quantizable: Paths of the modules that can be quantized.
        quantize: A mode, or a mixed one (``mixed4`` has embedding and head in 8 bits); None does not
            quantize.
        dtype: Type of the floating-point tensors that are not quantized; None keeps the type of each.
        group_size: Weights that share a scale, 0 for the default of the mode.
        keep: Parts of module names that are not quantized; ``router`` also means the architecture's routers.
        chosen: Quantizations of some modules instead, by path.
    """
    if dtype is not None and dtype not in SAFETENSORS:
        raise ConfigError(f"unknown type {dtype!r}", fix=f"one of {', '.join(SAFETENSORS)}")
    body, outer = MIXED.get(quantize or "", (quantize, quantize))
    modes = {name: parse_mode(name, group_size if name == body else 0) for name in (body, outer) if name}
    names = architecture.modules
    routers = tuple(f".{name}" for name in names.routers)
    cast_to = SAFETENSORS[dtype] if dtype else None

    def kept_by(path: str) -> str | None:
        if "router" in keep and path.endswith(routers):
            return "router"
        return next((part for part in keep if part in path), None)

    def decide(tensor: TensorPlan) -> TensorAction:
        if tensor.dtype not in FLOATS:
            quantized = tensor.dtype in ("U32", "U8")
            return TensorAction(reason="already quantized" if quantized else "not floating point")
        action = TensorAction(cast_to if cast_to != tensor.dtype else None)
        path = tensor.name.removesuffix(".weight")
        if not body or not tensor.name.endswith(".weight") or path not in quantizable:
            return action
        if part := kept_by(path):
            return replace(action, reason=f"kept by {part!r}")
        if chosen and path in chosen:
            return replace(action, quantization=chosen[path])
        mode = outer if path in (names.head, names.embedding) else body
        return _with_group_size(modes[mode or body], tensor, action)

    return decide


def _with_group_size(wanted: Quantization, tensor: TensorPlan, action: TensorAction) -> TensorAction:
    """Quantize with the largest group size, up to the wanted one, that divides a row, or not at all."""
    sizes = [wanted.group_size]
    if wanted.mode == "affine":
        sizes = [size for size in AFFINE_GROUP_SIZES if size <= wanted.group_size]
    size = next((size for size in sizes if tensor.columns % size == 0), None)
    if size is None:
        return replace(action, reason=f"{tensor.columns} columns are no multiple of {sizes[-1]}")
    smaller = size != wanted.group_size
    reason = f"{tensor.columns} columns are no multiple of {wanted.group_size}" if smaller else ""
    return replace(action, quantization=replace(wanted, group_size=size), reason=reason)


NAN_SCALE = 0xFF


def with_quantization(config: Mapping[str, Any], quantized: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The config with ``quantization`` as mlx-lm reads it: the most common settings, then modules that
    differ.

    Args:
        config: Of the model, or of the model that it was converted from.
        quantized: ``group_size``, ``bits`` and ``mode`` by module path; empty if nothing is quantized.
    """
    out = {key: value for key, value in config.items() if key != "quantization"}
    method = (out.get("quantization_config") or {}).get("quant_method")
    if all(settings["mode"] != method for settings in quantized.values()):
        # An entry that was written here before, or of weights that are not quantized any more.
        out.pop("quantization_config", None)
    if not quantized:
        return out
    every = [tuple(settings.values()) for settings in quantized.values()]
    common = max(sorted(set(every)), key=every.count)
    default = dict(zip(("group_size", "bits", "mode"), common, strict=True))
    different = {path: settings for path, settings in quantized.items() if settings != default}
    out["quantization"] = {**default, **different}
    return {"quantization_config": out["quantization"], **out}
