"""The tiled losses against their dense forms on logits: value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_distill import losses
from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.losses import (
    DIVERGENCES,
    linear_cross_entropy,
    linear_divergence,
    linear_rows,
    sparse_forward_kl,
    sparse_linear_kl,
)
from mlx_distill.losses.divergences import TRACED, Divergence, Maths
from mlx_distill.losses.output_head import head_weight, project, soft_capped
from mlx_distill.records import TopK

N, V, D, E = 6, 2500, 32, 64  # two tiles of columns, the second not full
WEIGHTS = mx.arange(1.0, N + 1)


def normal(*shape: int, scale: float = 1.0) -> mx.array:
    return scale * mx.random.normal(shape)


def both(loss: Callable[..., mx.array], *arguments: mx.array) -> tuple[float, list[np.ndarray]]:
    """A weighted sum, so that a gradient without the cotangent is noticed, and its gradients."""
    value, grads = mx.value_and_grad(lambda a: (loss(*a) * WEIGHTS).sum())(list(arguments))
    return value.item(), [np.array(g) for g in grads]


def assert_same(
    got: tuple[float, list[np.ndarray]], want: tuple[float, list[np.ndarray]], tolerance: float = 5e-5
) -> None:
    assert got[0] == pytest.approx(want[0], rel=tolerance, abs=2e-5)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def trainable_head(weight: mx.array) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = weight
    return head


def top_k(logits: mx.array, k: int) -> TopK:
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[..., :k]
    return TopK(ids.astype(mx.int32), mx.take_along_axis(logprobs, ids, axis=-1))


every_block = pytest.mark.parametrize("block_rows", [512, 4], ids=["one block", "blocks of 4 rows"])


@every_block
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_equals_the_dense_form(name: str, temperature: float, block_rows: int) -> None:
    h, t, w, u = normal(N, D), normal(N, E), normal(V, D, scale=0.4), normal(V, E, scale=0.3)
    want = both(lambda h: getattr(losses, name)(h @ w.T, t @ u.T, temperature=temperature), h)
    got = both(
        lambda h: linear_divergence(
            h, w, t, u, divergence=name, temperature=temperature, block_rows=block_rows
        ),
        h,
    )
    assert_same(got, want)


def test_an_entry_without_a_derivative_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    def variance(log_q: mx.array, log_p: mx.array, maths: Maths = TRACED) -> mx.array:
        return mx.square(maths.exp(log_q) - maths.exp(log_p))

    monkeypatch.setitem(DIVERGENCES, "variance", Divergence(variance))  # type: ignore[arg-type]
    h, t, w, u = normal(N, D), normal(N, E), normal(V, D, scale=0.4), normal(V, E, scale=0.3)
    p = mx.softmax(t @ u.T, axis=-1)
    want = both(lambda h: mx.square(mx.softmax(h @ w.T, axis=-1) - p).sum(axis=-1), h)
    assert_same(both(lambda h: linear_divergence(h, w, t, u, divergence="variance", block_rows=4), h), want)


@pytest.mark.parametrize("rows", [512, 4], ids=["one slice", "slices of 4 rows"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_trainable_head_gets_its_gradient(name: str, temperature: float, rows: int) -> None:
    h, t, w, u = normal(N, D), normal(N, E), normal(V, D, scale=0.4), normal(V, E, scale=0.3)
    want = both(lambda h, w: getattr(losses, name)(h @ w.T, t @ u.T, temperature=temperature), h, w)
    head = trainable_head(w)

    def loss(h: mx.array, w: mx.array) -> mx.array:
        head.weight = w
        return linear_rows(
            lambda z, at: getattr(losses, name)(z, t[at] @ u.T, temperature=temperature), h, head, rows=rows
        )

    assert_same(both(loss, h, w), want)


@pytest.mark.parametrize(
    ("option", "value"),
    [("beta", 0.0), ("beta", 0.2), ("beta", 1.0), ("lam", 0.0), ("lam", 0.5), ("lam", 1.0)],
)
def test_options_reach_the_tiles(option: str, value: float) -> None:
    name = {"beta": "js_divergence", "lam": "skew_kl"}[option]
    h, t, w, u = normal(N, D), normal(N, E), normal(V, D, scale=0.4), normal(V, E, scale=0.3)
    want = both(lambda h: getattr(losses, name)(h @ w.T, t @ u.T, **{option: value}), h)
    got = both(lambda h: linear_divergence(h, w, t, u, divergence=name, **{option: value}), h)
    assert got[0] == pytest.approx(want[0], rel=2e-5, abs=2e-5)
    np.testing.assert_allclose(got[1][0], want[1][0], atol=5e-5 * np.abs(want[1][0]).max() + 5e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_equality(name: str) -> None:
    h, w = normal(N, D), normal(V, D, scale=0.4)
    value, (grad,) = both(lambda x: linear_divergence(x, w, h, w, divergence=name), h)
    assert abs(value) < 1e-4
    assert np.abs(grad).max() < 1e-4


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js_divergence"])
def test_gradient_is_as_exact_as_float32_allows(name: str) -> None:
    """Against float64; where two large terms nearly cancel, the dense form has the same error."""
    h, t, w, u = normal(N, D), normal(N, E), normal(V, D, scale=0.4), normal(V, E, scale=0.3)
    got = mx.grad(lambda x: linear_divergence(x, w, t, u, divergence=name).sum())(h)
    z_q, z_p = (np.array(a, np.float64) @ np.array(b, np.float64).T for a, b in ((h, w), (t, u)))
    q, p = (np.exp(z - z.max(1, keepdims=True)) for z in (z_q, z_p))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    m = (p + q) / 2
    g = {
        "forward_kl": lambda: q - p,
        "reverse_kl": lambda: q * (np.log(q / p) - (q * np.log(q / p)).sum(1, keepdims=True)),
        "js_divergence": lambda: 0.5 * q * (np.log(q / m) - (q * np.log(q / m)).sum(1, keepdims=True)),
    }[name]()
    want = g @ np.array(w, np.float64)
    assert np.abs(np.array(got) - want).max() <= (5e-6 if name == "forward_kl" else 3e-5) * np.abs(want).max()


@every_block
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 16, V])
def test_sparse_equals_the_dense_form(k: int, temperature: float, block_rows: int) -> None:
    h, w, targets = normal(N, D), normal(V, D, scale=0.4), top_k(normal(N, V, scale=3.0), k)
    want = both(lambda h: sparse_forward_kl(h @ w.T, targets, temperature=temperature), h)
    got = both(lambda h: sparse_linear_kl(h, w, targets, temperature=temperature, block_rows=block_rows), h)
    assert_same(got, want)


@every_block
def test_cross_entropy_equals_the_dense_form(block_rows: int) -> None:
    h, w, labels = normal(N, D), normal(V, D, scale=0.4), mx.array([0, 5, 2047, 2048, V - 1, 5])
    want = both(lambda h, w: nn.losses.cross_entropy(h @ w.T, labels), h, w)
    got = both(lambda h: linear_cross_entropy(h, w, labels, block_rows=block_rows), h)
    assert_same(got, (want[0], want[1][:1]))
    head = trainable_head(w)

    def loss(h: mx.array, w: mx.array) -> mx.array:
        head.weight = w
        return linear_rows(
            lambda z, at: nn.losses.cross_entropy(z, labels[at]), h, head, rows=min(block_rows, N)
        )

    assert_same(both(loss, h, w), want)


def test_rows_give_any_loss_of_logits() -> None:
    h, w, targets = normal(N, D), normal(V, D, scale=0.4), top_k(normal(N, V, scale=3.0), 8)
    want = both(lambda h: sparse_forward_kl(h @ w.T, targets), h)
    for rows in (1, 4, 64):
        got = both(
            partial(
                linear_rows,
                lambda z, at: sparse_forward_kl(z, TopK(targets.ids[at], targets.logprobs[at])),
                head=w,
                rows=rows,
            ),
            h,
        )
        assert_same(got, want)


def heads() -> dict[str, Any]:
    linear, biased, embedding = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=True), nn.Embedding(V, D)
    return {
        "linear": linear,
        "linear with bias": biased,
        "embedding": embedding,
        "quantized linear": nn.QuantizedLinear.from_linear(linear, group_size=32, bits=4),
        "quantized linear with bias": nn.QuantizedLinear.from_linear(biased, group_size=32, bits=8),
        "quantized embedding": nn.QuantizedEmbedding.from_embedding(embedding, group_size=32, bits=4),
        "mxfp4 linear": nn.QuantizedLinear.from_linear(linear, group_size=32, bits=4, mode="mxfp4"),
        "mxfp4 embedding": nn.QuantizedEmbedding.from_embedding(
            embedding, group_size=32, bits=4, mode="mxfp4"
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "soft-capped"])
@pytest.mark.parametrize("layer", heads())
def test_any_layer_as_head(layer: str, softcap: float | None) -> None:
    module = heads()[layer]
    head = head_weight(module, softcap)
    h, t, u, labels = normal(N, D), normal(N, E), normal(V, E, scale=0.3), mx.random.randint(0, V, (N,))
    targets = top_k(t @ u.T, 8)
    for name in ("forward_kl", "js_divergence"):
        for temperature in (1.0, 2.0):
            dense = partial(getattr(losses, name), temperature=temperature)
            tiled = partial(linear_divergence, divergence=name, temperature=temperature)
            assert_same(
                both(lambda h, tiled=tiled: tiled(h, head, t, u), h),
                both(lambda h, dense=dense: dense(project(module, h, softcap), t @ u.T), h),
                1e-4,
            )
    assert_same(
        both(lambda h: sparse_linear_kl(h, head, targets), h),
        both(lambda h: sparse_forward_kl(project(module, h, softcap), targets), h),
        1e-4,
    )
    want = both(lambda h: nn.losses.cross_entropy(project(module, h, softcap), labels), h)
    assert_same(both(lambda h: linear_cross_entropy(h, head, labels), h), want, 1e-4)
    assert_same(
        both(lambda h: linear_rows(lambda z, at: nn.losses.cross_entropy(z, labels[at]), h, head, rows=4), h),
        want,
        1e-4,
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_soft_capped_logits_of_both_models(name: str, temperature: float) -> None:
    """Small caps, so that the derivative of tanh is far from 1."""
    h, t, w, u = normal(N, D), normal(N, E), normal(V, D, scale=0.4), normal(V, E, scale=0.3)
    loss = getattr(losses, name)
    want = both(
        lambda h: loss(soft_capped(h @ w.T, 1.5), soft_capped(t @ u.T, 2.5), temperature=temperature), h
    )
    student, teacher = head_weight(w, softcap=1.5), head_weight(u, softcap=2.5)
    got = both(
        lambda h: linear_divergence(h, student, t, teacher, divergence=name, temperature=temperature), h
    )
    assert_same(got, want)
    plain = both(lambda h: linear_divergence(h, w, t, u, divergence=name, temperature=temperature), h)
    assert abs(plain[0] - want[0]) > 0.1 * abs(want[0])


def test_gradient_reaches_a_bfloat16_trunk() -> None:
    h, t, w, u = (
        normal(N, D).astype(mx.bfloat16),
        normal(N, E),
        normal(V, D, scale=0.4),
        normal(V, E, scale=0.3),
    )
    grad = mx.grad(lambda h: linear_divergence(h, w.astype(mx.bfloat16), t, u).sum())(h)
    want = mx.grad(
        lambda h: losses.forward_kl(h @ w.astype(mx.bfloat16).astype(mx.float32).T, t @ u.T).sum()
    )(h.astype(mx.float32))
    assert grad.dtype == mx.bfloat16
    np.testing.assert_allclose(
        np.array(grad.astype(mx.float32)), np.array(want), atol=0.01 * mx.abs(want).max().item()
    )


def test_behind_a_trunk_in_a_module() -> None:
    """As in training: parameters traced, head and batch by closure."""
    trunk, head, t, u = nn.Linear(8, D), nn.Linear(D, V, bias=False), normal(2, 3, E), normal(V, E, scale=0.3)
    x = normal(2, 3, 8)
    tiled = nn.value_and_grad(trunk, lambda: linear_divergence(mx.tanh(trunk(x)), head, t, u).sum())()
    plain = nn.value_and_grad(trunk, lambda: losses.forward_kl(head(mx.tanh(trunk(x))), t @ u.T).sum())()
    assert tiled[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(np.array(tiled[1][name]), np.array(plain[1][name]), atol=1e-5)


def test_tied_head_in_training_gets_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, D)

    model, ids, labels = Tied(), mx.random.randint(0, V, (N,)), mx.random.randint(0, V, (N,))
    tiled = nn.value_and_grad(
        model,
        lambda: linear_rows(
            lambda z, at: nn.losses.cross_entropy(z, labels[at]),
            mx.tanh(model.embed(ids)),
            model.embed,
            rows=4,
        ).sum(),
    )()
    plain = nn.value_and_grad(
        model, lambda: nn.losses.cross_entropy(model.embed.as_linear(mx.tanh(model.embed(ids))), labels).sum()
    )()
    np.testing.assert_allclose(
        np.array(tiled[1]["embed"]["weight"]), np.array(plain[1]["embed"]["weight"]), atol=1e-5
    )


@pytest.mark.parametrize("name", ["forward_kl", "js_divergence", "sparse", "cross_entropy"])
def test_memory_does_not_grow_with_the_vocabulary(name: str) -> None:
    n, v, d = 64, 32_768, 32
    h, w, labels = normal(n, d), normal(v, d, scale=0.3), mx.zeros((n,), mx.int32)
    targets = TopK(mx.broadcast_to(mx.arange(8), (n, 8)), mx.full((n, 8), -3.0))
    mx.eval(h, w, labels, targets.ids, targets.logprobs)
    calls: dict[str, Callable[[mx.array], mx.array]] = {
        "sparse": lambda h: sparse_linear_kl(h, w, targets),
        "cross_entropy": lambda h: linear_cross_entropy(h, w, labels),
    }
    call = calls.get(name, lambda x: linear_divergence(x, w, h, w, divergence=name))
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(lambda x: call(x).sum())(h))
    assert mx.get_peak_memory() - base < n * v * 4  # one copy of the logits; the plain form holds several


def test_keeps_leading_axes_and_accepts_no_rows() -> None:
    h, w, labels = normal(2, 3, D), normal(V, D), mx.zeros((2, 3), mx.int32)
    assert linear_divergence(h, w, h, w).shape == (2, 3)
    assert linear_cross_entropy(h, w, labels).shape == (2, 3)
    empty = mx.zeros((0, D))
    assert linear_divergence(empty, w, empty, w).shape == (0,)
    assert linear_cross_entropy(empty, w, labels.reshape(-1)[:0]).shape == (0,)
    assert sparse_linear_kl(empty, w, TopK(mx.zeros((0, 4), mx.int32), mx.zeros((0, 4)))).shape == (0,)


def test_bad_input_is_refused_with_a_fix() -> None:
    h, w, labels = normal(N, D), normal(V, D), mx.zeros((N,), mx.int32)
    with pytest.raises(ModelError, match=r"2500 columns and the teacher's 2499"):
        linear_divergence(h, w, h, w[:-1])
    with pytest.raises(ModelError, match="width 31"):
        linear_divergence(h[:, :-1], w, h, w)
    with pytest.raises(ConfigError, match=r"unknown divergence 'kl'.*forward_kl"):
        linear_divergence(h, w, h, w, divergence="kl")
    with pytest.raises(DataError, match="label -100"):
        linear_cross_entropy(h, w, labels - 100)
    with pytest.raises(DataError, match="label 2500"):
        linear_cross_entropy(h, w, labels + V)
    with pytest.raises(ConfigError, match=r"unknown option 'alpha'.*beta, lam"):
        linear_divergence(h, w, h, w, alpha=0.5)
    with pytest.raises(ModelError, match="LayerNorm cannot be read"):
        head_weight(nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="rows is 0"):
        linear_rows(lambda z, at: z[:, 0], h, w, rows=0)
