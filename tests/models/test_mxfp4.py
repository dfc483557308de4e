"""MXFP4: packing against the specification in exact arithmetic, against MLX's, and MLX's reading against
both.
"""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.models.grids import quantize
from mlx_distill.models.quantization import parse_mode

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the fourth bit is the sign


def quantize_mxfp4(weights: mx.array) -> tuple[mx.array, mx.array]:
    """Words and scales."""
    parts = quantize(weights, parse_mode("mxfp4"))
    return parts["weight"], parts["scales"]


def plain(weights: list[float], step: int) -> tuple[int, list[int], Fraction]:
    """Scale byte, codes and lost squares of 32 weights, in fractions; ``step`` 0 is the smallest scale with
    which no weight saturates, as ``mx.quantize`` takes it.
    """
    largest = max(abs(Fraction(w)) for w in weights) / 6
    exponent = -126
    if largest:
        exponent = 0
        while Fraction(2) ** exponent >= 2 * largest:
            exponent -= 1
        while Fraction(2) ** exponent < largest:
            exponent += 1
    exponent += step
    codes, lost = [], Fraction(0)
    for w in weights:
        x = abs(Fraction(w)) / Fraction(2) ** exponent
        near = min(range(8), key=lambda c: (abs(Fraction(E2M1_VALUES[c]) - x), c % 2))
        codes.append(near | (8 if w < 0 and near else 0))
        lost += ((Fraction(E2M1_VALUES[near]) - x) * Fraction(2) ** exponent) ** 2
    return exponent + 127, codes, lost


def read(words: mx.array, scales: mx.array) -> np.ndarray:
    """The weights, by the specification: four bits each, the earlier one lower."""
    nibbles = np.array(words).view(np.uint8)
    codes = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(*scales.shape, 32)
    signs = np.where(codes & 8, -1.0, 1.0)
    out = (
        signs
        * np.array(E2M1_VALUES)[codes & 7]
        * np.exp2(np.array(scales).astype(np.float64) - 127)[..., None]
    )
    return out.reshape(*words.shape[:-1], -1).astype(np.float32)


def mlx_reads(words: mx.array, scales: mx.array) -> np.ndarray:
    return np.array(mx.dequantize(words, scales, None, 32, 4, "mxfp4", dtype=mx.float32))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(-1e4, 1e4, width=32).filter(lambda w: w == 0 or abs(w) > 1e-30), min_size=32, max_size=32
    )
)
def test_quantization_uses_the_best_of_four_scales_in_exact_fractions(weights: list[float]) -> None:
    words, scales = quantize_mxfp4(mx.array(weights, mx.float32))
    tried = {result[0]: result for result in (plain(weights, step) for step in range(-2, 2))}
    chosen = tried[scales.item()] if any(weights) else plain(weights, 0)
    codes = np.array(words).view(np.uint8)
    assert np.stack([codes & 15, codes >> 4], -1).reshape(-1).tolist() == chosen[1]
    assert float(chosen[2]) <= float(min(lost for _, _, lost in tried.values())) * (1 + 1e-5)


def test_ties_go_to_the_even_code() -> None:
    row = np.zeros(32, np.float32)
    row[:9] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25]
    assert read(*quantize_mxfp4(mx.array(row)))[:9].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0]


def test_mlx_reads_every_byte_as_the_specification_says() -> None:
    words = mx.array(np.random.default_rng(2).integers(0, 1 << 32, (3, 5, 16), np.uint32))
    scales = mx.array(np.random.default_rng(3).integers(90, 160, (3, 5, 4), np.uint8))
    assert np.array_equal(mlx_reads(words, scales), read(words, scales))


def test_requantizing_changes_no_weight() -> None:
    weights = mx.random.normal((64, 256), key=mx.random.key(1)) * 10.0 ** mx.repeat(mx.arange(-3, 5), 32)
    for quantized in (quantize_mxfp4(weights), mx.quantize(weights, 32, 4, mode="mxfp4")):
        before = mlx_reads(*quantized)
        assert np.array_equal(mlx_reads(*quantize_mxfp4(mx.array(before))), before)


@pytest.mark.parametrize("update", [0.003, 0.01, 0.03])
def test_a_small_update_does_not_throw_its_neighbours_off_the_grid(update: float) -> None:
    """Nothing but the update can be lost, where mx.quantize damages the base: fails once that chooses its
    scales as well.
    """

    def error(found: np.ndarray, wanted: np.ndarray) -> float:
        return float(np.sqrt(np.square(found - wanted).sum() / np.square(wanted).sum()))

    grid = mlx_reads(*quantize_mxfp4(mx.random.normal((64, 1024), key=mx.random.key(2))))
    changed = grid + update * np.random.default_rng(4).normal(size=grid.shape).astype(np.float32)
    assert error(mlx_reads(*quantize_mxfp4(mx.array(changed))), changed) < 1.05 * error(grid, changed)
    assert error(mlx_reads(*mx.quantize(mx.array(changed), 32, 4, mode="mxfp4")), changed) > 0.06


def test_any_leading_shape() -> None:
    weights = mx.random.normal((2, 3, 64), key=mx.random.key(5))
    words, scales = quantize_mxfp4(weights)
    assert (words.shape, scales.shape) == ((2, 3, 8), (2, 3, 2))
    flat = quantize_mxfp4(weights.reshape(6, 64))
    assert mx.array_equal(words.reshape(6, 8), flat[0])
    assert mx.array_equal(scales.reshape(6, 2), flat[1])
