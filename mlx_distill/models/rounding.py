r"""Rounding a weight by the moments of its inputs: correction, weighted scales, error feedback, packed codes.

What is made small is the error of the output against that of the unquantized model, :math:`\lVert W Y - Q X
\rVert^2` with the inputs Y there and X in the quantized one. It is a constant plus
:math:`\mathrm{tr}\,(W^* - Q) H (W^* - Q)^T` with :math:`H = X X^T` and the corrected weights
:math:`W^* = W + W (Y - X) X^T H^{-1}`, which are rounded in place of W; H is damped. Li et al. 2025, "GPTAQ:
efficient finetuning-free quantization for asymmetric calibration" (arXiv 2504.02692); Arai and Ichikawa 2025,
"Quantization error propagation" (arXiv 2504.09629).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.models.gptq import DAMPING, PANEL_ROWS, column_factor, damped, gptq
from mlx_distill.models.grids import find_scales, pack
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.refined import Refined

SLICE_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        dtype: In which affine scales and biases are stored.
        damping: Of :func:`~mlx_distill.models.gptq.column_factor`.
        feedback: Correct the weights and round them with GPTQ's error feedback; False: round the weights to
            nearest, with weighted scales alone.
        latents: Give what was rounded, four bytes a weight; False: an empty array in its place.
        slice_weights: Weights of a matrix that are rounded at a time (of a multiple of :data:`PANEL_ROWS`
            rows): it bounds the memory, and changes nothing else.
    """

    dtype: mx.Dtype = mx.bfloat16
    damping: float = DAMPING
    feedback: bool = True
    latents: bool = True
    slice_weights: int = SLICE_WEIGHTS


DEFAULTS = Rounding()


@dataclass(frozen=True)
class InputMoments:
    """Of the inputs x of a weight, and y of the same tokens in the unquantized model.

    Attributes:
        hessian: The mean of x x^T.
        cross: The mean of (y - x) x^T; None does not correct the weight.
    """

    hessian: Float[np.ndarray, "i i"]
    cross: Float[np.ndarray, "i i"] | None = None

    def correction(self, damping: float) -> Float[np.ndarray, "i i"] | None:
        """The matrix M with which the corrected weights are W + W M, in float32."""
        if self.cross is None or not self.cross.any():
            return None
        matrix = damped(self.hessian, damping)
        return np.ascontiguousarray(np.linalg.solve(matrix, self.cross.T).T, np.float32)


def round_weight(
    weight: Float[mx.array, "*e o i"],
    inputs: Sequence[InputMoments],
    quantization: Quantization,
    rounding: Rounding = DEFAULTS,
) -> Refined:
    """Round a weight, or each expert of a stack by its own inputs, some rows at a time.

    Args:
        weight: ``[out, in]``, or of a stack ``[experts, out, in]``.
        inputs: Of the weight, or of each expert.
        quantization: Mode, bits and group size.
        rounding: How.
    """
    parts, latents = [], []
    for expert, moments in zip(weight.reshape(-1, *weight.shape[-2:]), inputs, strict=True):
        importance = mx.array(np.maximum(np.diag(moments.hessian), 0).astype(np.float32))
        factor = column_factor(moments.hessian, rounding.damping) if rounding.feedback else None
        correction = moments.correction(rounding.damping) if rounding.feedback else None
        step = max(rounding.slice_weights // expert.shape[1] // PANEL_ROWS, 1) * PANEL_ROWS
        for first in range(0, expert.shape[0], step):
            rows = expert[first : first + step].astype(mx.float32)
            if correction is not None:
                rows = mx.array(_corrected(np.array(rows), correction))
            scales = find_scales(rows, quantization, importance, rounding.dtype)
            if factor is not None:
                rows = mx.array(gptq(np.array(rows), factor, scales, quantization))
            parts.append(pack(rows, scales, quantization))
            mx.eval(parts[-1])
            if rounding.latents:
                mx.eval(rows)
                latents.append(rows)

    def joined(slices: Sequence[mx.array]) -> mx.array:
        return mx.concatenate(slices).reshape(*weight.shape[:-1], -1)

    packed = {name: joined([part[name] for part in parts]) for name in parts[0]}
    latent = joined(latents) if latents else mx.zeros((0,))
    mx.eval(packed, latent)
    return Refined(packed, latent)


def _corrected(
    rows: Float[np.ndarray, "o i"], correction: Float[np.ndarray, "i i"]
) -> Float[np.ndarray, "o i"]:
    """W + W M, with the same bits for a part of the rows as for all."""
    out = np.zeros((-(-len(rows) // PANEL_ROWS) * PANEL_ROWS, rows.shape[1]), np.float32)
    out[: len(rows)] = rows
    for first in range(0, len(out), PANEL_ROWS):
        panel = out[first : first + PANEL_ROWS]
        panel += panel @ correction
    return out[: len(rows)]
