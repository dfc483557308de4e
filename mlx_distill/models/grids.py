"""The values that quantized weights can have: choosing scales, rounding, and packing codes, in every mode.

A group of consecutive weights of a row shares a scale :math:`s`, and in the affine modes a bias :math:`b`;
its values are :math:`s v` with :math:`v` in E2M1 (``mxfp4``, ``nvfp4``) or E4M3 (``mxfp8``), or
:math:`s q + b` with an integer :math:`0 \\le q < 2^{bits}`. Scales are chosen and codes are packed here,
since ``mx.quantize`` takes its scales from the weights that it is given: run on weights that are already on
a grid, it moves most of them.

On the CPU, where an elementwise operation of MLX takes ten times as long as NumPy's, the same lines run on
NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, UInt32

from mlx_distill.models.quantization import Quantization

Array = Any  # of MLX or of NumPy
_BLOCK = 1 << 16  # weights searched at a time: they stay in the processor's cache
_EXPONENT = 0x7F800000  # the bits of a float32's exponent


@dataclass(frozen=True)
class _FloatFormat:
    """A floating-point type of four or eight bits without infinity: its sign is the highest bit."""

    mantissa_bits: int
    smallest_exponent: int
    largest: float


_E2M1 = _FloatFormat(1, 0, 6.0)
_E4M3 = _FloatFormat(3, -6, 448.0)
_FORMATS = {"mxfp4": _E2M1, "nvfp4": _E2M1, "mxfp8": _E4M3}
# Scales that are tried, relative to the one with which the largest weight is the largest value: exponents
# of two around the smallest that does not saturate; codes of E4M3.
_STEPS = {"mxfp4": range(-2, 2), "mxfp8": range(1), "nvfp4": range(-6, 9)}
_CLIPPED = np.linspace(1.0, 0.6, 9).tolist()  # factors of a group's lowest and highest weight
_LEAST_SQUARES_ROUNDS = 4
E4M3_VALUES = np.array(
    [(c % 8) * 2.0**-9 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)], np.float32
)


@dataclass(frozen=True)
class Scales:
    """The scales of a weight, with the values that the stored type can represent.

    Attributes:
        scale: ``[*lead, out, groups]``, float32.
        bias: The same of the biases; None except in the affine modes.
        codes: The stored bytes of the scales: exponents (E8M0) or E4M3; None in the affine modes.
        dtype: The stored type of scale and bias in the affine modes.
    """

    scale: mx.array
    bias: mx.array | None = None
    codes: mx.array | None = None
    dtype: mx.Dtype = mx.bfloat16


def find_scales(
    weight: Float[mx.array, "*o i"],
    quantization: Quantization,
    importance: Float[mx.array, "*o i"] | Float[mx.array, " i"] | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    *,
    on_host: bool | None = None,
) -> Scales:
    r"""The scales with the smallest :math:`\sum_j h_j (w_j - \hat w_j)^2` among some, for each group.

    ``mxfp4`` tries the exponents from two below to one above :math:`\lceil \log_2(\max |w| / 6) \rceil`,
    ``nvfp4`` the E4M3 codes from 6 below to 8 above that of :math:`\max |w| / 6`; ``mxfp8`` has the scale of
    ``mx.quantize``. The affine modes have it without ``importance``, since without one a smaller squared
    error is often a larger error of the output; with one they try clipped ranges and then four rounds of
    weighted least squares for scale and bias given the codes.

    Args:
        weight: Finite weights ``[*lead, out, in]``.
        quantization: Mode, bits and group size; the group size divides ``in``.
        importance: :math:`h`, of each column or of each weight; the mean square of a column's input. None:
            all alike.
        dtype: In which the affine modes store scale and bias.
        on_host: Whether to compute with NumPy; None: if MLX computes on the CPU.

    >>> from mlx_distill.models.quantization import parse_mode
    >>> find_scales(mx.arange(32, dtype=mx.float32)[None], parse_mode("mxfp4")).scale.tolist()
    [[8.0]]
    """
    q, xp = quantization, _arrays(on_host)
    if q.mode == "affine":
        rounded = _stored_affine(*mx.quantize(weight.astype(dtype), q.group_size, q.bits)[1:])
        if importance is None:
            return rounded
        found = _in_blocks(_search_affine, weight, q, importance, rounded, dtype, xp)
        return Scales(mx.array(found[0]), mx.array(found[1]), dtype=dtype)
    (codes,) = _in_blocks(_search_bytes, weight, q, importance, None, dtype, xp)
    codes = mx.array(codes)
    return Scales(_scale_values(codes, q, mx), codes=codes)


def round_to_grid(
    weight: Float[mx.array, "*o i"],
    scales: Scales,
    quantization: Quantization,
    *,
    on_host: bool | None = None,
) -> mx.array:
    """The nearest value that each weight can have, in float32; ties to the even code. It has no gradient.

    The arguments are those of :func:`pack`.

    >>> from mlx_distill.models.quantization import parse_mode
    >>> weight, mode = mx.arange(32, dtype=mx.float32)[None], parse_mode("mxfp4")
    >>> round_to_grid(weight, find_scales(weight, mode), mode)[0, 16:20].tolist()
    [16.0, 16.0, 16.0, 16.0]
    """
    groups, scale, bias, xp = _grouped(weight, scales, quantization, on_host)
    units = _nearest(_in_units(groups, scale, bias, xp), quantization, xp)
    return mx.array(_from_units(units, scale, bias)).reshape(weight.shape)


def straight_through(
    weight: Float[mx.array, "*o i"],
    scales: Scales,
    quantization: Quantization,
    offset: Float[mx.array, "*o i"] | None = None,
) -> mx.array:
    r"""The value of :func:`round_to_grid`, with the gradient of the weight itself inside the grid's range.

    The gradient is 1 where :math:`|w / s|` is at most the largest value (in the affine modes: where the code
    is not clipped) and 0 elsewhere: Bengio et al. 2013, "Estimating or propagating gradients through
    stochastic neurons". The value is exactly that of the grid.

    Args:
        weight: ``[*lead, out, in]``.
        scales: Of :func:`find_scales`; no gradient.
        quantization: Mode, bits and group size.
        offset: Added before rounding, in steps of the grid at the weight: learned rounding (Cheng et al.
            2023, "Optimize weight rounding via signed gradient descent"). Its gradient is that of the weight
            times the step.
    """
    q, shape = quantization, weight.shape
    grouped = (*shape[:-1], -1, q.group_size)
    fixed = mx.stop_gradient(weight).astype(mx.float32).reshape(grouped)
    scale = mx.stop_gradient(scales.scale)[..., None]
    bias = None if scales.bias is None else mx.stop_gradient(scales.bias)[..., None]
    units = _in_units(fixed, scale, bias, mx)
    moves = weight.astype(mx.float32).reshape(grouped) - fixed
    if offset is not None:
        step = _step(mx.abs(units), q, mx)
        free = offset.reshape(grouped)
        units = units + step * mx.stop_gradient(free)
        moves = moves + scale * step * (free - mx.stop_gradient(free))
    on_grid = mx.stop_gradient(_from_units(_nearest(units, q, mx), scale, bias))
    if q.mode == "affine":
        inside = (units >= -0.5) & (units <= 2**q.bits - 0.5)
    else:
        inside = mx.abs(units) <= _FORMATS[q.mode].largest
    return (on_grid + mx.where(mx.stop_gradient(inside), moves, 0.0)).reshape(shape)


def pack(
    weight: Float[mx.array, "*o i"],
    scales: Scales,
    quantization: Quantization,
    *,
    on_host: bool | None = None,
) -> dict[str, mx.array]:
    """The tensors of a quantized module, from which ``mx.dequantize`` reads :func:`round_to_grid` exactly.

    Args:
        weight: Weights, or values on the grid.
        scales: Of :func:`find_scales`.
        quantization: Mode, bits and group size.
        on_host: As for :func:`find_scales`.

    Returns:
        ``weight`` (words of 32 bits, the codes as a stream of bits from the lowest on), ``scales``, and in
        the affine modes ``biases``.
    """
    q = quantization
    groups, scale, bias, xp = _grouped(weight, scales, q, on_host)
    units = _nearest(_in_units(groups, scale, bias, xp), q, xp)
    codes = units.astype(xp.uint32) if q.mode == "affine" else _float_codes(units, q, xp)
    words = mx.array(_pack_bits(codes.reshape(*weight.shape[:-1], -1), q.bits, xp))
    if q.mode == "affine":
        assert scales.bias is not None
        stored = {"scales": scales.scale.astype(scales.dtype), "biases": scales.bias.astype(scales.dtype)}
    else:
        assert scales.codes is not None
        stored = {"scales": scales.codes}
    return {"weight": words, **stored}


def quantize(
    weight: Float[mx.array, "*o i"], quantization: Quantization, dtype: mx.Dtype = mx.bfloat16
) -> dict[str, mx.array]:
    """The tensors of a quantized module with the best scales that are known without data.

    ``mxfp4`` and ``nvfp4`` get those of :func:`find_scales`; the other modes those of ``mx.quantize``, which
    also rounds.

    Args:
        weight: ``[*lead, out, in]``, finite.
        quantization: Mode, bits and group size.
        dtype: In which ``mx.quantize`` gets the weights, and the affine modes store scale and bias.

    >>> from mlx_distill.models.quantization import parse_mode
    >>> {name: part.shape for name, part in quantize(mx.ones((2, 64)), parse_mode("nvfp4")).items()}
    {'weight': (2, 8), 'scales': (2, 4)}
    """
    q, columns = quantization, weight.shape[-1]
    if q.mode not in ("mxfp4", "nvfp4"):
        parts = mx.quantize(weight.astype(dtype), q.group_size, q.bits, mode=q.mode)
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))
    rows = weight.reshape(-1, columns)
    step = max(_BLOCK // columns, 1) if _arrays(None) is np else rows.shape[0]
    blocks = [rows[block] for block in _row_slices(rows.shape[0], step)]
    packed = [pack(block, find_scales(block, q), q) for block in blocks]
    joined = {name: mx.concatenate([block[name] for block in packed]) for name in ("weight", "scales")}
    return {name: part.reshape(*weight.shape[:-1], -1) for name, part in joined.items()}


def round_columns(
    values: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, quantization: Quantization
) -> np.ndarray:
    """:func:`round_to_grid` of NumPy arrays, with the scale and the bias (or None) of each weight."""
    return np.asarray(
        _from_units(_nearest(_in_units(values, scale, bias, np), quantization, np), scale, bias)
    )


def grid_steps(scales: Scales, quantization: Quantization, columns: slice) -> tuple[Any, Any]:
    """Scale and bias (or None) of each weight of some columns, ``[*lead, out, n]``, as NumPy arrays."""
    group = np.arange(columns.start, columns.stop) // quantization.group_size
    bias = None if scales.bias is None else np.array(scales.bias)[..., group]
    return np.array(scales.scale)[..., group], bias


def _arrays(on_host: bool | None) -> Any:
    if on_host is None:
        on_host = mx.default_device() == mx.cpu
    return np if on_host else mx


def _grouped(
    weight: mx.array, scales: Scales, q: Quantization, on_host: bool | None
) -> tuple[Array, Array, Array | None, Any]:
    xp = _arrays(on_host)
    groups = _to(weight.astype(mx.float32), xp).reshape(*weight.shape[:-1], -1, q.group_size)
    bias = None if scales.bias is None else _to(scales.bias, xp)[..., None]
    return groups, _to(scales.scale, xp)[..., None], bias, xp


def _to(value: mx.array, xp: Any) -> Array:
    return np.array(value) if xp is np else value


def _in_units(values: Array, scale: Array, bias: Array | None, xp: Any) -> Array:
    """Values in units of the scale; 0 where the scale is 0."""
    safe = xp.where(scale == 0, 1.0, scale).astype(xp.float32)
    shifted = values if bias is None else values - bias
    return xp.where(scale == 0, 0.0, shifted / safe).astype(xp.float32)


def _from_units(units: Array, scale: Array, bias: Array | None) -> Array:
    return units * scale if bias is None else units * scale + bias


def _step(size: Array, q: Quantization, xp: Any) -> Array:
    """The distance between neighbouring values, in units of the scale, at values of this size."""
    if q.mode == "affine":
        return xp.ones_like(size)
    fmt = _FORMATS[q.mode]
    power = (size.view(xp.uint32) & xp.array(_EXPONENT, xp.uint32)).view(xp.float32)
    return xp.maximum(power, 2.0**fmt.smallest_exponent) * 2.0**-fmt.mantissa_bits


def _nearest(units: Array, q: Quantization, xp: Any) -> Array:
    if q.mode == "affine":
        return xp.clip(xp.round(units), 0, 2**q.bits - 1)
    size = xp.minimum(xp.abs(units), _FORMATS[q.mode].largest)
    step = _step(size, q, xp)
    return xp.round(size / step) * step * xp.sign(units)


def _float_codes(units: Array, q: Quantization, xp: Any) -> Array:
    """The bits of values that the format of a mode can represent."""
    fmt = _FORMATS[q.mode]
    size, mantissa = xp.abs(units), fmt.mantissa_bits
    subnormal = (size * 2.0 ** (mantissa - fmt.smallest_exponent)).astype(xp.uint32)
    # In a float32 the same bits stand above 23 - mantissa others, with another exponent bias.
    bias = xp.array((126 + fmt.smallest_exponent) << mantissa, xp.uint32)
    normal = (size.view(xp.uint32) >> xp.array(23 - mantissa, xp.uint32)) - bias
    code = xp.where(size < 2.0**fmt.smallest_exponent, subnormal, normal)
    return code | ((units < 0).astype(xp.uint32) << xp.array(q.bits - 1, xp.uint32))


def _pack_bits(codes: Array, bits: int, xp: Any) -> UInt32[Array, "*o w"]:
    """Codes as a stream of bits in words of 32, the first code lowest; a code may continue in the next
    word.
    """
    count, words = 32 // gcd(bits, 32), bits // gcd(bits, 32)
    codes = codes.reshape(*codes.shape[:-1], -1, count)
    out = [xp.zeros(codes.shape[:-1], xp.uint32) for _ in range(words)]
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        out[word] = out[word] | (codes[..., i] << xp.array(shift, xp.uint32))
        if shift + bits > 32:
            out[word + 1] = out[word + 1] | (codes[..., i] >> xp.array(32 - shift, xp.uint32))
    return xp.stack(out, axis=-1).reshape(*codes.shape[:-2], -1)


def _scale_values(codes: Array, q: Quantization, xp: Any) -> Array:
    """The scales that bytes stand for."""
    if q.mode == "nvfp4":
        return xp.array(E4M3_VALUES)[codes]
    return (codes.astype(xp.uint32) << xp.array(23, xp.uint32)).view(xp.float32)


def _stored_affine(scale: mx.array, bias: mx.array) -> Scales:
    return Scales(scale.astype(mx.float32), bias.astype(mx.float32), dtype=scale.dtype)


def _in_blocks(
    search: Any,
    weight: mx.array,
    q: Quantization,
    importance: Any,
    start: Scales | None,
    dtype: mx.Dtype,
    xp: Any,
) -> list[Array]:
    """The results of a search over blocks of rows, in the shape ``[*lead, out, groups]``."""
    columns = weight.shape[-1]
    rows = weight.reshape(-1, columns)
    if importance is not None:
        importance = importance.astype(mx.float32).reshape(-1, columns)
    results: list[list[Array]] = []
    for block in _row_slices(rows.shape[0], max(_BLOCK // columns, 1)):
        groups = _to(rows[block].astype(mx.float32), xp).reshape(-1, columns // q.group_size, q.group_size)
        h = None
        if importance is not None:
            part = importance if importance.shape[0] == 1 else importance[block]
            h = _to(part, xp).reshape(-1, *groups.shape[1:])
        begin = None
        if start is not None and start.bias is not None:
            begin = tuple(
                _to(part.reshape(rows.shape[0], -1)[block], xp) for part in (start.scale, start.bias)
            )
        found = search(groups, q, h, begin, dtype, xp)
        if xp is mx:
            mx.eval(found)
        results.append(found)
    shape = (*weight.shape[:-1], columns // q.group_size)
    return [xp.concatenate(parts).reshape(shape) for parts in zip(*results, strict=True)]


def _row_slices(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _loss(difference: Array, importance: Array | None, xp: Any) -> Array:
    """The weighted sum of squares of each group."""
    squares = difference * difference
    if importance is not None:
        squares = squares * importance
    # A product with ones is many times as fast as a sum over an axis of 16.
    return (squares.reshape(-1, squares.shape[-1]) @ xp.ones(squares.shape[-1], xp.float32)).reshape(
        squares.shape[:-1]
    )


def _search_bytes(
    groups: Array, q: Quantization, importance: Array | None, start: Any, dtype: mx.Dtype, xp: Any
) -> list[Array]:
    """The best of the scales of :data:`_STEPS`, as bytes."""
    sizes = xp.abs(groups)
    whole = xp.max(sizes, axis=-1) / _FORMATS[q.mode].largest
    if q.mode == "nvfp4":
        lowest, highest = 1, len(E4M3_VALUES) - 1
        first = _nearest(whole, replace(q, mode="mxfp8", bits=8), xp)
        first = _float_codes(first, replace(q, mode="mxfp8", bits=8), xp).astype(xp.int32)
    else:
        lowest, highest = 1, 254
        bits = whole.view(xp.uint32)
        # The exponent, and one more unless the value is a power of two.
        first = ((bits + xp.array(0x7FFFFF, xp.uint32)) >> xp.array(23, xp.uint32)).astype(xp.int32)
    best, least = None, None
    for step in _STEPS[q.mode]:
        codes = xp.clip(first + step, lowest, highest).astype(xp.int32)
        scale = _scale_values(codes, q, xp)
        units = sizes * (1.0 / scale)[..., None]
        size = xp.minimum(units, _FORMATS[q.mode].largest)
        grid = _step(size, q, xp)
        loss = _loss(units - xp.round(size / grid) * grid, importance, xp) * (scale * scale)
        if best is None:
            best, least = codes, loss
        else:
            better = loss < least
            best, least = xp.where(better, codes, best), xp.where(better, loss, least)
    return [best.astype(xp.uint8)]  # type: ignore[union-attr]


def _search_affine(
    groups: Array, q: Quantization, importance: Array, start: Any, dtype: mx.Dtype, xp: Any
) -> list[Array]:
    """Clipped ranges beside the scales of ``mx.quantize``, then least squares from the best."""
    low, high, top = xp.min(groups, axis=-1), xp.max(groups, axis=-1), 2**q.bits - 1

    def stored(value: Array) -> Array:
        """Rounded to the stored type: codes are chosen for the values that will be read."""
        rounded = (value if xp is mx else mx.array(value)).astype(dtype).astype(mx.float32)
        return _to(rounded, xp)

    def codes_and_loss(scale: Array, bias: Array) -> tuple[Array, Array]:
        codes = _nearest(_in_units(groups, scale[..., None], bias[..., None], xp), q, xp)
        return codes, _loss(groups - _from_units(codes, scale[..., None], bias[..., None]), importance, xp)

    scale, bias = start
    codes, least = codes_and_loss(scale, bias)
    pairs = [(1.0, r) for r in _CLIPPED] + [(r, 1.0) for r in _CLIPPED[1:]] + [(r, r) for r in _CLIPPED[1:]]
    for shrink_low, shrink_high in pairs:
        tried = stored((high * shrink_high - low * shrink_low) / top), stored(low * shrink_low)
        new_codes, loss = codes_and_loss(*tried)
        better = loss < least
        scale, bias = xp.where(better, tried[0], scale), xp.where(better, tried[1], bias)
        codes, least = xp.where(better[..., None], new_codes, codes), xp.where(better, loss, least)
    weights = xp.broadcast_to(importance, groups.shape)
    total = xp.sum(weights, axis=-1)
    total = xp.where(total == 0, 1.0, total)
    mean = xp.sum(weights * groups, axis=-1) / total
    for _ in range(_LEAST_SQUARES_ROUNDS):
        mean_code = xp.sum(weights * codes, axis=-1) / total
        spread = codes - mean_code[..., None]
        variance = xp.sum(weights * spread * spread, axis=-1)
        covariance = xp.sum(weights * spread * (groups - mean[..., None]), axis=-1)
        flat = variance <= 0
        slope = xp.where(flat, scale, covariance / xp.where(flat, 1.0, variance))
        slope = stored(slope)
        tried = slope, stored(mean - slope * mean_code)
        new_codes, loss = codes_and_loss(*tried)
        better = loss < least
        scale, bias = xp.where(better, tried[0], scale), xp.where(better, tried[1], bias)
        codes, least = xp.where(better[..., None], new_codes, codes), xp.where(better, loss, least)
    return [scale.astype(xp.float32), bias.astype(xp.float32)]


def stored_scales(parts: Mapping[str, mx.array], quantization: Quantization) -> Scales:
    """The scales in the tensors of :func:`pack`.

    Args:
        parts: ``scales``, and in the affine modes ``biases``.
        quantization: Mode, bits and group size.

    >>> from mlx_distill.models.quantization import parse_mode
    >>> weight, mode = mx.arange(32, dtype=mx.float32)[None], parse_mode("mxfp4")
    >>> stored_scales(pack(weight, find_scales(weight, mode), mode), mode).scale.tolist()
    [[8.0]]
    """
    if quantization.mode == "affine":
        return _stored_affine(parts["scales"], parts["biases"])
    return Scales(_scale_values(parts["scales"], quantization, mx), codes=parts["scales"])
