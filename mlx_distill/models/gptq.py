"""Rounding with error feedback (GPTQ) on the grid of any quantization mode.

Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mlx_distill.models.grids import Scales, grid_steps, round_columns
from mlx_distill.models.quantization import Quantization

DAMPING = 0.01
_BLOCK_COLUMNS = 128
# Products are of so many rows at a time, padded: their last bits depend on the number of rows. Slices of a
# weight that begin at multiples of it are rounded as the whole weight is.
PANEL_ROWS = 256


@dataclass(frozen=True)
class ColumnFactor:
    """What error feedback needs of a Hessian, the same for all rows of a weight.

    Attributes:
        order: The columns by falling diagonal.
        factor: :func:`inverse_factor` of the Hessian in that order.
    """

    order: np.ndarray
    factor: Float[np.ndarray, "i i"]


def column_factor(hessian: Float[np.ndarray, "i i"], damping: float = DAMPING) -> ColumnFactor:
    """The order of the columns, and the factor of the damped Hessian."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    return ColumnFactor(order, inverse_factor(hessian[np.ix_(order, order)], damping))


def gptq(
    weight: Float[np.ndarray, "o i"],
    factor: ColumnFactor,
    scales: Scales,
    quantization: Quantization,
) -> Float[np.ndarray, "o i"]:
    r"""The weights that, each rounded to the nearest value of its grid, have a small error of the output.

    It minimises :math:`\mathrm{tr}\,(W - Q) H (W - Q)^T` column by column, in the order of the falling
    diagonal of :math:`H' = H + \lambda\,\overline{\mathrm{diag}\,H}\, I`: with :math:`U` the upper Cholesky
    factor of :math:`H'^{-1} = U^T U`, column j is rounded, :math:`e = (w_j - q_j) / U_{jj}`, and
    :math:`w_k \mathrel{-}= U_{jk}\, e` for all later columns. The scales are chosen before, from the original
    weights, so the order of the columns is free. Later columns are updated a block at a time. Rows do not
    depend on each other: a large weight can be rounded some rows at a time, with the same
    bits if each part begins at a multiple of :data:`PANEL_ROWS`.

    Args:
        weight: ``[out, in]``, float32.
        factor: Of H, the mean of :math:`x x^T` over the inputs, by :func:`column_factor`.
        scales: Of :func:`~mlx_distill.models.grids.find_scales`.
        quantization: Mode, bits and group size.

    Returns:
        The compensated weights: each column as it was before it was rounded.
    """
    order = factor.order
    scale, bias = grid_steps(scales, quantization, slice(0, weight.shape[1]))
    # Transposed, so that a column is contiguous in memory.
    steps = np.ascontiguousarray(scale[:, order].T)
    shifts = None if bias is None else np.ascontiguousarray(bias[:, order].T)
    del scale, bias
    padded = -(-len(weight) // PANEL_ROWS) * PANEL_ROWS
    columns = np.zeros((weight.shape[1], padded), np.float32)
    columns[:, : len(weight)] = weight[:, order].T
    _round_in_order(columns, factor.factor, steps, shifts, quantization)
    out = np.empty(weight.shape, np.float32)
    out[:, order] = columns[:, : len(weight)].T
    return out


def damped(hessian: Float[np.ndarray, "i i"], damping: float) -> Float[np.ndarray, "i i"]:
    """A Hessian plus ``damping`` times the mean of its diagonal, or the identity if that is 0, in float64."""
    matrix = np.array(hessian, np.float64)
    mean = float(np.mean(np.diag(matrix)))
    matrix[np.diag_indices_from(matrix)] += damping * mean if mean > 0 else 1.0
    return matrix


def inverse_factor(hessian: Float[np.ndarray, "i i"], damping: float = DAMPING) -> Float[np.ndarray, "i i"]:
    """The upper triangular U with ``U^T U`` the inverse of the damped Hessian, in float32.

    The Cholesky factor of the matrix with rows and columns reversed is a factor of it from the other end,
    whose inverse is U. It is computed in float64.
    """
    upper = np.linalg.cholesky(damped(hessian, damping)[::-1, ::-1])[::-1, ::-1]
    return np.ascontiguousarray(np.linalg.inv(upper), np.float32)


def _round_in_order(
    columns: Float[np.ndarray, "i p"],
    factor: Float[np.ndarray, "i i"],
    scale: Float[np.ndarray, "i o"],
    bias: Float[np.ndarray, "i o"] | None,
    quantization: Quantization,
) -> None:
    """Replace each column by what it is when it is rounded; what is behind the ``o`` rows is padding."""
    rows = slice(0, scale.shape[1])
    for block in _slices(len(columns), _BLOCK_COLUMNS):
        part, inner = columns[block, rows], factor[block, block]
        errors = np.zeros((len(part), columns.shape[1]), np.float32)
        for j, column in enumerate(part):
            shift = None if bias is None else bias[block][j]
            rounded = round_columns(column, scale[block][j], shift, quantization)
            errors[j, rows] = (column - rounded) / inner[j, j]
            part[j + 1 :] -= inner[j, j + 1 :, None] * errors[j, rows]
        later = factor[block, block.stop :].T
        for panel in _slices(columns.shape[1], PANEL_ROWS):
            columns[block.stop :, panel] -= later @ errors[:, panel]


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
