"""The battery: tests that every divergence passes. A new divergence is one line in BATTERY."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill import losses
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses.divergences import pointwise_form, summand, summand_and_derivative
from mlx_distill.losses.numerics import row_logsumexp, row_sum

N, V, D, E = 5, 300, 16, 24


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def js(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name, options, the same formula in float64 on probabilities
BATTERY: list[tuple[str, dict[str, float], Callable[..., np.ndarray]]] = [
    ("forward_kl", {}, kl),
    ("reverse_kl", {}, lambda p, q: kl(q, p)),
    ("js_divergence", {"beta": 0.5}, lambda p, q: js(p, q, 0.5)),
    ("js_divergence", {"beta": 0.1}, lambda p, q: js(p, q, 0.1)),
    ("js_divergence", {"beta": 0.0}, kl),
    ("js_divergence", {"beta": 1.0}, lambda p, q: kl(q, p)),
    ("skew_kl", {"lam": 0.1}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    ("skew_kl", {"lam": 0.0}, kl),
    ("skew_kl", {"lam": 1.0}, lambda p, q: kl(p, p)),
    ("total_variation", {}, lambda p, q: 0.5 * np.abs(p - q).sum(-1)),
]
every_divergence = pytest.mark.parametrize(
    ("name", "options", "reference"), BATTERY, ids=[f"{n}-{o}" for n, o, _ in BATTERY]
)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])


def logits(seed: int, scale: float = 2.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(N, V)).astype(np.float32) * scale)


def exact(z_q: mx.array, z_p: mx.array, reference: Callable[..., np.ndarray], t: float) -> np.ndarray:
    return t**2 * reference(softmax(np.array(z_p, np.float64) / t), softmax(np.array(z_q, np.float64) / t))


@every_divergence
@every_temperature
def test_equals_float64(name: str, options: dict[str, float], reference: Any, temperature: float) -> None:
    z_q, z_p = logits(1), logits(2)
    got = getattr(losses, name)(z_q, z_p, temperature=temperature, **options)
    np.testing.assert_allclose(np.array(got), exact(z_q, z_p, reference, temperature), rtol=2e-5, atol=2e-6)


@every_divergence
@every_temperature
def test_gradient_equals_float64_finite_differences(
    name: str, options: dict[str, float], reference: Any, temperature: float
) -> None:
    z_q, z_p = logits(1), logits(2)
    weights = np.arange(1.0, N + 1)
    grad = mx.grad(
        lambda z: (
            getattr(losses, name)(z, z_p, temperature=temperature, **options) * mx.array(weights, mx.float32)
        ).sum()
    )(z_q)
    base = np.array(z_q, np.float64)
    for row, column in [(0, 3), (2, 0), (4, V - 1)]:
        step = np.zeros_like(base)
        step[row, column] = 1e-6
        p = softmax(np.array(z_p, np.float64) / temperature)
        ends = [
            temperature**2 * reference(p, softmax((base + s * step) / temperature)) @ weights for s in (1, -1)
        ]
        assert grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=2e-6)


@every_divergence
@every_temperature
def test_zero_with_zero_gradient_at_equality(
    name: str, options: dict[str, float], reference: Any, temperature: float
) -> None:
    z = logits(3, scale=5.0)
    value, grad = mx.value_and_grad(
        lambda q: getattr(losses, name)(q, z, temperature=temperature, **options).sum()
    )(z + 0.5)
    assert abs(value.item()) <= 1e-5 * temperature**2
    if name != "total_variation":  # an absolute value has a kink there
        assert mx.abs(grad).max().item() <= 1e-5 * temperature


@every_divergence
def test_never_negative_beyond_rounding(name: str, options: dict[str, float], reference: Any) -> None:
    z = logits(4, scale=8.0)
    for size in (0.0, 1e-4, 1e-2, 1.0, 10.0):
        assert getattr(losses, name)(z + size * logits(5), z, **options).min().item() >= -2e-6


@every_divergence
def test_unchanged_by_a_constant_added_to_logits(
    name: str, options: dict[str, float], reference: Any
) -> None:
    z_q, z_p = logits(1), logits(2)
    moved = getattr(losses, name)(z_q + 30.0, z_p - 20.0, **options)
    np.testing.assert_allclose(
        np.array(moved), np.array(getattr(losses, name)(z_q, z_p, **options)), rtol=1e-5, atol=2e-5
    )


@every_divergence
def test_masked_columns_change_nothing(name: str, options: dict[str, float], reference: Any) -> None:
    z_q, z_p = logits(1), logits(2)
    mask = mx.full((N, 7), -float("inf"))
    padded = [mx.concatenate([z, mask], axis=-1) for z in (z_q, z_p)]
    value, grad = mx.value_and_grad(lambda q: getattr(losses, name)(q, padded[1], **options).sum())(padded[0])
    plain, plain_grad = mx.value_and_grad(lambda q: getattr(losses, name)(q, z_p, **options).sum())(z_q)
    assert value.item() == pytest.approx(plain.item(), rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(np.array(grad[:, :V]), np.array(plain_grad), atol=1e-6)
    assert mx.abs(grad[:, V:]).max().item() == 0


@every_divergence
def test_teacher_gets_no_gradient(name: str, options: dict[str, float], reference: Any) -> None:
    z_q, z_p = logits(1), logits(2)
    assert mx.abs(mx.grad(lambda p: getattr(losses, name)(z_q, p, **options).sum())(z_p)).max().item() == 0


@every_divergence
def test_bfloat16_logits_are_computed_in_float32(
    name: str, options: dict[str, float], reference: Any
) -> None:
    z_q, z_p = logits(1).astype(mx.bfloat16), logits(2).astype(mx.bfloat16)
    got = getattr(losses, name)(z_q, z_p, **options)
    assert got.dtype == mx.float32
    np.testing.assert_allclose(
        np.array(got),
        exact(z_q.astype(mx.float32), z_p.astype(mx.float32), reference, 1.0),
        rtol=2e-5,
        atol=2e-6,
    )


@every_divergence
def test_keeps_leading_axes_and_averages_nothing(
    name: str, options: dict[str, float], reference: Any
) -> None:
    z_q, z_p = logits(1), logits(2)
    plain = getattr(losses, name)(z_q, z_p, **options)
    stacked = getattr(losses, name)(z_q.reshape(1, N, V), z_p.reshape(1, N, V), **options)
    assert stacked.shape == (1, N)
    assert mx.array_equal(stacked[0], plain)
    assert getattr(losses, name)(z_q[0], z_p[0], **options).shape == ()


@every_divergence
def test_other_vocabulary_is_refused_with_a_fix(name: str, options: dict[str, float], reference: Any) -> None:
    with pytest.raises(ModelError, match=r"300 columns and the teacher's 299.*token_group_kl"):
        getattr(losses, name)(logits(1), logits(2)[:, :-1], **options)


@every_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_temperature_is_refused(
    name: str, options: dict[str, float], reference: Any, temperature: float
) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        getattr(losses, name)(logits(1), logits(2), temperature=temperature, **options)


@every_divergence
def test_the_derivative_of_the_summand_is_that_of_the_chain_rule(
    name: str, options: dict[str, float], reference: Any
) -> None:
    """Entries of the registry may state their derivative; the tiled form relies on it, and computes both with
    NumPy's exp where it is the faster one.
    """
    log_q, log_p = (mx.log(mx.softmax(logits(seed), axis=-1)) for seed in (1, 2))
    _, pointwise = pointwise_form(name, options)
    f, derivative = summand_and_derivative(pointwise, log_q, log_p)
    plain, (chain,) = mx.vjp(lambda x: summand(pointwise, x, log_p), [log_q], [mx.ones_like(log_q)])
    for found, wanted in ((f, plain[0]), (derivative, chain)):
        most = mx.abs(wanted).max().item()
        np.testing.assert_allclose(np.array(found), np.array(wanted), atol=2e-8 + 1e-6 * most)


def test_impossible_mixing_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"beta is 1\.5"):
        losses.js_divergence(logits(1), logits(2), beta=1.5)
    with pytest.raises(ConfigError, match=r"lam is -0\.1"):
        losses.skew_kl(logits(1), logits(2), lam=-0.1)


def test_upper_bounds() -> None:
    a, b = mx.array([[100.0, 0.0]]), mx.array([[0.0, 100.0]])
    assert losses.total_variation(a, b).item() == pytest.approx(1.0)
    assert losses.js_divergence(a, b).item() == pytest.approx(np.log(2))


def test_row_sums_are_right_over_150_000_columns() -> None:
    x = np.random.default_rng(0).normal(size=(4, 151_936)).astype(np.float32)
    e = np.exp(x)
    np.testing.assert_allclose(np.array(row_sum(mx.array(e))), e.astype(np.float64).sum(-1), rtol=1e-6)
    want = np.log(np.exp(x.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(np.array(row_logsumexp(mx.array(x))), want, atol=2e-6)
