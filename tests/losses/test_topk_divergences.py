"""Each divergence over a top k and its bucket, and sorted distributions, against float64 statements."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill import losses
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.losses import sparse_divergence, sparse_forward_kl, uld
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.records import TopK

N, V = 6, 200
DIVERGENCES: list[tuple[str, dict[str, float]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("js_divergence", {"beta": 0.3}),
    ("skew_kl", {"lam": 0.1}),
    ("total_variation", {}),
]
every_divergence = pytest.mark.parametrize(("name", "options"), DIVERGENCES)


def softmax(z: Any, temperature: float = 1.0) -> np.ndarray:
    z = np.array(z, np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def statement(name: str, p: np.ndarray, q: np.ndarray, beta: float = 0.5, lam: float = 0.1) -> np.ndarray:
    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * np.log(a / b)).sum(-1)

    m = beta * p + (1 - beta) * q
    forms = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js_divergence": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_kl": lambda: kl(p, lam * p + (1 - lam) * q),
        "total_variation": lambda: 0.5 * np.abs(p - q).sum(-1),
    }
    return forms[name]()


def top_k(logits: mx.array, k: int) -> TopK:
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[..., :k]
    return TopK(ids.astype(mx.int32), mx.take_along_axis(logprobs, ids, axis=-1))


def merged(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    head = np.take_along_axis(p, ids, -1)
    return np.concatenate([head, 1 - head.sum(-1, keepdims=True)], axis=-1)


@pytest.fixture
def pair() -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(3)
    return tuple(mx.array(rng.normal(size=(N, V)).astype(np.float32) * 2) for _ in range(2))  # type: ignore[return-value]


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_equals_the_statement_over_the_outcomes(
    pair: Any, name: str, options: dict[str, float], temperature: float, k: int
) -> None:
    z_q, z_p = pair
    targets, ids = top_k(z_p, k), np.array(top_k(z_p, k).ids)
    partition = np.log((softmax(z_p) ** (1 / temperature)).sum(-1))
    got = sparse_divergence(
        z_q,
        targets,
        divergence=name,
        temperature=temperature,
        log_partition=mx.array(partition.astype(np.float32)),
        **options,
    )
    p, q = (merged(softmax(z, temperature), ids) for z in (z_p, z_q))
    want = temperature**2 * statement(name, p, q, **options)
    # The teacher's tail is one minus a sum of float32 numbers: its logarithm is as exact as it is large.
    rounding = 1e-6 * temperature**2 / p[:, -1]
    assert (np.abs(np.array(got) - want) <= 1e-4 * np.abs(want) + 1e-5 + rounding).all()


@every_divergence
def test_the_whole_vocabulary_is_the_full_divergence(pair: Any, name: str, options: dict[str, float]) -> None:
    z_q, z_p = pair
    full = getattr(losses, name)
    value, gradient = mx.value_and_grad(
        lambda z: sparse_divergence(z, top_k(z_p, V), divergence=name, **options).sum()
    )(z_q)
    want, want_gradient = mx.value_and_grad(lambda z: full(z, z_p, **options).sum())(z_q)
    assert value.item() == pytest.approx(want.item(), rel=2e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(want_gradient), atol=2e-6)


def test_unused_slots_are_no_outcomes(pair: Any) -> None:
    z_q, z_p = pair
    exact = top_k(z_p, 4)
    padded = TopK(
        mx.concatenate([exact.ids, exact.ids[:, :2]], axis=1),
        mx.concatenate([exact.logprobs, mx.full((N, 2), LOWEST)], axis=1),
    )
    for name, options in DIVERGENCES:
        np.testing.assert_allclose(
            np.array(sparse_divergence(z_q, padded, divergence=name, **options)),
            np.array(sparse_divergence(z_q, exact, divergence=name, **options)),
            rtol=1e-5,
            atol=1e-6,
        )


def test_forward_kl_is_that_of_the_other_form(pair: Any) -> None:
    z_q, z_p = pair
    targets = top_k(z_p, 8)
    np.testing.assert_allclose(
        np.array(sparse_divergence(z_q, targets, divergence="forward_kl")),
        np.array(sparse_forward_kl(z_q, targets)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_temperature_needs_the_partition(pair: Any) -> None:
    z_q, z_p = pair
    with pytest.raises(ConfigError, match="at temperature 2 needs the teacher's partition"):
        sparse_divergence(z_q, top_k(z_p, 4), temperature=2.0)
    with pytest.raises(DataError, match="positions"):
        sparse_divergence(z_q[:2], top_k(z_p, 4))


def test_sorted_distributions_know_no_tokens(pair: Any) -> None:
    """A permutation of the vocabulary has a loss of zero: why this is a baseline only."""
    z_q, _ = pair
    value, gradient = mx.value_and_grad(lambda z: uld(z, top_k(z_q[:, ::-1], 8)).sum())(z_q)
    assert abs(value.item()) < 1e-5
    assert np.isfinite(np.array(gradient)).all()
    with pytest.raises(DataError, match="positions"):
        uld(z_q[:2], top_k(z_q, 4))


def test_a_teacher_with_more_listed_tokens_than_the_student_has_columns(pair: Any) -> None:
    z_q, z_p = pair
    student, targets = z_q[:, :5], top_k(z_p, 8)
    p, q = np.exp(np.array(targets.logprobs, np.float64)), -np.sort(-softmax(student), axis=-1)
    want = np.abs(p[:, :5] - q).sum(-1) + (1 - p[:, :5].sum(-1))
    np.testing.assert_allclose(np.array(uld(student, targets)), want, rtol=1e-4, atol=1e-5)
