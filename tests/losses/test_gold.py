"""GOLD against a float64 statement, against TRL where TRL is right, and what TRL's formula lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.losses import TokenGroups, build_token_groups, gold, js_divergence, token_bytes
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.records import TopK

GOLDEN = dict(np.load(Path(__file__).parent.parent / "golden" / "losses.npz"))
STUDENT, TEACHER = GOLDEN["student_logits"][:, :31], GOLDEN["teacher_logits"]
SAME = GOLDEN["gold.same"]
SETTINGS = [(beta, t) for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for t in (1.0, 2.0)]


def make_groups(same: np.ndarray, student: int) -> TokenGroups:
    """Groups of which only the equal tokens matter."""
    none = np.full(student, 99, np.int32)
    return TokenGroups(none, np.full(len(same), 99, np.int32), 100, int((same >= 0).sum()), same)


GROUPS = make_groups(SAME, 31)


def softmax(z: np.ndarray, t: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max(-1, keepdims=True)).astype(np.float64) / t)
    return e / e.sum(-1, keepdims=True)


def top_k(z: np.ndarray, k: int, t: float = 1.0) -> TopK:
    logs = np.log(softmax(z, t))
    ids = np.argsort(-logs, axis=-1)[:, :k].astype(np.int32)
    return TopK(mx.array(ids), mx.array(np.take_along_axis(logs, ids, 1).astype(np.float32)))


def bucket(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    """The summand of the outcome that TRL lacks."""
    if beta in (0, 1):
        p, q = (p, q) if beta == 0 else (q, p)
        return p * np.log(p / q)
    m = beta * p + (1 - beta) * q
    return beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)


@pytest.mark.parametrize(("beta", "t"), SETTINGS)
def test_equals_trl_but_for_the_outcome_that_it_lacks(beta: float, t: float) -> None:
    p, q = softmax(TEACHER, t), softmax(STUDENT, t)
    matched = np.flatnonzero(SAME >= 0)
    rest = bucket(1 - p[:, matched].sum(1), 1 - q[:, SAME[matched]].sum(1), beta)
    key, share = f"gold.{beta}.{t}", len(matched) / len(SAME)
    want = share * (GOLDEN[f"{key}.matched"] + t**2 * rest) + (1 - share) * GOLDEN[f"{key}.unmatched"]
    got = gold(mx.array(STUDENT), top_k(TEACHER, 37, t), GROUPS, temperature=t, beta=beta)
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_trl_counts_less_than_nothing_where_the_outcome_is_left_out() -> None:
    assert GOLDEN["gold_below_zero.matched"].max() < -0.05
    student = mx.array(GOLDEN["gold_below_zero.student"])
    found = gold(student, top_k(TEACHER, 37, 4.0), GROUPS, beta=0.0)
    assert np.array(found).min() > 0.01


@pytest.mark.parametrize(("beta", "t"), SETTINGS)
def test_with_one_vocabulary_it_is_trls_divergence_and_ours(beta: float, t: float) -> None:
    student, one = mx.array(GOLDEN["student_logits"]), make_groups(np.arange(37, dtype=np.int32), 37)
    targets, key = top_k(TEACHER, 37, t), f"gold_one.{beta}.{t}"

    def loss(z: mx.array) -> mx.array:
        return gold(z, targets, one, temperature=t, beta=beta)

    np.testing.assert_allclose(loss(student), GOLDEN[f"{key}.matched"], rtol=2e-5)
    want = js_divergence(student, mx.array(TEACHER), temperature=t, beta=beta)
    np.testing.assert_allclose(loss(student), want, rtol=2e-5)
    gradient = GOLDEN[f"{key}.matched_grad"]
    found = mx.grad(lambda z: loss(z).sum())(student)
    np.testing.assert_allclose(found, gradient, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_gradient_of_the_unmatched_part_is_trls(t: float) -> None:
    nothing = np.full(37, -1, np.int32)
    targets = top_k(TEACHER, 37, t)

    def loss(same: np.ndarray) -> Any:
        groups = make_groups(same, 31)
        return mx.grad(lambda z: gold(z, targets, groups, temperature=t).sum())(mx.array(STUDENT))

    share = float((SAME >= 0).mean())
    matched, unmatched = (GOLDEN[f"gold.0.5.{t}.{part}_grad"] for part in ("matched", "unmatched"))
    parts = share * matched + (1 - share) * unmatched
    # What is left is the outcome that TRL lacks, whose gradient is along q_M as a whole.
    q = softmax(STUDENT, t)
    inside = np.zeros(31, bool)
    inside[SAME[SAME >= 0]] = True
    left = np.array(loss(SAME)) - parts
    direction = q * (inside - q[:, inside].sum(1, keepdims=True))
    along = (left * direction).sum(1, keepdims=True) / (direction**2).sum(1, keepdims=True)
    np.testing.assert_allclose(left, along * direction, atol=2e-6)
    assert np.isfinite(np.array(loss(nothing))).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_a_top_k_is_a_lower_bound_and_zero_at_equality(beta: float, k: int) -> None:
    whole = np.array(gold(mx.array(STUDENT), top_k(TEACHER, 37), GROUPS, beta=beta))
    part = np.array(gold(mx.array(STUDENT), top_k(TEACHER, k), GROUPS, beta=beta))
    assert (part <= whole + 1e-6).all() and (part > 0).all()
    # A student that gives equal tokens the same and the others the same in another order.
    p = softmax(TEACHER)
    equal = np.zeros((len(p), 40))
    matched, left = np.flatnonzero(SAME >= 0), np.flatnonzero(SAME < 0)
    equal[:, SAME[matched]] = p[:, matched]
    free = np.setdiff1d(np.arange(40), SAME[matched])[::-1][: len(left)]
    equal[:, free] = p[:, left]
    z = mx.array(np.log(np.maximum(equal, 1e-30)).astype(np.float32))
    found = gold(z, top_k(TEACHER, k), make_groups(SAME, 40), beta=beta)
    np.testing.assert_allclose(found, 0, atol=2e-6)


def test_which_token_has_a_probability_matters_only_where_it_is_shared() -> None:
    other = STUDENT.copy()
    alone = np.setdiff1d(np.arange(31), SAME)
    other[:, alone] = other[:, alone[::-1]]
    shared = STUDENT.copy()
    both = SAME[SAME >= 0]
    shared[:, both] = shared[:, both[::-1]]
    plain, moved, swapped = (
        np.array(gold(mx.array(z), top_k(TEACHER, 12), GROUPS)) for z in (STUDENT, other, shared)
    )
    np.testing.assert_allclose(moved, plain, rtol=1e-5)
    assert np.abs(swapped - plain).min() > 1e-3


def test_unused_slots_and_padding_columns_do_not_count() -> None:
    targets = top_k(TEACHER, 6)
    more = TopK(
        mx.concatenate([targets.ids, mx.full((6, 2), 0, dtype=mx.int32)], axis=1),
        mx.concatenate([targets.logprobs, mx.full((6, 2), LOWEST)], axis=1),
    )
    wide = mx.concatenate([mx.array(STUDENT), mx.full((6, 5), -mx.inf)], axis=1)
    want = gold(mx.array(STUDENT), targets, GROUPS)
    np.testing.assert_allclose(gold(mx.array(STUDENT), more, GROUPS), want, rtol=1e-5)
    np.testing.assert_allclose(gold(wide, targets, GROUPS), want, rtol=1e-5)


def test_equal_tokens_are_those_of_equal_bytes_and_others_are_written_with_several(tokenizers: Any) -> None:
    ours, theirs = (token_bytes(tokenizer) for tokenizer in tokenizers)
    stops = [tokenizer.token_to_id(name) for tokenizer, name in zip(
        tokenizers, ("<|return|>", "<|im_end|>"), strict=True)]  # fmt: skip
    groups = build_token_groups(*tokenizers, student_stop=stops[0], teacher_stop=stops[1])
    same = groups.same_token
    assert same is not None and len(same) == len(theirs)
    assert len(set(same[same >= 0].tolist())) == (same >= 0).sum()
    assert same[stops[1]] == stops[0]
    pad = theirs.index(b"")
    assert same[pad] == ours.index(b"")  # special, of the same text
    ordinary = [i for i in range(len(theirs)) if theirs[i]]
    assert all(same[i] < 0 or theirs[i] == ours[same[i]] for i in ordinary)
    assert all(same[i] >= 0 for i in ordinary if theirs[i] in ours)
    assert (same >= 0).sum() == groups.shared + 2
    pieces = groups.pieces
    assert pieces is not None
    for s, token in enumerate(ours):
        written = b"".join(theirs[t] for t in pieces[s] if t >= 0)
        assert token.startswith(written) and (written == token or not written or (pieces[s] >= 0).all())
    assert (pieces[same[same >= 0], 0] == np.flatnonzero(same >= 0)).all()
    assert (pieces[same[same >= 0], 1:] < 0).all() and (pieces[:, 1] >= 0).any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="for 3 positions"):
        gold(mx.array(STUDENT[:3]), top_k(TEACHER, 4), GROUPS)
    with pytest.raises(ModelError, match="for a tokenizer of 31"):
        gold(mx.array(STUDENT[:, :9]), top_k(TEACHER, 4), GROUPS)
    with pytest.raises(ConfigError, match="which tokens"):
        gold(mx.array(STUDENT), top_k(TEACHER, 4), TokenGroups(*[np.zeros(3, np.int32)] * 2, 2, 1))
    with pytest.raises(ConfigError, match="beta"):
        gold(mx.array(STUDENT), top_k(TEACHER, 4), GROUPS, beta=2.0)
