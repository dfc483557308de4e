"""The result of calibrating or refining a quantized module."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Refined:
    """A quantized module whose weights were chosen better than by rounding them.

    Attributes:
        parts: The tensors of the module, exactly on the grid: ``weight``, ``scales``, and in the affine modes
            ``biases``. Never quantize them again: ``mx.quantize`` moves most of them.
        latent: ``[*lead, out, in]`` float32, what was rounded: GPTQ's compensated weights, or trained ones;
            an empty array where it was not kept.
    """

    parts: dict[str, mx.array]
    latent: mx.array
