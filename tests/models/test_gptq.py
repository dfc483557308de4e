"""GPTQ against the plain elimination, column by column, in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.models.gptq import DAMPING, column_factor, gptq, inverse_factor
from mlx_distill.models.grids import Scales, find_scales, grid_steps, round_columns, round_to_grid
from mlx_distill.models.quantization import Quantization, parse_mode


def case(outputs: int = 24, columns: int = 192, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Hessian of correlated inputs with some large channels."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(600, 40)) @ random.normal(size=(40, columns))
    inputs += 0.5 * random.normal(size=inputs.shape)
    inputs[:, :3] *= 8
    weight = (0.05 * random.standard_t(5, (outputs, columns))).astype(np.float32)
    return weight, inputs.T @ inputs / len(inputs)


def plain(weight: np.ndarray, hessian: np.ndarray, scales: Scales, q: Quantization) -> np.ndarray:
    """After each column the inverse of the Hessian of the remaining ones, by one step of elimination."""
    left, inverse = (
        weight.astype(np.float64),
        hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian)),
    )
    inverse = np.linalg.inv(inverse)
    scale, bias = grid_steps(scales, q, slice(0, weight.shape[1]))
    latent = np.empty_like(weight)
    for j in np.argsort(-np.diag(hessian), kind="stable"):
        latent[:, j] = left[:, j]
        shift = None if bias is None else bias[:, j]
        error = left[:, j] - round_columns(latent[:, j], scale[:, j], shift, q)
        left -= np.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j] = inverse[:, j] = 0
    return latent


def output_error(weight: np.ndarray, values: mx.array, hessian: np.ndarray) -> float:
    difference = weight - np.array(values)
    return float(np.einsum("oi,ij,oj->", difference, hessian, difference))


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", "affine2", "affine3", "affine4", "affine6"])
def test_blocks_equal_the_plain_elimination_and_beat_the_nearest_values(mode: str) -> None:
    q = parse_mode(mode)
    weight, hessian = case()
    scales = find_scales(mx.array(weight), q, mx.array(np.diag(hessian).astype(np.float32)))
    found = gptq(weight, column_factor(hessian), scales, q)
    wanted = plain(weight, hessian, scales, q)
    values = [np.array(round_to_grid(mx.array(x), scales, q)) for x in (found, wanted)]
    # A column at a threshold may fall on the other side in float32, and its row then differs from there on.
    assert np.mean(values[0] == values[1]) > 0.97
    same = np.all(values[0] == values[1], axis=1)
    assert same.mean() > 0.6
    assert np.abs(found - wanted)[same].max() < 1e-4
    errors = [output_error(weight, mx.array(v), hessian) for v in values]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    nearest = output_error(weight, round_to_grid(mx.array(weight), scales, q), hessian)
    assert errors[0] < 0.75 * nearest


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = case(columns=64)
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(64)
    factor = inverse_factor(hessian).astype(np.float64)
    assert np.allclose(factor, np.triu(factor))
    assert np.abs(factor.T @ factor @ damped - np.eye(64)).max() < 1e-4


def test_rows_do_not_depend_on_each_other_and_unused_columns_are_rounded_to_nearest() -> None:
    q = parse_mode("affine4")
    weight, hessian = case(columns=64)
    hessian[5] = hessian[:, 5] = 0
    scales = find_scales(mx.array(weight), q)
    factor = column_factor(hessian)
    found = gptq(weight, factor, scales, q)
    assert np.array_equal(found[:, 5], weight[:, 5])
    part = Scales(scales.scale[3:4], scales.bias[3:4] if scales.bias is not None else None)
    assert np.allclose(gptq(weight[3:4], factor, part, q), found[3:4], atol=1e-5)
    assert np.array_equal(gptq(weight, column_factor(np.zeros_like(hessian)), scales, q), weight)
