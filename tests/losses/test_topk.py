from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import DataError
from mlx_distill.losses import forward_kl, sparse_forward_kl, sparse_linear_kl
from mlx_distill.losses.topk import within_columns
from mlx_distill.records import TopK

N, V = 6, 200


def top_k(logits: mx.array, k: int) -> TopK:
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[..., :k]
    return TopK(ids.astype(mx.int32), mx.take_along_axis(logprobs, ids, axis=-1))


def pair(scale: float = 2.0) -> tuple[mx.array, mx.array]:
    return scale * mx.random.normal((N, V)), scale * mx.random.normal((N, V))


def bucketed(z_q: mx.array, targets: TopK) -> np.ndarray:
    """Top k and tail by the plain formula, float64, temperature 1."""
    z = np.array(z_q, np.float64)
    q = np.exp(z - z.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    q = np.take_along_axis(q, np.array(targets.ids), -1)
    p = np.exp(np.array(targets.logprobs, np.float64))
    r_p, r_q = 1 - p.sum(-1), 1 - q.sum(-1)
    return (p * np.log(p / q)).sum(-1) + r_p * np.log(r_p / r_q)


@pytest.mark.parametrize("k", [1, 5, 64])
def test_equals_the_plain_formula(k: int) -> None:
    z_q, z_p = pair()
    targets = top_k(z_p, k)
    np.testing.assert_allclose(
        np.array(sparse_forward_kl(z_q, targets)), bucketed(z_q, targets), rtol=1e-4, atol=2e-6
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 5, 64, V])
def test_zero_with_zero_gradient_at_equality(k: int, temperature: float) -> None:
    """Unlike for a zero-padded or a renormalised top k."""
    z, _ = pair()
    targets = top_k(z, k)
    value, grad = mx.value_and_grad(lambda q: sparse_forward_kl(q, targets, temperature=temperature).sum())(z)
    assert abs(value.item()) <= 5e-6 * temperature**2
    assert mx.abs(grad).max().item() <= 2e-6 * max(1, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_whole_vocabulary_is_the_full_divergence_at_any_temperature(temperature: float) -> None:
    z_q, z_p = pair()
    targets = top_k(z_p, V)
    value, grad = mx.value_and_grad(lambda q: sparse_forward_kl(q, targets, temperature=temperature).sum())(
        z_q
    )
    full, full_grad = mx.value_and_grad(lambda q: forward_kl(q, z_p, temperature=temperature).sum())(z_q)
    assert value.item() == pytest.approx(full.item(), rel=2e-5)
    np.testing.assert_allclose(np.array(grad), np.array(full_grad), atol=1e-5)


def test_never_above_the_full_divergence_and_closer_with_more_targets() -> None:
    z_q, z_p = pair()
    bounds = [np.array(sparse_forward_kl(z_q, top_k(z_p, k))) for k in (1, 4, 16, 64)]
    bounds.append(np.array(forward_kl(z_q, z_p)))
    for lower, upper in pairwise(bounds):
        assert (lower <= upper + 1e-5).all()
        assert (lower >= -1e-6).all()


def test_gradient_at_temperature_one_moves_mass_in_and_out_of_the_tail() -> None:
    z_q, z_p = pair()
    targets = top_k(z_p, 8)
    grad = np.array(mx.grad(lambda q: sparse_forward_kl(q, targets).sum())(z_q))
    ids, p = np.array(targets.ids), np.exp(np.array(targets.logprobs, np.float64))
    q = np.array(mx.softmax(z_q, axis=-1), np.float64)
    r_p, r_q = 1 - p.sum(-1), 1 - np.take_along_axis(q, ids, -1).sum(-1)
    want = q * (1 - r_p / r_q)[:, None]
    np.put_along_axis(want, ids, np.take_along_axis(q, ids, -1) - p, -1)
    np.testing.assert_allclose(grad, want, atol=2e-6)


def test_confident_student_keeps_an_exact_tail() -> None:
    """One minus the sum would be zero here, and its logarithm infinite."""
    z_q = mx.array([[40.0, 0.0, 1.0, -1.0]])
    targets = TopK(mx.array([[0]]), mx.log(mx.array([[0.9]])))
    tail = np.log(np.exp([0.0, 1.0, -1.0]).sum()) - 40
    want = 0.9 * np.log(0.9) + 0.1 * (np.log(0.1) - tail)
    value, grad = mx.value_and_grad(lambda q: sparse_forward_kl(q, targets).sum())(z_q)
    assert value.item() == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(np.array(grad)[0].sum(), 0, atol=1e-6)
    assert grad[0, 0].item() == pytest.approx(0.1, rel=1e-4)


def test_rounded_cache_may_sum_to_more_than_one() -> None:
    z = mx.array([[8.0, 1.0, 0.0, -9.0]])
    exact = top_k(z, 3)
    coarse = TopK(exact.ids, exact.logprobs.astype(mx.float16) + 0.001)
    value = sparse_forward_kl(z, coarse)
    assert np.isfinite(value.item())
    assert abs(value.item()) < 2e-3


def test_masked_student_columns_leave_no_nan() -> None:
    z = mx.array([[2.0, 1.0, -float("inf"), -float("inf")]])
    targets = top_k(mx.array([[2.0, 1.0, -40.0, -40.0]]), 2)
    value, grad = mx.value_and_grad(lambda q: sparse_forward_kl(q, targets).sum())(z)
    assert abs(value.item()) < 1e-2
    assert np.isfinite(np.array(grad)).all()


def test_temperature_does_not_change_the_mass_of_the_tail() -> None:
    """A student with the teacher's top k and tail mass has a loss of zero at every temperature."""
    z_q, _ = pair()
    targets = top_k(z_q, 8)
    tail = mx.put_along_axis(mx.zeros((N, V)), targets.ids, mx.array(1.0), axis=-1) == 0
    # Shuffling the tail keeps its mass.
    other = np.array(z_q)
    for row, free in enumerate(np.array(tail)):
        other[row, free] = other[row, free][::-1]
    for temperature in (1.0, 3.0):
        assert (
            mx.abs(sparse_forward_kl(mx.array(other), targets, temperature=temperature)).max().item() < 1e-5
        )


def test_targets_of_other_positions_are_refused() -> None:
    z_q, z_p = pair()
    with pytest.raises(DataError, match="positions"):
        sparse_forward_kl(z_q[:3], top_k(z_p, 4))
    with pytest.raises(DataError, match="token_group_kl"):
        sparse_forward_kl(z_q[:, :3], top_k(z_p, 4))


@pytest.mark.parametrize(("k", "t"), [(5, 1.0), (V, 1.0), (V, 4.0)])
def test_a_teacher_with_more_columns_is_compared_over_the_shared_ones(k: int, t: float) -> None:
    z_q, z_p = pair()
    z_p[:, 150] += 6  # likely, and beyond the student's columns
    wide = top_k(z_p, k)
    ids, logprobs = within_columns(np.array(wide.ids), np.array(wide.logprobs), 120)
    assert ids.max() < 120 and (np.array(wide.ids) >= 120).any()
    p = np.exp(np.array(wide.logprobs, np.float64))
    beyond = np.array(wide.ids) >= 120
    p = np.where(beyond, 0, p) / (1 - np.where(beyond, p, 0).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.exp(logprobs).sum(-1), p.sum(-1), rtol=1e-5)
    got = np.array(sparse_forward_kl(z_q[:, :120], TopK(mx.array(ids), mx.array(logprobs)), temperature=t))
    if k == V:
        wanted = np.array(forward_kl(z_q[:, :120], z_p[:, :120], temperature=t))
    else:
        q = np.array(mx.softmax(z_q[:, :120], axis=-1), np.float64)
        q = np.take_along_axis(q, np.where(beyond, 0, np.array(wide.ids)), -1)
        terms = np.where(beyond, 0, p * np.log(np.where(beyond, 1, p) / q))
        r_p, r_q = 1 - p.sum(-1), 1 - np.where(beyond, 0, q).sum(-1)
        wanted = terms.sum(-1) + r_p * np.log(r_p / r_q)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-6)


def test_a_top_k_wholly_beyond_the_students_columns_says_nothing() -> None:
    ids, logprobs = within_columns(np.array([[9, 8]]), np.log(np.array([[0.75, 0.25]], np.float32)), 8)
    value, grad = mx.value_and_grad(
        lambda z: sparse_forward_kl(z, TopK(mx.array(ids), mx.array(logprobs))).sum()
    )(mx.random.normal((1, 8)))
    assert value.item() == 0 and mx.abs(grad).max().item() == 0


def test_ids_beyond_the_students_columns_are_not_a_number_instead_of_other_memory() -> None:
    z_q, z_p = pair()
    targets = top_k(z_p, 5)
    targets.ids[2, 1] = V
    dense = np.array(sparse_forward_kl(z_q, targets))
    head = mx.random.normal((V, 4))
    tiled = np.array(sparse_linear_kl(mx.random.normal((N, 4)), head, targets))
    for values in (dense, tiled):
        assert np.flatnonzero(np.isnan(values)).tolist() == [2]
