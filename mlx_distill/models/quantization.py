"""What happens to each weight on its way: kept, cast, quantized. One decision a tensor, made before anything
is written, and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
from jaxtyping import Float, UInt8, UInt32

from mlx_distill.errors import ConfigError
from mlx_distill.models.checkpoint.layout import Architecture, TensorPlan
from mlx_distill.models.checkpoint.safetensors import FLOATS
from mlx_distill.recipe import MODES

AFFINE_GROUPS = (128, 64, 32)
_FIXED = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
# Body, and what the embeddings and the head get besides; the router is always kept.
MIXED = {
    "mixed4": ("affine4", "affine8"),
    "mixed-mxfp4": ("mxfp4", "affine8"),
    "mixed-nvfp4": ("nvfp4", "affine8"),
}
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class QuantSpec:
    """``kind`` is ``keep``, ``cast`` or ``quantize``; ``dtype`` the safetensors type cast to; ``why`` a
    reason worth showing.

    ``again``: the weights were packed so before, and lie near that grid.
    """

    kind: str = "keep"
    dtype: str | None = None
    mode: str = ""
    bits: int = 0
    group_size: int = 0
    why: str = ""
    again: bool = False

    @property
    def label(self) -> str:
        """For tables: ``affine 4 bits, groups of 64``."""
        if self.kind == "quantize":
            return f"{self.mode} {self.bits} bits, groups of {self.group_size}"
        return self.dtype or "kept"

    @property
    def config(self) -> dict[str, Any]:
        """As mlx-lm writes it into config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


QuantizationPolicy = Callable[[TensorPlan], QuantSpec]


def parse_mode(name: str, group_size: int = 0) -> QuantSpec:
    """A mode by name: ``affine1`` to ``affine8``, ``mxfp4``, ``nvfp4``, ``mxfp8``; ``group_size`` 0 is the
    mode's own.

    Raises:
        ConfigError: an unknown mode, or a group size that the mode does not have.

    >>> parse_mode("affine4").label
    'affine 4 bits, groups of 64'
    """
    if name in MODES and name.startswith("affine"):
        size = group_size or 64
        if size not in AFFINE_GROUPS:
            raise ConfigError(
                f"groups of {size} with {name}", fix=f"one of {', '.join(map(str, sorted(AFFINE_GROUPS)))}"
            )
        return QuantSpec("quantize", mode="affine", bits=int(name.removeprefix("affine")), group_size=size)
    if name in _FIXED:
        bits, size = _FIXED[name]
        if group_size not in (0, size):
            raise ConfigError(f"groups of {group_size} with {name}", fix=f"{name} has groups of {size}")
        return QuantSpec("quantize", mode=name, bits=bits, group_size=size)
    raise ConfigError(f"unknown quantization {name!r}", fix=f"one of {', '.join(MODES)}")


def quantization_policy(
    architecture: Architecture,
    quantizable: Set[str],
    quantize: str | None = None,
    *,
    dtype: str | None = None,
    group_size: int = 0,
    keep: Sequence[str] = ("router",),
) -> QuantizationPolicy:
    """The predicate of a conversion.

    Args:
        architecture: Knows which modules are routers.
        quantizable: Module paths that can be packed.
        quantize: A mode or a mixed recipe (``mixed4`` has embeddings and head in 8 bits); None keeps.
        dtype: Type of floating-point tensors that are not packed; None keeps each.
        group_size: Weights that share a scale, 0 for the mode's own.
        keep: Parts of module names that are not packed; ``router`` also means what the architecture calls so.
    """
    if dtype is not None and dtype not in SAFETENSORS:
        raise ConfigError(f"unknown type {dtype!r}", fix=f"one of {', '.join(SAFETENSORS)}")
    body, outer = MIXED.get(quantize or "", (quantize, quantize))
    modes = {name: parse_mode(name, group_size if name == body else 0) for name in (body, outer) if name}
    routers = tuple(f".{name}" for name in architecture.routers) if "router" in keep else ()
    to = SAFETENSORS[dtype] if dtype else None

    def decide(planned: TensorPlan) -> QuantSpec:
        if planned.dtype not in FLOATS:
            return QuantSpec(why="packed already" if planned.dtype in ("U32", "U8") else "not floating point")
        plain = QuantSpec("cast", dtype=to) if to and to != planned.dtype else QuantSpec()
        path = planned.name.removesuffix(".weight")
        if not body or not planned.name.endswith(".weight") or path not in quantizable:
            return plain
        part = (
            "router"
            if path.endswith(routers) and routers
            else next((part for part in keep if part in path), None)
        )
        if part:
            return QuantSpec(plain.kind, plain.dtype, why=f"kept by {part!r}")
        name = outer if path in ("lm_head", "model.embed_tokens") else body
        return _fit(modes[name or body], planned, plain)

    return decide


def _fit(wish: QuantSpec, planned: TensorPlan, plain: QuantSpec) -> QuantSpec:
    sizes = (
        [size for size in AFFINE_GROUPS if size <= wish.group_size]
        if wish.mode == "affine"
        else [wish.group_size]
    )
    for size in sizes:
        if planned.columns % size == 0:
            why = (
                ""
                if size == wish.group_size
                else f"{planned.columns} columns are no multiple of {wish.group_size}"
            )
            return QuantSpec("quantize", plain.dtype, wish.mode, wish.bits, size, why)
    return QuantSpec(plain.kind, plain.dtype, why=f"{planned.columns} columns are no multiple of {sizes[-1]}")


GROUP = 32
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; the fourth bit is the sign
NAN_SCALE = 0xFF
_BIAS = 127
_LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2 ** 2


def pack(values: Float[mx.array, "*b n"]) -> tuple[UInt32[mx.array, "*b w"], UInt8[mx.array, "*b g"]]:
    r"""Words and scales as ``mx.dequantize(..., mode="mxfp4")`` reads them: of two scales a group, the one
    that loses less.

    They are the specification's :math:`2^{\lfloor \log_2 \max |w| \rfloor - 2}`, where the largest weights
    may saturate at 6 scales, and the next one up, where none does. Weights go to the nearest level, ties to
    the even code.

    Args:
        values: Finite weights; ``n`` a multiple of 32.

    >>> words, scales = pack(mx.arange(32, dtype=mx.float32)[None])
    >>> scales.tolist(), mx.dequantize(words, scales, None, 32, 4, "mxfp4", dtype=mx.float32)[0, :8].tolist()
    ([[130]], [0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 8.0, 8.0])
    """
    groups = values.astype(mx.float32).reshape(*values.shape[:-1], -1, GROUP)
    sizes = mx.abs(groups)
    # The exponent's bits are the floor of the logarithm, exactly.
    largest = (mx.max(sizes, axis=-1).view(mx.uint32) >> 23).astype(mx.int32) - _BIAS
    low = mx.maximum(largest - _LARGEST_EXPONENT, -_BIAS)
    (codes, loss), (higher_codes, higher_loss) = (_nearest(sizes, low + step) for step in (0, 1))
    higher = 4 * higher_loss < loss  # each is in squares of its own scale
    codes = mx.where(higher[..., None], higher_codes, codes) | ((groups < 0).astype(mx.uint32) << 3)
    words = mx.sum(codes.reshape(*codes.shape[:-1], -1, 8) << (4 * mx.arange(8, dtype=mx.uint32)), axis=-1)
    return words.reshape(*values.shape[:-1], -1), (low + higher + _BIAS).astype(mx.uint8)


def _nearest(sizes: mx.array, exponent: mx.array) -> tuple[mx.array, mx.array]:
    """Codes of the levels nearest to ``sizes / 2 ** exponent``, and the sum of squares that is lost in each
    group.
    """
    scaled = sizes * ((_BIAS - exponent).astype(mx.uint32) << 23).view(mx.float32)[..., None]
    codes = mx.zeros(scaled.shape, mx.uint32)
    for i, middle in enumerate((a + b) / 2 for a, b in pairwise(LEVELS)):
        codes = codes + (scaled >= middle if i % 2 else scaled > middle)
    return codes, mx.sum(mx.square(scaled - mx.array(LEVELS)[codes]), axis=-1)


def with_quantization(config: Mapping[str, Any], packed: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The config with ``quantization`` as mlx-lm reads it: the commonest settings on top, and every module
    that differs by its path.

    Args:
        config: Of the model or of what it came from.
        packed: ``group_size``, ``bits`` and ``mode`` by the paths of the packed modules; empty where none is.
    """
    out = {key: value for key, value in config.items() if key != "quantization"}
    method = (out.get("quantization_config") or {}).get("quant_method")
    if all(
        settings["mode"] != method for settings in packed.values()
    ):  # ours, or of weights that are packed no more
        out.pop("quantization_config", None)
    if not packed:
        return out
    kinds = [tuple(settings.values()) for settings in packed.values()]
    common = max(sorted(set(kinds)), key=kinds.count)
    top = dict(zip(("group_size", "bits", "mode"), common, strict=True))
    out["quantization"] = {**top, **{path: settings for path, settings in packed.items() if settings != top}}
    return {"quantization_config": out["quantization"], **out}
