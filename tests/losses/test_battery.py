"""The battery of all token-level losses: what each entry of the registry has to pass.

A new loss is one line in ``STATEMENTS``, its formula in float64. That chunking, packing, the batches and the
ranks change nothing is in tests/train/test_objective.py and test_invariants.py, for the same registry.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.given_logits import GivenLogits
from helpers.top_k_row import top_k_row

from mlx_distill.distill.align import collate_aligned_rows
from mlx_distill.distill.token_losses import TOKEN_LOSSES, TokenLossInput, divergence_options
from mlx_distill.losses import TokenGroups
from mlx_distill.recipe import DistillConfig

N, V, W, K = 6, 40, 37, 8
# Of two vocabularies: the first 20 tokens of the teacher are tokens of the student, in another order, and the
# others of both belong to their groups.
_SAME = np.where(np.arange(W) < 20, (np.arange(W) * 7) % V, -1).astype(np.int32)
_STUDENT_GROUP = (np.arange(V) % 20).astype(np.int32)
_STUDENT_GROUP[_SAME[:20]] = np.arange(20)
# Tokens that the student shares are one of the teacher's, others two of them or none.
_PIECES = np.full((V, 4), -1, dtype=np.int32)
_PIECES[:, :2] = np.stack([np.arange(V) * 3 % W, np.arange(V) * 5 % W], axis=1)
_PIECES[_SAME[:20], :2] = np.stack([np.arange(20), np.full(20, -1)], axis=1)
_PIECES[np.setdiff1d(np.arange(V), _SAME)[:4], :2] = -1
TWO = TokenGroups(_STUDENT_GROUP, (np.arange(W) % 20).astype(np.int32), 21, 20, _SAME, _PIECES)
_EACH = np.arange(V, dtype=np.int32)
ONE = TokenGroups(_EACH, _EACH, V + 1, V, _EACH, _EACH[:, None])


class Outcomes(NamedTuple):
    """Probabilities in float64: of student ``[n, v]`` and teacher ``[n, w]``, at T and at 1; the listed ids
    of the teacher; the groups.
    """

    q: np.ndarray
    p: np.ndarray
    q1: np.ndarray
    p1: np.ndarray
    ids: np.ndarray
    t: float
    groups: TokenGroups


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0).sum(-1)


def js(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)


def merged(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The listed outcomes and one more for all others."""
    head = np.take_along_axis(x, ids, -1)
    return np.concatenate([head, np.maximum(1 - head.sum(-1, keepdims=True), 0)], axis=-1)


def over_top_k(divergence: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda o: o.t**2 * divergence(merged(o.p, o.ids), merged(o.q, o.ids))


def sums(x: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    out = np.zeros((len(x), count))
    for i, g in enumerate(group):
        out[:, g] += x[:, i]
    return out


def softened(x: np.ndarray, t: float) -> np.ndarray:
    return x ** (1 / t) / (x ** (1 / t)).sum(-1, keepdims=True)


def group_kl(o: Outcomes) -> np.ndarray:
    """Over all groups: with fewer listed tokens than all of them the loss is a lower bound."""
    p, q = (
        sums(x, group, o.groups.count - 1)
        for x, group in ((o.p1, o.groups.teacher), (o.q1, o.groups.student))
    )
    return o.t**2 * kl(softened(p, o.t), softened(q, o.t))


def sorted_distance(o: Outcomes) -> np.ndarray:
    p, q = (-np.sort(-x, axis=-1) for x in (o.p, o.q))
    p, q = (np.pad(x, ((0, 0), (0, 50 - x.shape[1]))) for x in (p, q))
    k = o.ids.shape[1]
    p, q = (np.concatenate([x[:, :k], x[:, k:].sum(-1, keepdims=True)], axis=-1) for x in (p, q))
    return np.abs(p - q).sum(-1)


def shared_and_sorted(o: Outcomes) -> np.ndarray:
    """Over the whole vocabulary: with fewer listed tokens the loss is a lower bound."""
    same = o.groups.same_token
    assert same is not None
    matched = np.flatnonzero(same >= 0)
    p, q = o.p[:, matched], o.q[:, same[matched]]
    divergence = js(*(np.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (p, q)))
    own = np.delete(o.q, same[matched], axis=1), np.delete(o.p, matched, axis=1)
    q, p = (np.pad(-np.sort(-x, axis=-1), ((0, 0), (0, 50 - x.shape[1]))) for x in own)
    share = len(matched) / len(same)
    return share * o.t**2 * divergence + (1 - share) * np.abs(p - q).sum(-1)


def projected_kl(o: Outcomes) -> np.ndarray:
    assert o.groups.pieces is not None
    projected = np.zeros_like(o.p)
    for s, pieces in enumerate(o.groups.pieces):
        pieces = pieces[pieces >= 0]
        for i, token in enumerate(pieces):
            projected[:, token] += o.q[:, s] * 0.1**i / (0.1 ** np.arange(len(pieces))).sum()
    reached = np.isin(np.arange(o.p.shape[1]), o.groups.pieces)
    return o.t**2 * kl(merged(np.where(reached, o.p, 0), o.ids), merged(projected, o.ids))


def likelihoods(o: Outcomes) -> np.ndarray:
    """Each token a span of its own, and token 0 the text."""
    a, b = np.exp(np.log(o.p1[:, 0]) / 100 - 1e-6), np.exp(np.log(o.q1[:, 0]) / 100 - 1e-6)
    return 100 * (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)))


STATEMENTS: dict[str, Callable[[Outcomes], np.ndarray]] = {
    "kl": over_top_k(kl),
    "reverse_kl": over_top_k(lambda p, q: kl(q, p)),
    "js_divergence": over_top_k(js),
    "skew_kl": over_top_k(lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "total_variation": over_top_k(lambda p, q: 0.5 * np.abs(p - q).sum(-1)),
    "token_groups": group_kl,
    "alm": likelihoods,
    "uld": sorted_distance,
    "gold": shared_and_sorted,
    "x_token": projected_kl,
}
# The statement is of the whole vocabulary, and what a top k tells is a lower bound of it.
BOUNDS = ("token_groups", "gold")
# A derivative that jumps at equality.
KINKS = ("total_variation", "uld", "gold")
every_loss = pytest.mark.parametrize("name", TOKEN_LOSSES)
every_top_k = pytest.mark.parametrize(
    "name", [name for name, loss in TOKEN_LOSSES.items() if loss.events == "start_index"]
)
every_temperature = pytest.mark.parametrize("t", [0.5, 1.0, 3.0])


def normal(seed: int, width: int, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(N, width))).astype(np.float32)


def groups_of(name: str) -> TokenGroups:
    return ONE if TOKEN_LOSSES[name].needs == "same_tokenizer" else TWO


def teacher_logits(name: str, seed: int = 2) -> np.ndarray:
    return normal(seed, len(groups_of(name).teacher))


def make_loss(
    name: str, teacher: np.ndarray, k: int = K, t: float = 1.0, groups: TokenGroups | None = None
) -> Callable[[mx.array], mx.array]:
    """A registry entry as a function of the student's logits, with targets as a cache has them."""
    loss = TOKEN_LOSSES[name]
    own = t if loss.over_tokens else 1.0
    extra = collate_aligned_rows([top_k_row(teacher, k, own)], [0], 0, 1).extra
    options = divergence_options(DistillConfig(token_loss=name))

    def call(z: mx.array) -> mx.array:
        def nats() -> mx.array:
            return mx.logsumexp(z, axis=-1) - z[:, 0]

        return loss.loss(TokenLossInput(GivenLogits(z), extra, nats, groups or groups_of(name), t, options))

    return call


def softmax(z: np.ndarray, t: float = 1.0) -> np.ndarray:
    z = z.astype(np.float64) / t
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def exact(name: str, student: np.ndarray, teacher: np.ndarray, k: int = K, t: float = 1.0) -> np.ndarray:
    ids = np.argsort(-teacher, axis=-1, kind="stable")[:, :k]
    parts = softmax(student, t), softmax(teacher, t), softmax(student), softmax(teacher)
    return STATEMENTS[name](Outcomes(*parts, ids, t, groups_of(name)))


def test_every_loss_of_the_registry_has_its_statement() -> None:
    assert STATEMENTS.keys() == TOKEN_LOSSES.keys()


@every_loss
@every_temperature
def test_equals_the_statement_in_float64(name: str, t: float) -> None:
    student, teacher = normal(1, V), teacher_logits(name)
    for k in (teacher.shape[1],) if name in BOUNDS else (1, K, teacher.shape[1]):
        want = exact(name, student, teacher, k, t)
        got = np.array(make_loss(name, teacher, k, t)(mx.array(student)))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), k


@every_loss
@every_temperature
def test_the_gradient_is_that_of_finite_differences(name: str, t: float) -> None:
    student, teacher = normal(1, V), teacher_logits(name)
    k = teacher.shape[1] if name in BOUNDS else K
    weights = np.arange(1.0, N + 1)
    call = make_loss(name, teacher, k, t)
    gradient = np.array(mx.grad(lambda z: (call(z) * mx.array(weights, mx.float32)).sum())(mx.array(student)))
    listed = np.argsort(-teacher, axis=-1)[:, 0]
    for row, column in [(0, 0), (2, 3), (5, V - 1), (3, int(listed[3]))]:
        ends = []
        for step in (1e-5, -1e-5):
            moved = student.astype(np.float64)
            moved[row, column] += step
            ends.append(exact(name, moved, teacher, k, t) @ weights)
        want = (ends[0] - ends[1]) / 2e-5
        assert gradient[row, column] == pytest.approx(
            want, rel=1e-3, abs=1e-4 * float(np.abs(gradient).max())
        )


@every_loss
@every_temperature
@pytest.mark.parametrize("k", [1, K, V])
def test_zero_with_zero_gradient_at_equality(name: str, t: float, k: int) -> None:
    z = normal(3, V, scale=4.0)
    call = make_loss(name, z, k, t, groups=ONE)
    value, gradient = mx.value_and_grad(lambda x: call(x).sum())(mx.array(z) + 0.5)
    assert abs(value.item()) <= 2e-5 * max(t, 1) ** 2
    if name not in KINKS:
        assert mx.abs(gradient).max().item() <= 1e-5 * max(t, 1)


@every_top_k
@every_temperature
def test_a_top_k_is_a_lower_bound_that_rises_to_the_whole(name: str, t: float) -> None:
    student, teacher = mx.array(normal(1, V)), teacher_logits(name)
    values = [np.array(make_loss(name, teacher, k, t)(student)) for k in (1, 4, 16, teacher.shape[1])]
    if name == "token_groups" and t != 1:  # softens what is listed: no bound
        values = values[-1:]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-5 * np.abs(more).max()).all()
    assert all((value > -1e-6).all() for value in values) and (values[-1] > 1e-3).all()


@every_loss
@every_temperature
def test_padded_columns_and_a_constant_change_nothing(name: str, t: float) -> None:
    student, call = mx.array(normal(1, V)), make_loss(name, teacher_logits(name), K, t)
    padded = mx.concatenate([student + 7.0, mx.full((N, 5), -mx.inf)], axis=1)
    want, by_logit = mx.value_and_grad(lambda z: call(z).sum())(student)
    got, by_padded = mx.value_and_grad(lambda z: call(z).sum())(padded)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    np.testing.assert_allclose(by_padded[:, :V], by_logit, atol=2e-5 * mx.abs(by_logit).max().item())
    assert mx.abs(by_padded[:, V:]).max().item() == 0


# --- a top k needs its tail ---------------------------------------------------------------------------------


def trained(call: Callable[[mx.array], mx.array], student: np.ndarray) -> np.ndarray:
    """The student's logits after 120 steps of Adam."""
    z, gradient = {"z": mx.array(student)}, mx.grad(lambda z: call(z).sum())
    optimizer = optim.Adam(optim.cosine_decay(0.12, 120, 0.003))
    for _ in range(120):
        z = optimizer.apply_gradients({"z": gradient(z["z"])}, z)
        mx.eval(z, optimizer.state)
    return np.array(z["z"])


def test_a_reverse_kl_over_the_top_k_alone_collapses() -> None:
    """The student hides its mass where the loss does not look: verl#5041."""
    teacher = normal(2, V)
    ids = np.argsort(-teacher, axis=-1)[:, :K]
    log_p = mx.array(np.log(np.take_along_axis(softmax(teacher), ids, 1)).astype(np.float32))

    def alone(z: mx.array) -> mx.array:
        log_q = mx.take_along_axis(z - mx.logsumexp(z, axis=-1, keepdims=True), mx.array(ids), axis=-1)
        return (mx.exp(log_q) * (log_q - log_p)).sum(axis=-1)

    kept = np.take_along_axis(softmax(trained(alone, normal(1, V))), ids, 1).sum(-1)
    assert (kept < 0.6 * np.exp(np.array(log_p)).sum(-1)).all()


@every_top_k
def test_with_the_tail_no_student_ends_below_the_teachers_mass(name: str) -> None:
    teacher = normal(2, V)
    ids = np.argsort(-teacher, axis=-1)[:, :K]
    ours = trained(make_loss(name, teacher, K, groups=ONE), normal(1, V))
    if name == "uld":  # knows no tokens: its listed outcomes are the largest
        kept = -np.sort(-softmax(ours), axis=-1)[:, :K].sum(-1)
    else:
        kept = np.take_along_axis(softmax(ours), ids, 1).sum(-1)
    assert (kept > np.take_along_axis(softmax(teacher), ids, 1).sum(-1) - 0.05).all()
