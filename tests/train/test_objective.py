"""Objectives: each term against its plain formula, row by row; dense against tiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.labels import one_node
from helpers.tiny_model import VOCABULARY, TinyModel, collate, make_model, make_rows
from helpers.tiny_model import settings as training

from mlx_distill.distill.align import AlignedRow, align_row, collate_aligned_rows
from mlx_distill.distill.objective import kd
from mlx_distill.distill.token_losses import TOKEN_LOSSES
from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import TokenGroups, token_group_kl
from mlx_distill.losses.labels import LabelNode, LabelTrie
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import Batch, TopK
from mlx_distill.train import make_trainable
from mlx_distill.train.gradients import global_norm, window_gradients
from mlx_distill.train.objective import MIN_ROWS, Objective, sft

LABELS = one_node(("yes", "no", "maybe"), ((0, 3), (1,), (2, 5)))
TEACHER = 19
GROUPS = TokenGroups(
    student=np.minimum(np.arange(VOCABULARY), 12).astype(np.int32),
    teacher=np.minimum(np.arange(TEACHER), 12).astype(np.int32),
    count=14,
    shared=12,
    same_token=np.where(np.arange(TEACHER) < 12, np.arange(TEACHER), -1).astype(np.int32),
    pieces=np.arange(VOCABULARY, dtype=np.int32)[:, None] % TEACHER,
)


def make_aligned_rows(count: int, seed: int = 0) -> list[AlignedRow]:
    random = np.random.default_rng(seed)
    rows = []
    for tokens, _ in make_rows(count, seed, low=6, high=11):
        start, answer = 3, len(tokens) - 4
        theirs = answer - 1
        # The student's last two tokens before the stop are one token of the teacher; all others are equal.
        spans = np.array(
            [[i, i + 1, i, i + 1] for i in range(theirs - 1)] + [[theirs - 1, answer, theirs - 1, theirs]]
        ).reshape(-1, 4)
        logits = random.normal(size=(theirs + 1, TEACHER))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-logprobs, axis=1)[:, :4]
        rows.append(
            align_row(
                np.array(tokens),
                start,
                spans,
                teacher_logprobs=logprobs[:, 0].astype(np.float32),
                topk_ids=order.astype(np.int32),
                topk_logprobs=np.take_along_axis(logprobs, order, 1).astype(np.float32),
                label_start=start + 1 if len(rows) % 3 else None,
                label_logprobs=np.log(random.dirichlet([1, 1, 1, 1])).tolist(),
            )
        )
    return rows


ROWS = make_aligned_rows(6)


def batches(size: int) -> list[Batch]:
    return [
        collate_aligned_rows(ROWS, list(range(i, min(i + size, len(ROWS)))), 0, 4, multiple=4)
        for i in range(0, len(ROWS), size)
    ]


def settings(**changes: Any) -> DistillConfig:
    return DistillConfig(**changes)


def objective(kind: str, **more: Any) -> Objective:
    same = TOKEN_LOSSES[kind].needs == "same_tokenizer"
    return kd(settings(token_loss=kind), labels=LABELS, groups=GROUPS, same_tokenizer=same, **more)


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(z / temperature - (z / temperature).max())
    return e / e.sum()


def plain_terms(model: TinyModel, kind: str) -> dict[str, float]:
    """The three terms, row by row in float64."""
    label, token, text = [], [], []
    for row in ROWS:
        logits = np.array(model(mx.array(row.tokens[None, :-1])))[0].astype(np.float64)
        logprobs = np.log(np.array([softmax(z) for z in logits]))
        text += [-logprobs[j - 1, row.tokens[j]] for j in range(row.start, len(row.tokens))]
        if row.label_start is not None and row.label_logprobs is not None:
            ids = LABELS.nodes[0].ids
            q = np.array([np.exp(logprobs[row.label_start - 1, list(group)]).sum() for group in ids])
            q = np.append(q, 1 - q.sum())
            p, q = softmax(row.label_logprobs.astype(np.float64), 4.0), softmax(np.log(q), 4.0)
            label.append(16 * (p * np.log(p / q)).sum())
        if kind == "alm":
            for (a, b), theirs in zip(row.spans, row.span_logprobs, strict=True):
                ours = sum(logprobs[j - 1, row.tokens[j]] for j in range(a, b))
                p, q = np.exp(theirs / 100 - 1e-6), np.exp(ours / 100 - 1e-6)
                token.append(100 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))))
            continue
        for j, ids, theirs in zip(row.starts, row.topk_ids, row.topk_logprobs, strict=True):
            if kind == "token_groups":  # tested elsewhere; here only the positions count
                targets = TopK(mx.array(ids[None]), mx.array(theirs[None]))
                token.append(
                    token_group_kl(mx.array(logits[j - 1][None].astype(np.float32)), targets, GROUPS).item()
                )
                continue
            p, q = np.exp(theirs.astype(np.float64)), np.exp(logprobs[j - 1])[ids]
            rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
            token.append((p * np.log(p / q)).sum() + rest_p * np.log(rest_p / rest_q))
    return {"label": float(np.mean(label)), "token": float(np.mean(token)), "text": float(np.mean(text))}


@pytest.mark.parametrize("dense_limit", [0, 1 << 24])
def test_a_row_tells_apart_the_labels_on_its_own_path(dense_limit: int) -> None:
    nodes = (
        LabelNode((), ((0, 1, 2), (3,)), ((4, 9), (7,))),
        LabelNode((4,), ((0, 1), (2,)), ((5,), (8, 11)), (0, 0)),
        LabelNode((4, 5), ((0,), (1,)), ((8,), (9,)), (1, 0)),
    )
    trie = LabelTrie(("a", "b", "c", "d"), nodes)
    classes = {0: [[0, 1, 2], [3]], 1: [[0, 1], [2], [3]], 2: [[0], [1], [2], [3]]}
    random = np.random.default_rng(3)
    rows = [
        replace(
            row,
            label_start=row.start + 1,
            label_node=number % 3,
            label_logprobs=np.log(random.dirichlet([1] * 5)).astype(np.float32),
        )
        for number, row in enumerate(ROWS)
    ]
    model = make_model()
    model.lm_head.freeze()
    expected = []
    for row in rows:
        logits = np.array(model(mx.array(row.tokens[None, :-1])))[0].astype(np.float64)
        at = [softmax(logits[row.start + len(node.path)]) for node in nodes]
        top, middle, last = ([p[list(ids)].sum() for ids in n.ids] for p, n in zip(at, nodes, strict=True))
        of_label = {
            0: {(0, 1, 2): top[0], (3,): top[1]},
            1: {(0, 1): top[0] * middle[0], (2,): top[0] * middle[1], (3,): top[1]},
            2: {
                (0,): top[0] * middle[0] * last[0],
                (1,): top[0] * middle[0] * last[1],
                (2,): top[0] * middle[1],
                (3,): top[1],
            },
        }[row.label_node]
        q = np.array([of_label[tuple(labels)] for labels in classes[row.label_node]])
        teacher = np.exp(row.label_logprobs.astype(np.float64))
        p = np.array([*(teacher[labels].sum() for labels in classes[row.label_node]), teacher[-1]])
        p, q = softmax(np.log(p), 4.0), softmax(np.log(np.append(q, 1 - q.sum())), 4.0)
        expected.append(16 * (p * np.log(p / q)).sum())
    # One batch of all rows, and each row alone.
    for lines in ([range(len(rows))], [[number] for number in range(len(rows))]):
        batches = [collate_aligned_rows(rows, list(line), 0, 5, multiple=4) for line in lines]
        loss = kd(
            settings(token_weight=0.0, text_weight=0.0), labels=trie, groups=GROUPS, dense_limit=dense_limit
        )
        result = window_gradients(model, batches, loss)
        assert result.terms["label"] == pytest.approx(np.mean(expected), rel=2e-4)


@pytest.mark.parametrize("dense_limit", [0, 1 << 24])
@pytest.mark.parametrize("kind", ["kl", "token_groups", "alm"])
def test_each_term_is_the_mean_of_its_plain_formula(kind: str, dense_limit: int) -> None:
    model = make_model()
    model.lm_head.freeze()
    result = window_gradients(model, batches(2), objective(kind, dense_limit=dense_limit))
    expected = plain_terms(model, kind)
    for name, value in expected.items():
        assert result.terms[name] == pytest.approx(value, rel=2e-4), name
    assert result.loss == pytest.approx(
        0.7 * expected["label"] + 1.0 * expected["token"] + 0.3 * expected["text"], rel=2e-4
    )
    assert result.weights["label"] == 4.0


@pytest.mark.parametrize("dense_limit", [0, 1 << 24])
def test_the_likelihoods_of_spans_are_a_term_beside_another_loss(dense_limit: int) -> None:
    model = make_model()
    both = kd(
        settings(token_loss="token_groups", span_weight=2.0),
        labels=LABELS,
        groups=GROUPS,
        dense_limit=dense_limit,
    )
    result = window_gradients(model, batches(2), both)
    for term, kind in (("token", "token_groups"), ("span", "alm")):
        assert result.terms[term] == pytest.approx(plain_terms(model, kind)["token"], rel=2e-4)
    alone = window_gradients(model, batches(2), objective("token_groups"))
    assert result.loss == pytest.approx(alone.loss + 2.0 * result.terms["span"], rel=1e-5)
    only = kd(settings(token_weight=0.0, label_weight=0.0, text_weight=0.0, span_weight=1.0))
    assert set(only.coefficients) == {"span"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_tiled_equals_dense_in_gradient_and_the_batches_do_not_matter(kind: str) -> None:
    model = make_model()
    model.lm_head.freeze()
    plain = window_gradients(model, batches(6), objective(kind))
    for size, limit in ((6, 0), (1, 1 << 24), (4, 0)):
        other = window_gradients(model, batches(size), objective(kind, dense_limit=limit))
        assert other.loss == pytest.approx(plain.loss, rel=1e-5)
        assert global_norm(other.gradients) == pytest.approx(global_norm(plain.gradients), rel=1e-5)
        for name, gradient in plain.gradients.items():
            assert mx.allclose(other.gradients[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_trainable_head_gets_the_same_gradient_from_tiles(tied: bool) -> None:
    model, batch = make_model(), collate(make_rows(4), [0, 1, 2, 3])
    if tied:
        del model["lm_head"]
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    dense, tiled = (window_gradients(model, [batch], sft(dense_limit=limit)) for limit in (1 << 24, 0))
    assert tiled.loss == pytest.approx(dense.loss, rel=1e-5)
    assert mx.abs(dense.gradients[name]).max().item() > 1e-3
    for path, gradient in dense.gradients.items():
        assert mx.allclose(tiled.gradients[path], gradient, rtol=1e-3, atol=1e-6), path


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 1.0], ids=["", "soft-capped"])
@pytest.mark.parametrize("method", ["lora", "full", "frozen"])
@pytest.mark.parametrize("kind", ["kl", "token_groups", "alm"])
def test_every_term_is_the_same_in_tiles_and_slices_for_any_head(
    kind: str, method: str, softcap: float | None
) -> None:
    model = make_model()
    if method == "frozen":
        model.lm_head.freeze()
    else:
        make_trainable(
            model, training(method=method, target_modules=["up_proj", "lm_head"], lora_dropout=0.0)
        )
    batch = collate_aligned_rows(make_aligned_rows(24), list(range(24)), 0, 4, multiple=4)
    assert min(len(batch.extra[name]) for name in ("positions", "start_index", "spans")) > 3 * MIN_ROWS
    uncapped = window_gradients(model, [batch], objective(kind))
    model.final_logit_softcapping = softcap
    dense, tiled = (
        window_gradients(model, [batch], objective(kind, dense_limit=limit)) for limit in (1 << 24, 0)
    )
    if softcap:
        assert all(abs(dense.terms[term] - value) > 1e-4 for term, value in uncapped.terms.items())
    assert tiled.terms == pytest.approx(dense.terms, rel=1e-5)
    assert tiled.gradients.keys() == dense.gradients.keys()
    assert any("lm_head" in path for path in dense.gradients) == (method != "frozen")
    for path, gradient in dense.gradients.items():
        assert mx.allclose(tiled.gradients[path], gradient, rtol=1e-3, atol=1e-6), path


def test_a_head_with_an_adapter_is_read_through_it() -> None:
    model, batch = make_model(), collate(make_rows(4), [0, 1, 2, 3])
    make_trainable(model, training(method="lora", target_modules=["lm_head"]))
    result = window_gradients(model, [batch], sft(dense_limit=0))
    assert set(result.gradients) == {"lm_head.lora_a", "lm_head.lora_b"}
    assert mx.abs(result.gradients["lm_head.lora_b"]).max().item() > 1e-3


def test_a_batch_without_a_trained_token_counts_in_no_term() -> None:
    batch = batches(2)[0]
    empty = replace(batch, mask=batch.mask * 0, rows=())
    assert objective("token_groups").weights(empty) == {"label": 0.0, "token": 0.0, "text": 0.0}
    model = make_model()
    one, two = (
        window_gradients(model, [batch], objective("token_groups")),
        window_gradients(model, [batch, empty], objective("token_groups")),
    )
    assert one.loss == two.loss


def test_terms_without_a_coefficient_are_left_out() -> None:
    text = kd(settings(label_weight=0.0, token_weight=0.0))
    assert set(text.coefficients) == {"text"}
    assert set(kd(settings(token_loss="none"), labels=LABELS).coefficients) == {"label", "text"}


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"token_loss": "kl"}, {"labels": LABELS, "groups": GROUPS}),
        ({"token_loss": "token_groups"}, {"labels": LABELS}),
        ({}, {"groups": GROUPS}),
        ({"label_weight": 0.0, "token_weight": 0.0, "text_weight": 0.0}, {}),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_fix(changes: dict, given: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        kd(settings(**changes), **given)
    assert caught.value.fix


def test_rows_without_a_label_still_train_the_rest() -> None:
    rows = [replace(row, label_start=None, label_logprobs=None) for row in ROWS]
    batch = collate_aligned_rows(rows, [0, 1], 0, 4)
    result = window_gradients(make_model(), [batch], objective("token_groups"))
    assert (
        result.weights["label"] == 0.0
        and result.terms["label"] == 0.0
        and np.isfinite(result.loss)
        and result.terms["token"] > 0
    )
