from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.losses import (
    TokenGroups,
    alm,
    build_token_groups,
    forward_kl,
    linear_rows,
    span_sums,
    token_bytes,
    token_group_kl,
)
from mlx_distill.losses.cross_tokenizer import group_topk
from mlx_distill.records import TopK

N = 5


def top_k(logits: mx.array, k: int) -> TopK:
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[..., :k]
    return TopK(ids.astype(mx.int32), mx.take_along_axis(logprobs, ids, axis=-1))


def exact(z_q: mx.array, targets: TopK, groups: TokenGroups) -> np.ndarray:
    """Group by group in float64; unlisted mass goes to the lowest ratio p/q first."""
    members = np.bincount(groups.teacher, minlength=groups.count)
    z = np.array(z_q, np.float64)
    q = np.exp(z - z.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    out = []
    for row in range(len(z)):
        p: dict[int, float] = {}
        listed: dict[int, int] = {}
        for i, logprob in zip(
            np.array(targets.ids[row]), np.array(targets.logprobs[row], np.float64), strict=True
        ):
            group = groups.teacher[i] if i < len(groups.teacher) else groups.outside
            if group != groups.outside:
                p[int(group)] = p.get(int(group), 0.0) + np.exp(logprob)
                listed[int(group)] = listed.get(int(group), 0) + 1
        mass = np.bincount(groups.student, weights=q[row, : len(groups.student)], minlength=groups.count)
        r_p, r_q = 1 - sum(p.values()), 1 - sum(mass[c] for c in p)
        while r_p > 2e-6:
            has_unlisted = [c for c in p if members[c] > listed[c] and p[c] / mass[c] < r_p / r_q]
            if not has_unlisted:
                break
            lowest = min(has_unlisted, key=lambda c: p[c] / mass[c])
            r_p, r_q = r_p + p.pop(lowest), r_q + mass[lowest]
        out.append(
            sum(v * np.log(v / mass[c]) for c, v in p.items())
            + (r_p * np.log(r_p / r_q) if r_p > 1e-6 else 0.0)
        )
    return np.array(out)


@pytest.fixture(scope="module")
def groups(tokenizers: Any) -> TokenGroups:
    return build_token_groups(
        *tokenizers,
        student_stop=tokenizers.student.token_to_id("<|return|>"),
        teacher_stop=tokenizers.teacher.token_to_id("<|im_end|>"),
    )


def widths(groups: TokenGroups) -> tuple[int, int]:
    return len(groups.student), len(groups.teacher)


def test_a_tokenizer_with_itself_gives_each_token_its_own_group(tokenizers: Any) -> None:
    groups = build_token_groups(tokenizers.teacher, tokenizers.teacher)
    np.testing.assert_array_equal(groups.student, np.arange(len(groups.student)))
    np.testing.assert_array_equal(groups.teacher, groups.student)
    assert groups.count == len(groups.student) + 1


def test_every_member_of_a_group_begins_with_its_shared_token(tokenizers: Any, groups: TokenGroups) -> None:
    mine, theirs = token_bytes(tokenizers.student), token_bytes(tokenizers.teacher)
    shared = set(mine) & set(theirs) - {b""}
    assert groups.shared == len(shared)
    name = {int(groups.student[i]): token for i, token in enumerate(mine) if token in shared}
    assert len(name) == len(shared)
    for side, tokens in ((groups.student, mine), (groups.teacher, theirs)):
        for group, token in zip(side.tolist(), tokens, strict=True):
            if token:
                assert token.startswith(name[group])
            if token in shared:
                assert name[group] == token


def test_parent_is_the_first_token_of_the_re_encoding(tokenizers: Any, groups: TokenGroups) -> None:
    student, teacher = tokenizers
    mine, theirs = token_bytes(student), token_bytes(teacher)
    checked = 0
    for i, token in enumerate(theirs):
        if token and token not in mine and token.isascii():
            first = student.encode(token.decode()).ids[0]
            assert groups.teacher[i] == groups.student[first]
            checked += 1
    assert checked > 10


def test_a_chain_of_parents_ends_in_a_shared_token() -> None:
    from tokenizers import Tokenizer, decoders, models

    def tiny(vocab: list[str], merges: list[tuple[str, str]]) -> Any:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    student = tiny(["a", "b", "c", "d", "ab", "abcd"], [("a", "b"), ("ab", "c")][:1])
    teacher = tiny(["a", "b", "c", "d", "bc", "abc"], [("b", "c"), ("a", "bc")])
    groups = build_token_groups(student, teacher)
    # "abc" -> student "ab" -> teacher "a"; "abcd" -> teacher "abc" -> the same.
    assert (
        groups.teacher[5] == groups.student[4] == groups.student[5] == groups.student[0] == groups.teacher[0]
    )
    assert groups.teacher[4] == groups.student[1]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_shared_token_that_one_tokenizer_never_writes_belongs_to_what_it_writes_instead(
    swapped: bool,
) -> None:
    from tokenizers import Tokenizer, decoders, models

    def tiny(vocab: list[str], merges: list[tuple[str, str]]) -> Any:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    writes, never = tiny(["a", "b", "ab", "x"], [("a", "b")]), tiny(["a", "b", "ab", "abx", "x"], [])
    groups = build_token_groups(never, writes) if swapped else build_token_groups(writes, never)
    ours, theirs = (groups.teacher, groups.student) if swapped else (groups.student, groups.teacher)
    assert ours[0] == ours[2] == theirs[0] == theirs[2] == theirs[3]
    assert ours[1] == theirs[1] != ours[0] and ours[3] == theirs[4] != ours[0]
    assert groups.shared == 4
    # Without a token for what it writes instead the two stay together.
    lone = build_token_groups(tiny(["é", "b", "éb"], [("é", "b")]), tiny(["b", "éb"], []))
    assert lone.student[2] == lone.teacher[1] != lone.student[1] == lone.teacher[0]
    mirrored = build_token_groups(tiny(["b", "éb"], []), tiny(["é", "b", "éb"], [("é", "b")]))
    assert mirrored.teacher[2] == mirrored.student[1] != mirrored.teacher[1] == mirrored.student[0]


def test_invalid_utf_8_falls_back_to_the_longest_prefix() -> None:
    from tokenizers import Tokenizer, decoders, models

    def tiny(vocab: list[str], merges: list[tuple[str, str]]) -> Any:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    # "ðŁ" and "ðŁĳ" are the first two and three bytes of an emoji.
    groups = build_token_groups(
        tiny(["ð", "Ł", "ĳ", "ðŁ"], [("ð", "Ł")]),
        tiny(["ð", "Ł", "ĳ", "ðŁ", "ðŁĳ"], [("ð", "Ł"), ("ðŁ", "ĳ")]),
    )
    assert groups.teacher[4] == groups.student[3]


def test_stops_share_a_group_and_other_special_tokens_none(tokenizers: Any, groups: TokenGroups) -> None:
    student, teacher = tokenizers
    stop = groups.student[student.token_to_id("<|return|>")]
    assert stop == groups.teacher[teacher.token_to_id("<|im_end|>")] != groups.outside
    assert (groups.student == stop).sum() == (groups.teacher == stop).sum() == 1
    without = build_token_groups(student, teacher)
    assert without.student[student.token_to_id("<|return|>")] == without.outside
    assert without.teacher[teacher.token_to_id("<|im_end|>")] == without.outside
    # One that both have by the same name is the same.
    assert (
        without.student[student.token_to_id("<|pad|>")]
        == without.teacher[teacher.token_to_id("<|pad|>")]
        != without.outside
    )


def test_several_stops_and_unknown_ones(tokenizers: Any) -> None:
    many = build_token_groups(*tokenizers, student_stop=[0, 1], teacher_stop=1)
    assert many.student[0] == many.student[1] == many.teacher[1]
    with pytest.raises(ConfigError, match="of one model only"):
        build_token_groups(*tokenizers, student_stop=1)
    with pytest.raises(ConfigError, match="teacher_stop: the tokenizer has no token 99999"):
        build_token_groups(*tokenizers, student_stop=1, teacher_stop=99_999)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_same_tokenizer_and_whole_vocabulary_is_the_full_divergence(
    tokenizers: Any, temperature: float
) -> None:
    groups = build_token_groups(tokenizers.student, tokenizers.student)
    z_q, z_p = (2 * mx.random.normal((N, len(groups.student))) for _ in range(2))
    targets = top_k(z_p, z_p.shape[1])
    value, grad = mx.value_and_grad(
        lambda z: token_group_kl(z, targets, groups, temperature=temperature).sum()
    )(z_q)
    want, want_grad = mx.value_and_grad(lambda z: forward_kl(z, z_p, temperature=temperature).sum())(z_q)
    assert value.item() == pytest.approx(want.item(), rel=1e-4)
    np.testing.assert_allclose(np.array(grad), np.array(want_grad), atol=2e-5)


@pytest.mark.parametrize("k", [1, 8, 64])
def test_equals_group_by_group_sums(k: int, groups: TokenGroups) -> None:
    v, w = widths(groups)
    z_q, targets = 3 * mx.random.normal((N, v)), top_k(3 * mx.random.normal((N, w)), k)
    np.testing.assert_allclose(
        np.array(token_group_kl(z_q, targets, groups)), exact(z_q, targets, groups), rtol=1e-4, atol=5e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_equals_finite_differences(temperature: float, groups: TokenGroups) -> None:
    v, w = widths(groups)
    z_q, targets = mx.random.normal((N, v)), top_k(3 * mx.random.normal((N, w)), 16)
    weights = mx.arange(1.0, N + 1)

    def loss(z: mx.array) -> mx.array:
        return (token_group_kl(z, targets, groups, temperature=temperature) * weights).sum()

    grad = mx.grad(loss)(z_q)
    np.testing.assert_allclose(np.array(grad.sum(axis=1)), 0, atol=1e-5)
    for _ in range(3):
        # Along a whole direction, so that float32 sees the difference.
        step = 1e-2 * mx.random.normal(z_q.shape)
        difference = (loss(z_q + step) - loss(z_q - step)).item() / 2
        assert (grad * step).sum().item() == pytest.approx(difference, rel=2e-3, abs=1e-4)


def test_zero_where_the_students_groups_have_the_teachers_mass(groups: TokenGroups) -> None:
    v, w = widths(groups)
    z_p = 2 * mx.random.normal((N, w))
    p = np.array(mx.softmax(z_p, axis=-1), np.float64)
    mass = np.stack([np.bincount(groups.teacher, weights=row, minlength=groups.count) for row in p])
    # Spread each group's mass over the student's members at random.
    share = np.random.default_rng(0).random((N, v)) + 0.1
    total = np.stack([np.bincount(groups.student, weights=row, minlength=groups.count) for row in share])
    q = mass[:, groups.student] * share / total[:, groups.student]
    z_q = mx.array(np.log(np.maximum(q, 1e-9)).astype(np.float32))
    for k, temperature in ((4, 1.0), (32, 1.0), (w, 1.0), (4, 3.0), (32, 3.0)):
        value, grad = mx.value_and_grad(
            lambda z, k=k, temperature=temperature: token_group_kl(
                z, top_k(z_p, k), groups, temperature=temperature
            ).sum()
        )(z_q)
        assert abs(value.item()) < 5e-5
        assert mx.abs(grad).max().item() < 5e-6


def test_never_negative_and_never_above_a_finer_divergence(tokenizers: Any) -> None:
    same = build_token_groups(tokenizers.student, tokenizers.student)
    v = len(same.student)
    merged = TokenGroups(same.student // 3, same.teacher // 3, v // 3 + 2, v // 3 + 1)
    z_p = 4 * mx.random.normal((N, v))
    for size in (0.0, 1e-3, 0.1, 3.0):
        z_q = z_p + size * mx.random.normal((N, v))
        fine, coarse = forward_kl(z_q, z_p), token_group_kl(z_q, top_k(z_p, 20), merged)
        assert coarse.min().item() >= -2e-6
        assert (coarse <= fine + 1e-5).all().item()


def test_fewer_targets_never_raise_the_loss(groups: TokenGroups) -> None:
    """The loss is a lower bound for any distribution of the unlisted mass."""
    v, w = widths(groups)
    z_q, z_p = 2 * mx.random.normal((N, v)), 2 * mx.random.normal((N, w))
    values = [np.array(token_group_kl(z_q, top_k(z_p, k), groups)) for k in (2, 8, 32, 128, w)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-5).all()


def test_padding_columns_of_either_model(groups: TokenGroups) -> None:
    v, w = widths(groups)
    z_q, z_p = mx.random.normal((N, v)), mx.random.normal((N, w))
    low = mx.full((N, 9), -60.0)
    plain = token_group_kl(z_q, top_k(z_p, 8), groups)
    np.testing.assert_allclose(
        np.array(token_group_kl(mx.concatenate([z_q, low], 1), top_k(z_p, 8), groups)),
        np.array(plain),
        rtol=1e-5,
    )
    # Mass on columns that are no token, on both sides, is in the bucket.
    wide_q, wide_p = mx.random.normal((N, v + 9)), top_k(mx.concatenate([z_p, mx.full((N, 2), 3.0)], 1), 8)
    np.testing.assert_allclose(
        np.array(token_group_kl(wide_q, wide_p, groups)), exact(wide_q, wide_p, groups), rtol=1e-4
    )


def test_targets_merge_into_distinct_groups(groups: TokenGroups) -> None:
    targets = top_k(mx.random.normal((N, widths(groups)[1])), 200)
    ids, logprobs, has_unlisted = (np.array(a) for a in group_topk(targets, groups))
    for row in range(N):
        used = ids[row][logprobs[row] > -1e29]
        assert len(set(used.tolist())) == len(used)
        assert groups.outside not in used
        want = np.bincount(
            groups.teacher[np.array(targets.ids[row])],
            weights=np.exp(np.array(targets.logprobs[row], np.float64)),
        )
        np.testing.assert_allclose(
            np.exp(logprobs[row][logprobs[row] > -1e29].astype(np.float64)), want[used], rtol=1e-5
        )
        unlisted = set(
            groups.teacher[np.setdiff1d(np.arange(len(groups.teacher)), np.array(targets.ids[row]))].tolist()
        )
        assert set(ids[row][has_unlisted[row]].tolist()) == unlisted & set(used.tolist())


def test_straight_from_the_hidden_state(groups: TokenGroups) -> None:
    v, w = widths(groups)
    h, head, targets = (
        mx.random.normal((N, 16)),
        mx.random.normal((v, 16)),
        top_k(2 * mx.random.normal((N, w)), 16),
    )
    want, want_grad = mx.value_and_grad(lambda h: token_group_kl(h @ head.T, targets, groups).sum())(h)
    tiled = mx.value_and_grad(
        lambda h: linear_rows(
            lambda z, at: token_group_kl(z, TopK(targets.ids[at], targets.logprobs[at]), groups),
            h,
            head,
            rows=2,
        ).sum()
    )(h)
    assert tiled[0].item() == pytest.approx(want.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(tiled[1]), np.array(want_grad), atol=2e-5)


def test_wrong_shapes_are_refused(groups: TokenGroups) -> None:
    v, w = widths(groups)
    targets = top_k(mx.random.normal((N, w)), 4)
    with pytest.raises(DataError, match="4 positions"):
        token_group_kl(mx.random.normal((4, v)), targets, groups)
    with pytest.raises(ModelError, match="student's own tokenizer"):
        token_group_kl(mx.random.normal((N, v - 1)), targets, groups)


def test_alm_is_a_kl_of_bernoulli_distributions() -> None:
    l_s, l_t = -mx.array([0.01, 0.5, 3.0, 40.0, 300.0]), -mx.array([0.3, 0.5, 1.0, 80.0, 2.0])
    for tau in (1.0, 100.0):
        a, b = (np.exp(np.array(x, np.float64) / tau - 1e-6) for x in (l_t, l_s))
        want = tau * (a * np.log(a / b) + (1 - a) * (np.log1p(-a) - np.log1p(-b)))
        np.testing.assert_allclose(np.array(alm(l_s, l_t, tau=tau)), want, rtol=2e-3, atol=1e-5)


def test_alm_is_zero_with_zero_gradient_at_equality_and_positive_elsewhere() -> None:
    spans = -mx.array([0.0, 1e-4, 0.2, 5.0, 900.0])
    value, grad = mx.value_and_grad(lambda x: alm(x, spans).sum())(spans)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert mx.abs(grad).max().item() < 1e-4
    assert (alm(spans - 0.5, spans) > 0).all().item()
    grad = mx.grad(lambda x: alm(x, spans).sum())(spans - 0.5)
    assert (grad < 0).all().item()  # upwards, towards the teacher
    assert np.isfinite(np.array(grad)).all()


def test_alm_keeps_the_size_of_its_gradient_when_tau_changes() -> None:
    l_s, l_t = mx.array([-2.0]), mx.array([-1.0])
    at = [mx.grad(lambda x: alm(x, l_t, tau=tau).sum())(l_s).item() for tau in (30.0, 100.0, 300.0)]  # noqa: B023
    np.testing.assert_allclose(at, at[1], rtol=0.05)


def test_alm_refuses_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="tau is 0"):
        alm(mx.array([-1.0]), mx.array([-1.0]), tau=0)


def test_span_sums_and_their_gradient() -> None:
    logprobs = -mx.arange(1.0, 8.0)
    spans = np.array([[0, 2], [2, 3], [4, 7], [7, 7]], np.int32)
    np.testing.assert_array_equal(np.array(span_sums(logprobs, spans)), [-3, -3, -18, 0])
    grad = mx.grad(lambda x: (span_sums(x, spans) * mx.array([1.0, 2.0, 3.0, 4.0])).sum())(logprobs)
    np.testing.assert_array_equal(np.array(grad), [1, 1, 2, 0, 3, 3, 3])
    assert span_sums(logprobs, np.zeros((0, 2), np.int32)).shape == (0,)
    with pytest.raises(DataError, match="token 9 of 7"):
        span_sums(logprobs, np.array([[6, 9]]))
