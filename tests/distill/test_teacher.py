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
from mlx_distill.infer.label_scoring import prompt_label_logprobs
from mlx_distill.losses.labels import LabelNode, LabelTrie
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
