"""Scoring against plain float64: one row at a time, the whole vocabulary, no padding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.labels import Counted, one_node, tokens_behind
from helpers.tiny_model import VOCABULARY, TinyModel, make_model

from mlx_distill.config import resolve_asset
from mlx_distill.distill.teacher import TokenizedAnswer, score
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.distill.token_distributions import (
    Kept,
    block_logsumexp,
    distributions,
    sample_shares,
    top_k,
)
from mlx_distill.infer.label_scoring import prompt_label_logprobs
from mlx_distill.losses.labels import LabelNode, LabelTrie
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.models.load import load

LABELS = one_node(("yes", "no", "maybe"), ((0, 3), (1,), (2, 5)))
TOP = 6


def make_answers(count: int = 9) -> list[TokenizedAnswer]:
    random = np.random.default_rng(0)
    tokens = [random.integers(0, VOCABULARY, size=int(random.integers(5, 30))).tolist() for _ in range(count)]
    starts = [int(random.integers(1, len(row) - 1)) for row in tokens]
    return [
        TokenizedAnswer(row, start, start + 1 if i % 3 else None, f"row-{i}", f"text {i}")
        for i, (row, start) in enumerate(zip(tokens, starts, strict=True))
    ]


ANSWERS = make_answers()


def plain(model: TinyModel) -> list[TeacherTargets]:
    out = []
    for answer in ANSWERS:
        row, start, at = answer.tokens, answer.start, answer.label_start
        logits = np.array(model(mx.array([row])))[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        positions = list(range(start - 1, len(row) - 1))
        ids = np.argsort(-logprobs[positions], axis=1)[:, :TOP]
        label = None
        if at is not None:
            mass = np.array([np.exp(logprobs[at - 1, list(group)]).sum() for group in LABELS.nodes[0].ids])
            label = np.log(np.append(mass, 1 - mass.sum()))
        own = np.array([logprobs[j - 1, row[j]] for j in range(start, len(row))])
        out.append(
            TeacherTargets(
                answer.id,
                answer.text,
                label,
                np.array(row[start:]),
                own,
                ids,
                np.take_along_axis(logprobs[positions], ids, 1),
            )
        )
    return out


def scored(model: TinyModel, **changes: int) -> list[TeacherTargets]:
    return list(score(model, ANSWERS, top_k=TOP, labels=LABELS, **changes))


@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 1}, {"batch_size": 4}, {"batch_size": 3, "multiple": 1}, {"multiple": 64}]
)
def test_scores_equal_the_plain_ones_in_any_batch(changes: dict[str, int]) -> None:
    model = make_model()
    for row, expected in zip(scored(model, **changes), plain(model), strict=True):
        assert (row.id, row.text) == (expected.id, expected.text)
        assert row.ids.tolist() == expected.ids.tolist()
        assert row.topk_ids.tolist() == expected.topk_ids.tolist()
        np.testing.assert_allclose(row.logprobs, expected.logprobs, atol=1e-5)
        np.testing.assert_allclose(row.topk_logprobs, expected.topk_logprobs, atol=1e-5)
        assert (row.label_logprobs is None) == (expected.label_logprobs is None)
        if expected.label_logprobs is not None:
            np.testing.assert_allclose(row.label_logprobs, expected.label_logprobs, atol=1e-5)
            assert np.exp(row.label_logprobs).sum() == pytest.approx(1, abs=1e-5)


def test_tiles_of_positions_change_nothing() -> None:
    for one, other in zip(scored(make_model()), scored(make_model(), tile_rows=7), strict=True):
        assert one.topk_ids.tolist() == other.topk_ids.tolist()
        np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=1e-6)


def test_top_k_may_be_the_whole_vocabulary() -> None:
    for row in score(make_model(), ANSWERS, top_k=1000):
        assert row.topk_ids.shape == (len(row.ids), VOCABULARY)
        assert sorted(row.topk_ids[0].tolist()) == list(range(VOCABULARY))
        np.testing.assert_allclose(np.exp(row.topk_logprobs.astype(np.float64)).sum(1), 1, atol=1e-5)
        assert (np.diff(row.topk_logprobs, axis=1) <= 0).all()
        assert row.label_logprobs is None


def test_dropout_is_off() -> None:
    model = make_model(dropout=0.5)
    model.train()
    one, two = scored(model), scored(model)
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(one, two, strict=True))


def test_a_packaged_model_scores_the_same_in_any_batch() -> None:
    """Attention must not see the padding or other rows."""
    model, _ = load(resolve_asset("asset:models/tiny-gpt-oss"), dtype="float32")
    answers = [TokenizedAnswer([(7 * i + j) % 300 for j in range(5 + 40 * i)], 2) for i in range(4)]
    one = list(score(model, answers, top_k=4, batch_size=1, multiple=1))
    for alone, beside in zip(one, score(model, answers, top_k=4, batch_size=4), strict=True):
        np.testing.assert_allclose(beside.logprobs, alone.logprobs, atol=2e-4)
        np.testing.assert_allclose(beside.topk_logprobs, alone.topk_logprobs, atol=2e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_labels_that_share_tokens_are_scored_behind_each_answers_beginning(cached: bool) -> None:
    """A row is read once where its keys and values can be cut, and its own label does not matter."""
    from mlx_lm.models.cache import KVCache

    nodes = (
        LabelNode((), ((0, 1, 2), (3,)), ((4, 9), (7,))),
        LabelNode((4,), ((0, 1), (2,)), ((5,), (8, 11)), (0, 0)),
        LabelNode((4, 5, 6), ((0,), (1,)), ((8,), (9,)), (1, 0)),
    )
    labels = LabelTrie(("a", "b", "c", "d"), nodes)
    inner, _ = load(resolve_asset("asset:models/tiny-gpt-oss"), dtype="float32")
    model = Counted(inner)
    if not cached:
        model.make_cache = lambda: [type("Other", (KVCache,), {})() for _ in inner.layers]
    answers = [
        TokenizedAnswer([(7 * i + 3 * j) % 300 for j in range(9 + 3 * i)], 2 + i, None if i == 1 else 4 + i)
        for i in range(4)
    ]
    plain = list(score(inner, answers, top_k=4))
    rows = list(score(model, answers, top_k=4, labels=labels))
    prompts = [answer.tokens[: answer.label_start] for answer in answers if answer.label_start is not None]
    if cached:
        assert model.tokens == 4 * 32 + 3 * tokens_behind(labels)
    expected = iter(np.array(prompt_label_logprobs(inner, prompts, labels, rest=True, cached=False)))
    for row, other, answer in zip(rows, plain, answers, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-4)
        if answer.label_start is None:
            assert row.label_logprobs is None
        else:
            np.testing.assert_allclose(row.label_logprobs, next(expected), atol=2e-4)


# --- what is kept of a distribution -------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "k"), [(64, 3), (1000, 4), (1024, 16), (130, 2), (5, 5), (1000, 400)])
def test_the_largest_of_each_row_by_blocks_are_those_of_a_sort(columns: int, k: int) -> None:
    z = np.random.default_rng(columns).normal(size=(7, columns)).astype(np.float32)
    assert (np.array(top_k(mx.array(z), k)) == np.argsort(-z, axis=1)[:, :k]).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_sums_of_blocks_by_numpy_are_those_of_mlx(temperature: float) -> None:
    z = np.random.default_rng(0).normal(size=(3, 7, 64)).astype(np.float32) * 20
    z[1, 2], z[2, 3, 1:], z[0, 1], z[0, 2, 5] = LOWEST, LOWEST, -np.inf, -np.inf
    expected = mx.logsumexp(mx.array(z) / temperature, axis=-1)
    np.testing.assert_allclose(block_logsumexp(mx.array(z), temperature), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [300, 5000])
def test_the_masses_outside_of_the_top_k_are_those_of_the_whole_vocabulary(columns: int) -> None:
    z = np.random.default_rng(0).normal(size=(5, columns)) * 4
    z[1, 7] = 60  # its tail would be rounding as one minus a sum
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    out = distributions(mx.array(z.astype(np.float32)), np.arange(5, dtype=np.int32), Kept(8, (2.0, 0.5)))
    rest = np.sort(p, axis=1)[:, :-8].sum(1)
    np.testing.assert_allclose(out.tail_logprobs, np.log(rest), rtol=1e-5)
    for i, t in enumerate((2.0, 0.5)):
        tempered = p ** (1 / t) / (p ** (1 / t)).sum(1, keepdims=True)
        rest = np.sort(tempered, axis=1)[:, :-8].sum(1)
        np.testing.assert_allclose(out.tempered_tails[:, i], np.log(rest), rtol=1e-5)
    np.testing.assert_allclose(out.logprobs, np.log(p[np.arange(5), np.arange(5)]), rtol=1e-5)


def test_samples_have_the_distribution_as_their_mean_and_no_token_without_probability() -> None:
    p = np.array([[0.0, 0.6, 0.0, 0.3, 0.1, 0.0]])
    random, share = np.random.default_rng(0), np.zeros(6)
    for _ in range(300):
        ids, logs = sample_shares(p, random.random((1, 20)))
        np.add.at(share, ids[0], np.exp(logs[0].astype(float)) / 300)
    # 6,000 samples: a standard deviation of at most 0.0064.
    np.testing.assert_allclose(share, p[0], atol=0.025)
    assert (share[p[0] == 0] == 0).all()
    ids, _ = sample_shares(p, np.array([[0.0, 1.0]]))
    assert p[0, ids[0]].all()


def test_samples_depend_on_the_row_alone() -> None:
    model = make_model()
    one = list(score(model, ANSWERS, top_k=TOP, draws=12))
    for row, other in zip(
        one[::-1], score(model, ANSWERS[::-1], top_k=TOP, draws=12, batch_size=2), strict=True
    ):
        assert row.topk_ids.tolist() == other.topk_ids.tolist()
        np.testing.assert_allclose(np.exp(row.topk_logprobs.astype(float)).sum(1), 1, atol=1e-6)
    again = list(score(model, ANSWERS, top_k=TOP, draws=12, seed=1))
    assert any(a.topk_ids.tolist() != b.topk_ids.tolist() for a, b in zip(one, again, strict=True))
