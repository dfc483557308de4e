"""Against the field's references (TRL, torchtune, torch); made by tests/golden/make_losses.py."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_distill import losses
from mlx_distill.records import TopK

GOLDEN = dict(np.load(Path(__file__).parent.parent / "golden" / "losses.npz"))
STUDENT, TEACHER = mx.array(GOLDEN["student_logits"]), mx.array(GOLDEN["teacher_logits"])
KEYS = sorted(key.removesuffix(".value") for key in GOLDEN if key.endswith(".value"))


def assert_close(got: mx.array, want: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(got), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def settings(kind: str) -> list[tuple[str, list[float]]]:
    """Golden keys such as jsd.0.5.2.0 with their numbers: beta, temperature."""
    keys = [key for key in KEYS if key.startswith(f"{kind}.")]
    return [
        (key, [float(".".join(pair)) for pair in zip(*[iter(key.split(".")[1:])] * 2, strict=True)])
        for key in keys
    ]


@pytest.mark.parametrize(("key", "numbers"), settings("jsd"))
def test_jensen_shannon_equals_trl(key: str, numbers: list[float]) -> None:
    beta, t = numbers
    assert_close(losses.js_divergence(STUDENT, TEACHER, temperature=t, beta=beta), GOLDEN[f"{key}.value"])
    grad = mx.grad(lambda z: losses.js_divergence(z, TEACHER, temperature=t, beta=beta).sum())(STUDENT)
    assert_close(grad, GOLDEN[f"{key}.grad"])


@pytest.mark.parametrize(("key", "numbers"), settings("tv") + settings("skew"))
def test_variation_and_skew_equal_torch(key: str, numbers: list[float]) -> None:
    loss = losses.total_variation if key.startswith("tv") else losses.skew_kl
    assert_close(loss(STUDENT, TEACHER, temperature=numbers[0]), GOLDEN[f"{key}.value"])
    grad = mx.grad(lambda z: loss(z, TEACHER, temperature=numbers[0]).sum())(STUDENT)
    assert_close(grad, GOLDEN[f"{key}.grad"])


def test_top_k_with_a_tail_equals_trl() -> None:
    logprobs = TEACHER - mx.logsumexp(TEACHER, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[:, :5]
    targets = TopK(ids, mx.take_along_axis(logprobs, ids, axis=-1))
    assert_close(losses.sparse_forward_kl(STUDENT, targets), GOLDEN["bucket.value"])
    assert_close(
        mx.grad(lambda z: losses.sparse_forward_kl(z, targets).sum())(STUDENT), GOLDEN["bucket.grad"]
    )


@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_the_divergences_of_torchtune(name: str) -> None:
    """Its forward KL is the cross-entropy: not zero at equality, by the teacher's entropy."""
    loss = losses.forward_kl if name == "forward" else losses.reverse_kl
    log_p = np.array(TEACHER, np.float64)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    excess = -(np.exp(log_p) * log_p).sum(-1) if name == "forward" else 0.0
    assert_close(loss(STUDENT, TEACHER), GOLDEN[f"torchtune.{name}.values"] - excess)
    assert_close(mx.grad(lambda z: loss(z, TEACHER).sum())(STUDENT), GOLDEN[f"torchtune.{name}.grad"])


@pytest.mark.parametrize(("key", "numbers"), settings("fused"))
def test_head_and_divergence_in_one_equals_trl(key: str, numbers: list[float]) -> None:
    beta, t = numbers
    h, w, h_t, w_t = (mx.array(GOLDEN[name]) for name in ("h_s", "w_s", "h_t", "w_t"))
    head, teacher_logits = nn.Linear(w.shape[1], w.shape[0], bias=False), h_t @ w_t.T

    def frozen(h: mx.array) -> mx.array:
        return losses.linear_divergence(h, w, h_t, w_t, divergence="js_divergence", beta=beta, temperature=t)

    def trained(h: mx.array, w: mx.array) -> mx.array:
        head.weight = w
        return losses.linear_rows(
            lambda z, at: losses.js_divergence(z, teacher_logits[at], beta=beta, temperature=t),
            h,
            head,
            rows=4,
        )

    assert_close(frozen(h), GOLDEN[f"{key}.value"], 3e-5)
    assert_close(mx.grad(lambda h: frozen(h).sum())(h), GOLDEN[f"{key}.grad_h"], 3e-5)
    assert_close(trained(h, w), GOLDEN[f"{key}.value"], 3e-5)
    by_hidden, by_head = mx.grad(lambda h, w: trained(h, w).sum(), argnums=(0, 1))(h, w)
    assert_close(by_hidden, GOLDEN[f"{key}.grad_h"], 3e-5)
    assert_close(by_head, GOLDEN[f"{key}.grad_w"], 3e-5)


@pytest.mark.parametrize("case", range(5))
def test_spans_equal_trl(case: int) -> None:
    student, teacher = (GOLDEN[f"align.{case}.{side}"] for side in ("student", "teacher"))
    np.testing.assert_array_equal(losses.align_lengths(student, teacher), GOLDEN[f"align.{case}.spans"])
