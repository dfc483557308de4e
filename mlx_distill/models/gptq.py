"""Rounding with error feedback (GPTQ) on the grid of any quantization mode.

Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from mlx_distill.models.grids import Scales, grid_steps, round_columns
from mlx_distill.models.quantization import Quantization

DAMPING = 0.01
_BLOCK_COLUMNS = 128
_CHUNK = 1 << 24  # weights that are rounded at a time; rows do not depend on each other


def gptq(
    weight: Float[np.ndarray, "o i"],
    hessian: Float[np.ndarray, "i i"],
    scales: Scales,
    quantization: Quantization,
    *,
    damping: float = DAMPING,
) -> Float[np.ndarray, "o i"]:
    r"""The weights that, each rounded to the nearest value of its grid, have a small error of the output.

    It minimises :math:`\mathrm{tr}\,(W - Q) H (W - Q)^T` column by column, in the order of the falling
    diagonal of :math:`H' = H + \lambda\,\overline{\mathrm{diag}\,H}\, I`: with :math:`U` the upper Cholesky
    factor of :math:`H'^{-1} = U^T U`, column j is rounded, :math:`e = (w_j - q_j) / U_{jj}`, and
    :math:`w_k \mathrel{-}= U_{jk}\, e` for all later columns. The scales are chosen before, from the original
    weights, so the order of the columns is free. Later columns are updated a block at a time.

    Args:
        weight: ``[out, in]``, float32.
        hessian: ``[in, in]``, the mean of :math:`x x^T` over the inputs.
        scales: Of :func:`~mlx_distill.models.grids.find_scales`.
        quantization: Mode, bits and group size.
        damping: :math:`\lambda`.

    Returns:
        The compensated weights: each column as it was before it was rounded.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = inverse_factor(hessian[np.ix_(order, order)], damping)
    scale, bias = grid_steps(scales, quantization, slice(0, weight.shape[1]))
    out = np.empty(weight.shape, np.float32)
    for rows in _slices(weight.shape[0], max(_CHUNK // weight.shape[1], 1)):
        # Transposed, so that a column is contiguous in memory.
        columns = np.ascontiguousarray(weight[rows][:, order].T, np.float32)
        steps = np.ascontiguousarray(scale[rows][:, order].T)
        shifts = None if bias is None else np.ascontiguousarray(bias[rows][:, order].T)
        _round_in_order(columns, factor, steps, shifts, quantization)
        part = np.empty(columns.shape[::-1], np.float32)
        part[:, order] = columns.T
        out[rows] = part
    return out


def inverse_factor(hessian: Float[np.ndarray, "i i"], damping: float = DAMPING) -> Float[np.ndarray, "i i"]:
    """The upper triangular U with ``U^T U`` the inverse of the damped Hessian, in float32.

    The Cholesky factor of the matrix with rows and columns reversed is a factor of it from the other end,
    whose inverse is U. It is computed in float64.
    """
    matrix = np.array(hessian, np.float64)
    mean = float(np.mean(np.diag(matrix)))
    matrix[np.diag_indices_from(matrix)] += damping * mean if mean > 0 else 1.0
    upper = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return np.ascontiguousarray(np.linalg.inv(upper), np.float32)


def _round_in_order(
    columns: Float[np.ndarray, "i o"],
    factor: Float[np.ndarray, "i i"],
    scale: Float[np.ndarray, "i o"],
    bias: Float[np.ndarray, "i o"] | None,
    quantization: Quantization,
) -> None:
    """Replace each column by what it is when it is rounded."""
    for block in _slices(len(columns), _BLOCK_COLUMNS):
        part, inner = columns[block], factor[block, block]
        errors = np.empty_like(part)
        for j, column in enumerate(part):
            shift = None if bias is None else bias[block][j]
            errors[j] = (column - round_columns(column, scale[block][j], shift, quantization)) / inner[j, j]
            part[j + 1 :] -= inner[j, j + 1 :, None] * errors[j]
        columns[block.stop :] -= factor[block, block.stop :].T @ errors


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
