"""MXFP4: 32 weights share one scale, a power of two; each is a four-bit float E2M1.

Two layouts hold the same bytes: ``blocks [..., groups, 16]`` of bytes (Hugging Face; the earlier weight in the low half) and MLX's
``words [..., groups * 4]`` of 32 bits. Neither direction between them passes through a float.

Source: OCP Microscaling Formats (MX) Specification 1.0, 2023.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8, UInt32

from mlx_distill.errors import ModelError

GROUP = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BIAS = 127
_LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2 ** 2
# Halfway between neighbours; with a tie the even code wins, so the comparison takes in the tie before odd codes only.
_MIDDLES = (VALUES[:7].astype(np.float64) + VALUES[1:8]) / 2


def encode(
    values: Float[np.ndarray, "*b n"],
) -> tuple[UInt8[np.ndarray, "*b g 16"], UInt8[np.ndarray, "*b g"]]:
    r"""Blocks and scales of float weights.

    The scale of a group is :math:`2^{\lfloor \log_2 \max |w| \rfloor - 2}`; weights are rounded to the nearest E2M1 value, ties to the even
    code, and saturate at 6 scales.

    Args:
        values: Weights; ``n`` a multiple of 32.

    Raises:
        ModelError: ``n`` is no multiple of 32, or a weight is not finite.

    >>> blocks, scales = encode(np.arange(32, dtype=np.float32))
    >>> scales.tolist(), decode(blocks, scales)[:8].tolist()
    ([129], [0.0, 0.0, 2.0, 4.0, 4.0, 4.0, 6.0, 8.0])
    """
    if values.shape[-1] % GROUP:
        raise ModelError(f"rows of {values.shape[-1]} weights cannot be MXFP4", fix="a multiple of 32 is needed")
    if not np.isfinite(values).all():
        raise ModelError("NaN or infinity cannot be MXFP4", fix="check where the weights come from")
    groups = values.astype(np.float64).reshape(*values.shape[:-1], -1, GROUP)
    largest = np.abs(groups).max(-1)
    exponent = np.frexp(np.where(largest > 0, largest, 1.0))[1] - 1 - _LARGEST_EXPONENT
    exponent = np.where(largest > 0, np.clip(exponent, -_BIAS, _BIAS), -_BIAS)
    scaled = np.abs(groups) / np.exp2(exponent)[..., None]
    codes = np.zeros(scaled.shape, np.uint8)
    for i, middle in enumerate(_MIDDLES):
        codes += (scaled > middle) | ((scaled == middle) & (i % 2 == 1))
    codes |= np.signbit(groups).astype(np.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + _BIAS).astype(np.uint8)


def decode(blocks: UInt8[np.ndarray, "*b g 16"], scales: UInt8[np.ndarray, "*b g"]) -> Float[np.ndarray, "*b n"]:
    """The weights, in float32: exact."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], GROUP)
    out = VALUES[codes].astype(np.float64) * np.exp2(scales.astype(np.float64) - _BIAS)[..., None]
    return out.astype(np.float32).reshape(*blocks.shape[:-2], -1)


def to_words(blocks: UInt8[np.ndarray, "*b g 16"]) -> UInt32[np.ndarray, "*b w"]:
    """The same bytes as MLX's words, four a group."""
    return np.ascontiguousarray(blocks).view(np.uint32).reshape(*blocks.shape[:-2], -1)


def to_blocks(words: UInt32[np.ndarray, "*b w"]) -> UInt8[np.ndarray, "*b g 16"]:
    """The same bytes as blocks of 16."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], -1, 16)
