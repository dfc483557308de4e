r"""MXFP4: 32 weights share one scale, a power of two; each is a four-bit float E2M1.

Here is the packing of what was packed before, after a small update. ``mx.quantize`` takes the power of two nearest to a sixth of the
group's largest weight, so that a slight change of that weight can move the scale and throw all others off their grid: after an update of a
hundredth, random MXFP4 weights came back with a relative error of 0.069; :func:`pack` left 0.010, which is the update itself. What is
finer than the levels is lost either way: an adapter that must not lose anything stays beside its base.

Source: OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3 and 6.3.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
from jaxtyping import Float, UInt8, UInt32

GROUP = 32
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; the fourth bit is the sign
NAN_SCALE = 0xFF
_BIAS = 127
_LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2 ** 2


def pack(values: Float[mx.array, "*b n"]) -> tuple[UInt32[mx.array, "*b w"], UInt8[mx.array, "*b g"]]:
    r"""Words and scales as ``mx.dequantize(..., mode="mxfp4")`` reads them: of two scales a group, the one that loses less.

    They are the specification's :math:`2^{\lfloor \log_2 \max |w| \rfloor - 2}`, where the largest weights may saturate at 6 scales, and
    the next one up, where none does. Weights go to the nearest level, ties to the even code.

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
    """Codes of the levels nearest to ``sizes / 2 ** exponent``, and the sum of squares that is lost in each group."""
    scaled = sizes * ((_BIAS - exponent).astype(mx.uint32) << 23).view(mx.float32)[..., None]
    codes = mx.zeros(scaled.shape, mx.uint32)
    for i, middle in enumerate((a + b) / 2 for a, b in pairwise(LEVELS)):
        codes = codes + (scaled >= middle if i % 2 else scaled > middle)
    return codes, mx.sum(mx.square(scaled - mx.array(LEVELS)[codes]), axis=-1)
