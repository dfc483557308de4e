from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses import LabelTokens, label_kl, label_logprobs, label_tokens, token_bytes

LABELS = ("RECOMMENDED", "ACCEPTABLE", "CONCERNING", "NOT_RECOMMENDED")


@pytest.mark.parametrize("side", [0, 1])
def test_tokens_can_only_begin_one_label(side: int, tokenizers: Any) -> None:
    tokens = label_tokens(tokenizers[side], LABELS)
    assert tokens.labels == LABELS
    spelled = token_bytes(tokenizers[side])
    ends = [label.encode() + b'"' for label in LABELS]
    for ids, end in zip(tokens.ids, ends, strict=True):
        fitting = [i for i, u in enumerate(spelled) if u and (end.startswith(u) or u.startswith(end))]
        assert list(ids) == fitting
        assert end[:1] in [spelled[i] for i in ids]
    flat = [i for ids in tokens.ids for i in ids]
    assert len(flat) == len(set(flat))


def test_a_token_may_continue_after_the_terminator_but_not_differ_from_the_label() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"n": 0, "y": 1, 'no"': 2, 'no",': 3, "not": 4, "no": 5}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert label_tokens(tokenizer, ["no", "yes"]).ids == ((0, 2, 3, 5), (1,))
    assert label_tokens(tokenizer, ["no", "yes"], terminator=",").ids == ((0, 5), (1,))


def test_labels_with_the_same_first_byte_are_refused(tokenizers: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"'safe' and 'sad' begin with the same byte.*different first characters"
    ):
        label_tokens(tokenizers.student, ["safe", "sad", "x"])
    # The same first byte of two different letters is no way to tell them apart either.
    with pytest.raises(ConfigError, match="different first characters"):
        label_tokens(tokenizers.student, ["é", "è"])
    with pytest.raises(ConfigError, match="at least two labels"):
        label_tokens(tokenizers.student, ["yes"])
    with pytest.raises(ConfigError, match="none of them empty"):
        label_tokens(tokenizers.student, ["yes", ""])


def test_logprobs_are_the_renormalised_mass_of_each_labels_tokens() -> None:
    tokens = LabelTokens(("a", "b", "c"), ((0, 3, 5), (1,), (2, 7)))
    logits = 3 * mx.random.normal((2, 4, 9))
    p = np.exp(np.array(logits, np.float64))
    mass = np.stack([p[..., list(ids)].sum(-1) for ids in tokens.ids], axis=-1)
    got = np.array(label_logprobs(logits, tokens))
    assert got.shape == (2, 4, 3)
    np.testing.assert_allclose(np.exp(got), mass / mass.sum(-1, keepdims=True), rtol=1e-5)


def test_all_other_tokens_are_one_more_class_on_request() -> None:
    tokens = LabelTokens(("a", "b", "c"), ((0, 3, 5), (1,), (2, 7)))
    logits = 3 * mx.random.normal((2, 4, 9))
    p = np.exp(np.array(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    want = np.stack([p[..., list(ids)].sum(-1) for ids in (*tokens.ids, (4, 6, 8))], axis=-1)
    np.testing.assert_allclose(np.exp(np.array(label_logprobs(logits, tokens, rest=True))), want, rtol=1e-5)
    # Where a label is all there is, the rest is impossible, not undefined.
    tokens = LabelTokens(("a", "b"), ((0, 2), (1,)))
    alone = label_logprobs(mx.array([[1.0, 2.0, 3.0], [1.0, 2.0, -float("inf")]]), tokens, rest=True)
    assert mx.isfinite(alone).all().item() and mx.exp(alone[:, 2]).tolist() == [0, 0]


def test_mass_outside_the_labels_moves_into_them() -> None:
    """Both models agree among the labels; they differ only in the class of all other tokens."""
    tokens = LabelTokens(("a", "b"), ((0,), (1,)))
    teacher, student = mx.array([[3.0, 1.0, -9.0]]), mx.array([[3.0, 1.0, 5.0]])

    def loss(z: mx.array, rest: bool) -> mx.array:
        return label_kl(
            label_logprobs(z, tokens, rest=rest), label_logprobs(teacher, tokens, rest=rest)
        ).sum()

    assert mx.abs(mx.grad(loss)(student, False)).max().item() == pytest.approx(0, abs=1e-6)
    pull = mx.grad(loss)(student, True)[0].tolist()
    assert pull[2] > 0.5 > 0 > pull[0] and pull[1] < 0


def test_gradient_of_logprobs() -> None:
    tokens = LabelTokens(("a", "b"), ((0, 3), (1,)))
    logits = mx.random.normal((3, 6))
    grad = np.array(mx.grad(lambda z: label_logprobs(z, tokens)[:, 0].sum())(logits))
    p = np.exp(np.array(logits, np.float64))
    inside = np.zeros_like(p)
    inside[:, [0, 3]] = p[:, [0, 3]] / p[:, [0, 3]].sum(-1, keepdims=True)
    every = np.zeros_like(p)
    every[:, [0, 1, 3]] = p[:, [0, 1, 3]] / p[:, [0, 1, 3]].sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, inside - every, atol=1e-6)


def test_other_tokens_have_no_influence_even_when_masked() -> None:
    tokens = LabelTokens(("a", "b"), ((0,), (1, 2)))
    base = mx.array([[1.0, 2.0, 3.0, 4.0]])
    other = mx.array([[1.0, 2.0, 3.0, -float("inf")]])
    assert mx.array_equal(label_logprobs(base, tokens), label_logprobs(other, tokens))


def test_logits_of_another_model_are_refused() -> None:
    with pytest.raises(ModelError, match="label token 7 for logits of 4 columns"):
        label_logprobs(mx.zeros((1, 4)), LabelTokens(("a", "b"), ((0,), (7,))))


def test_divergence_over_labels_equals_float64_and_is_zero_at_equality() -> None:
    q, p = (mx.log(mx.softmax(mx.random.normal((6, 4)), axis=-1)) for _ in range(2))
    soft = [np.exp(np.array(x, np.float64) / 4) for x in (q, p)]
    soft = [x / x.sum(-1, keepdims=True) for x in soft]
    want = 16 * (soft[1] * np.log(soft[1] / soft[0])).sum(-1)
    np.testing.assert_allclose(np.array(label_kl(q, p)), want, rtol=1e-4)
    assert mx.abs(label_kl(p, p)).max().item() == 0
    with pytest.raises(ModelError, match="4 columns and the teacher's 3"):
        label_kl(q, p[:, :3])


def test_two_tokenizers_share_the_distribution_over_labels(tokenizers: Any) -> None:
    """Different tokens, different widths, one distribution."""
    sides = [label_tokens(tokenizer, LABELS) for tokenizer in tokenizers]
    widths = [len(token_bytes(tokenizer)) for tokenizer in tokenizers]
    logprobs = [
        label_logprobs(mx.random.normal((3, w)), tokens) for w, tokens in zip(widths, sides, strict=True)
    ]
    assert label_kl(*logprobs).shape == (3,)
