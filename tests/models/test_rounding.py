"""Weights that are rounded some rows at a time, against whole ones."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.models.calibrate import dequantized
from mlx_distill.models.gptq import PANEL_ROWS
from mlx_distill.models.quantization import parse_mode
from mlx_distill.models.rounding import InputMoments, Rounding, round_weight

COLUMNS = 192


@pytest.mark.parametrize(
    ("mode", "feedback"), [("mxfp4", True), ("nvfp4", True), ("affine3", True), ("affine4", False)]
)
@pytest.mark.parametrize("shape", [(600, COLUMNS), (2, 300, COLUMNS)])
def test_some_rows_at_a_time_give_the_same_bits(shape: tuple[int, ...], mode: str, feedback: bool) -> None:
    random = np.random.default_rng(0)
    weight = mx.array(0.05 * random.standard_t(5, shape).astype(np.float32))
    moments = []
    for _ in range(weight.size // shape[-2] // COLUMNS):
        inputs = random.normal(size=(300, 40)) @ random.normal(size=(40, COLUMNS))
        hessian = inputs.T @ inputs / len(inputs) + 0.1 * np.eye(COLUMNS)
        moments.append(InputMoments(hessian, 0.01 * random.normal(size=hessian.shape)))
    whole, sliced, packed = (
        round_weight(weight, moments, parse_mode(mode), Rounding(feedback=feedback, **changes))
        for changes in (
            {},
            {"slice_weights": 2 * PANEL_ROWS * COLUMNS + 7},
            {"slice_weights": 1, "latents": False},
        )
    )
    for name, part in whole.parts.items():
        assert mx.array_equal(part, sliced.parts[name]), name
        assert mx.array_equal(part, packed.parts[name]), name
    assert mx.array_equal(whole.latent, sliced.latent)
    assert whole.latent.shape == shape
    assert packed.latent.size == 0


@pytest.mark.parametrize("mode", ["mxfp4", "affine4"])
def test_the_output_of_the_unquantized_model_is_what_is_approximated(mode: str) -> None:
    random = np.random.default_rng(0)
    weight = mx.array(0.05 * random.normal(size=(40, COLUMNS)).astype(np.float32))
    plain = random.normal(size=(2000, 60)) @ random.normal(size=(60, COLUMNS))
    inputs = 0.9 * plain + 0.1 * plain[:, ::-1]  # a change that a linear map undoes
    hessian, cross = inputs.T @ inputs / 2000, (plain - inputs).T @ inputs / 2000
    wanted = plain @ np.array(weight).T
    errors = []
    for moments in (InputMoments(hessian), InputMoments(hessian, cross)):
        q = parse_mode(mode)
        found = dequantized(round_weight(weight, [moments], q), q)
        errors.append(np.square(inputs @ np.array(found).T - wanted).sum() / np.square(wanted).sum())
    assert errors[1] < 0.2 * errors[0], errors
