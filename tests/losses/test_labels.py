from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import tokenizer_kinds
from helpers.labels import LABEL_SETS, label_alone, one_node

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses import (
    LabelNode,
    LabelTrie,
    class_logprobs,
    label_kl,
    label_logprobs,
    label_trie,
    merge_labels,
    token_bytes,
)

LABELS = ("RECOMMENDED", "ACCEPTABLE", "CONCERNING", "NOT_RECOMMENDED")


def trie_of(tokenizer: Any, labels: Sequence[str] = LABELS, **texts: str) -> LabelTrie:
    return label_trie(tokenizer, labels, lambda text: tokenizer.encode(text).ids, **texts)


@pytest.mark.parametrize("side", [0, 1])
def test_labels_of_different_first_bytes_have_the_tokens_that_can_only_begin_them(
    side: int, tokenizers: Any
) -> None:
    trie = trie_of(tokenizers[side])
    (node,) = trie.nodes
    assert trie.labels == LABELS and node.branches == ((0,), (1,), (2,), (3,))
    assert (trie.cut, trie.shared, node.path, node.parent) == (0, (), (), None)
    spelled = token_bytes(tokenizers[side])
    ends = [label.encode() + b'"' for label in LABELS]
    for ids, end in zip(node.ids, ends, strict=True):
        fitting = [i for i, u in enumerate(spelled) if u and (end.startswith(u) or u.startswith(end))]
        assert list(ids) == fitting
        assert end[:1] in [spelled[i] for i in ids]
    flat = [i for ids in node.ids for i in ids]
    assert len(flat) == len(set(flat))


def words(*tokens: str) -> Any:
    """A byte-level tokenizer of some tokens."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({token.replace(" ", "Ġ"): i for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def longest_first(tokenizer: Any) -> Callable[[str], list[int]]:
    """Cuts a text into the longest tokens, from its beginning on."""
    spelled = {text.decode(): i for i, text in enumerate(token_bytes(tokenizer))}

    def encode(text: str) -> list[int]:
        out = []
        while text:
            token = max((t for t in spelled if text.startswith(t)), key=len)
            out.append(spelled[token])
            text = text[len(token) :]
        return out

    return encode


def test_a_token_may_continue_after_the_closing_quote_but_not_differ_from_the_label() -> None:
    tokenizer = words("n", "y", 'no"', 'no",', "not", "no", '"', "yes", "}")
    trie = label_trie(tokenizer, ["no", "yes"], longest_first(tokenizer), before='"')
    assert trie.nodes[0].ids == ((0, 2, 3, 5), (1, 7))


def test_labels_part_behind_the_tokens_that_they_share() -> None:
    tokenizer = words('"', "}", "s", "p", "a", "sp", "sa", "am", "fe", "m", "f", "e", "spa", "sal", "x")
    encode = longest_first(tokenizer)
    # "s" can begin both and is the next token of none.
    trie = label_trie(tokenizer, ["sp", "safe"], encode, before='"')
    assert trie.nodes == (LabelNode((), ((0,), (1,)), ((5,), (6,))),) and trie.prompt([0]) == [0]
    # "sa" begins both and is shared.
    trie = label_trie(tokenizer, ["same", "safe"], encode, before='"')
    assert trie.nodes == (LabelNode((), ((0,), (1,)), ((9,), (8, 10))),) and trie.prompt([0]) == [0, 6]
    # Three labels: "sa" leads to a node of its own; a label that begins another is told apart by the quote.
    trie = label_trie(tokenizer, ["sa", "safe", "sp"], encode, before='"')
    root, behind = trie.nodes
    assert root == LabelNode((), ((0, 1), (2,)), ((6,), (5,)))
    assert behind == LabelNode((6,), ((0,), (1,)), ((0,), (8, 10)), (0, 0))
    assert trie.chain(1) == [0, 1] and trie.classes([0]) == [((0, 1), 0, 0), ((2,), 0, 1)]


def test_a_label_that_merges_with_what_precedes_it_moves_the_root_before_it() -> None:
    tokenizer = words('"', "!", '"!', "f", "}", ":", ":f")
    encode = longest_first(tokenizer)
    trie = label_trie(tokenizer, ["!", "f"], encode, before=':"')
    # The quote can begin both labels, and is the next token of the second.
    assert trie.prompt([5, 0]) == [5] and trie.nodes == (LabelNode((), ((0,), (1,)), ((2,), (0,))),)


def check_each_label_alone(tokenizer: Any, labels: Sequence[str]) -> None:
    spelled, before, after = token_bytes(tokenizer), '{"label": "', '", "'
    trie = trie_of(tokenizer, labels, after=after)

    def logprobs(tokens: Sequence[int]) -> np.ndarray:
        z = np.random.default_rng(list(tokens)).normal(size=len(spelled)) * 3
        return z - np.log(np.exp(z).sum())

    prompt = trie.prompt(tokenizer.encode(before).ids)
    branches = {
        n: label_logprobs(mx.array(logprobs([*prompt, *node.path])), node, rest=True)
        for n, node in enumerate(trie.nodes)
    }
    got = np.array(class_logprobs(trie, branches), dtype=np.float64)
    alone = [
        label_alone(label, labels, lambda text: tokenizer.encode(text).ids, spelled, logprobs, before, after)
        for label in labels[:8]
    ]
    np.testing.assert_allclose(got[:-1][:8], alone, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.exp(got).sum(), 1, atol=1e-5)
    assert all(ids for node in trie.nodes for ids in node.ids)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS)
def test_the_trie_gives_what_each_label_has_alone(
    side: int, labels: tuple[str, ...], tokenizers: Any
) -> None:
    check_each_label_alone(tokenizers[side], labels)


@pytest.mark.parametrize("kind", tokenizer_kinds.LOSSLESS)
def test_the_labels_of_every_kind_of_tokenizer(kind: str) -> None:
    for name, labels in LABEL_SETS.items():
        if name != "many":
            check_each_label_alone(tokenizer_kinds.make(kind), labels)


@pytest.mark.parametrize("kind", tokenizer_kinds.LOSSY)
def test_a_tokenizer_that_changes_texts_scores_labels_or_refuses_them(kind: str) -> None:
    tokenizer, refused = tokenizer_kinds.make(kind), 0
    for name, labels in LABEL_SETS.items():
        if name == "many":
            continue
        try:
            trie_of(tokenizer, labels)
        except ModelError:
            refused += 1
        else:
            check_each_label_alone(tokenizer, labels)
    assert refused or kind == "nfkc"  # which has all these characters as they are


def test_the_classes_of_a_path_are_those_labels_taken_together(tokenizers: Any) -> None:
    trie = trie_of(tokenizers.student, LABEL_SETS["share more"])
    width = len(token_bytes(tokenizers.student))
    branches = {
        n: label_logprobs(2 * mx.random.normal((3, width)), node, rest=True)
        for n, node in enumerate(trie.nodes)
    }
    assert len(trie.nodes) > 2
    whole = class_logprobs(trie, branches)
    for last in range(len(trie.nodes)):
        path = trie.chain(last)
        merged = np.array(mx.exp(merge_labels(whole, trie.classes(path))))
        classes = np.array(mx.exp(class_logprobs(trie, {n: branches[n] for n in path})))
        # Everything else has more mass in the whole, which sees it leave at further nodes.
        assert (merged[:, :-1] <= classes[:, :-1] + 1e-6).all() and merged.shape == classes.shape
        np.testing.assert_allclose(classes.sum(-1), 1, atol=1e-5)
        assert sorted(i for labels, _, _ in trie.classes(path) for i in labels) == list(range(5))


def test_labels_that_cannot_be_told_apart_are_refused(tokenizers: Any) -> None:
    for labels in (["yes"], ["yes", ""], ["yes", "no", "yes"]):
        with pytest.raises(ConfigError, match="at least two different labels, none of them empty"):
            trie_of(tokenizers.student, labels)
    from tokenizers import normalizers

    other = words('"', "}", "f", "e")
    with pytest.raises(ModelError, match="cannot write the label 'fz'"):
        label_trie(other, ["fz", "e"], lambda text: ['"}fe'.index(c) for c in text if c != "z"], before='"')
    tokenizer = tokenizers.student.__class__.from_str(tokenizers.student.to_str())
    tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ModelError, match="alike"):
        trie_of(tokenizer, ["caf\u00e9", "cafe\u0301"])
    trie_of(tokenizer, ["cafe\u0301", "tea"])


def test_logprobs_are_the_renormalised_mass_of_each_labels_tokens() -> None:
    tokens = one_node(("a", "b", "c"), ((0, 3, 5), (1,), (2, 7))).nodes[0]
    logits = 3 * mx.random.normal((2, 4, 9))
    p = np.exp(np.array(logits, np.float64))
    mass = np.stack([p[..., list(ids)].sum(-1) for ids in tokens.ids], axis=-1)
    got = np.array(label_logprobs(logits, tokens))
    assert got.shape == (2, 4, 3)
    np.testing.assert_allclose(np.exp(got), mass / mass.sum(-1, keepdims=True), rtol=1e-5)


def test_all_other_tokens_are_one_more_class_on_request() -> None:
    tokens = one_node(("a", "b", "c"), ((0, 3, 5), (1,), (2, 7))).nodes[0]
    logits = 3 * mx.random.normal((2, 4, 9))
    p = np.exp(np.array(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    want = np.stack([p[..., list(ids)].sum(-1) for ids in (*tokens.ids, (4, 6, 8))], axis=-1)
    np.testing.assert_allclose(np.exp(np.array(label_logprobs(logits, tokens, rest=True))), want, rtol=1e-5)
    # Where a label is all there is, the rest is impossible, not undefined.
    tokens = one_node(("a", "b"), ((0, 2), (1,))).nodes[0]
    alone = label_logprobs(mx.array([[1.0, 2.0, 3.0], [1.0, 2.0, -float("inf")]]), tokens, rest=True)
    assert mx.isfinite(alone).all().item() and mx.exp(alone[:, 2]).tolist() == [0, 0]


def test_mass_outside_the_labels_moves_into_them() -> None:
    """Both models agree among the labels; they differ only in the class of all other tokens."""
    tokens = one_node(("a", "b"), ((0,), (1,))).nodes[0]
    teacher, student = mx.array([[3.0, 1.0, -9.0]]), mx.array([[3.0, 1.0, 5.0]])

    def loss(z: mx.array, rest: bool) -> mx.array:
        return label_kl(
            label_logprobs(z, tokens, rest=rest), label_logprobs(teacher, tokens, rest=rest)
        ).sum()

    assert mx.abs(mx.grad(loss)(student, False)).max().item() == pytest.approx(0, abs=1e-6)
    pull = mx.grad(loss)(student, True)[0].tolist()
    assert pull[2] > 0.5 > 0 > pull[0] and pull[1] < 0


def test_gradient_of_logprobs() -> None:
    tokens = one_node(("a", "b"), ((0, 3), (1,))).nodes[0]
    logits = mx.random.normal((3, 6))
    grad = np.array(mx.grad(lambda z: label_logprobs(z, tokens)[:, 0].sum())(logits))
    p = np.exp(np.array(logits, np.float64))
    inside = np.zeros_like(p)
    inside[:, [0, 3]] = p[:, [0, 3]] / p[:, [0, 3]].sum(-1, keepdims=True)
    every = np.zeros_like(p)
    every[:, [0, 1, 3]] = p[:, [0, 1, 3]] / p[:, [0, 1, 3]].sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, inside - every, atol=1e-6)


def test_other_tokens_have_no_influence_even_when_masked() -> None:
    tokens = one_node(("a", "b"), ((0,), (1, 2))).nodes[0]
    base = mx.array([[1.0, 2.0, 3.0, 4.0]])
    other = mx.array([[1.0, 2.0, 3.0, -float("inf")]])
    assert mx.array_equal(label_logprobs(base, tokens), label_logprobs(other, tokens))


def test_logits_of_another_model_are_refused() -> None:
    with pytest.raises(ModelError, match="label token 7 for logits of 4 columns"):
        label_logprobs(mx.zeros((1, 4)), one_node(("a", "b"), ((0,), (7,))).nodes[0])


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
    sides = [trie_of(tokenizer).nodes[0] for tokenizer in tokenizers]
    widths = [len(token_bytes(tokenizer)) for tokenizer in tokenizers]
    logprobs = [
        label_logprobs(mx.random.normal((3, w)), tokens) for w, tokens in zip(widths, sides, strict=True)
    ]
    assert label_kl(*logprobs).shape == (3,)
