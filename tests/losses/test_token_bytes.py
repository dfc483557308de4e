"""The bytes of tokens, their alignment and their groups, for tokenizers in the structure of genuine ones."""

from __future__ import annotations

import itertools
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.tokenizer_kinds import LOSSLESS, PREFIXED, make, spelled

from mlx_distill.errors import DataError, ModelError
from mlx_distill.losses import align_bytes, build_token_groups, token_bytes
from mlx_distill.losses.byte_alignment import align_tokens
from mlx_distill.losses.cross_tokenizer import TopK, group_topk, token_group_kl
from mlx_distill.losses.token_bytes import first_tokens, vocabulary, written

TEXTS = [
    '{"label": "fine", "score": 73, "themes": ["hope", "grace"]}',
    "  two spaces  and\n\n\ta tab ",
    "naïve café, 東京 привет 👩‍👩‍👧‍👦🎵",
    "<0x41> is no byte, <s> no token",
    "a",
    "",
]
PAIRS = [pair for pair in itertools.permutations(LOSSLESS, 2) if {"llama2", "qwen", "gemma"} & set(pair)]


def ids_of(kind: str, text: str) -> list[int]:
    """Split where the text spells a special token, as chats are."""
    pieces = text.replace("<s>", "<\0s>").split("\0")
    return [i for piece in pieces for i in make(kind).encode(piece, add_special_tokens=False).ids]


@pytest.mark.parametrize("text", [text for text in TEXTS if "<s>" not in text])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_tokens_spell_the_text(kind: str, text: str) -> None:
    data = spelled(make(kind), ids_of(kind, text))
    assert data == text.encode() or kind in PREFIXED and data == b" " + text.encode()


@pytest.mark.parametrize("kind", [*LOSSLESS, "xlm_r"])
def test_the_space_before_a_text_is_known(kind: str) -> None:
    assert vocabulary(make(kind)).prefix_space == (kind in PREFIXED)
    tokens = token_bytes(make(kind))
    assert [tokens[i] for i in range(5)] == [b""] * 5  # special tokens


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_spans_hold_the_bytes_of_both_texts(student: str, teacher: str) -> None:
    for text in (text for text in TEXTS if "<s>" not in text):
        s, t = ids_of(student, text), ids_of(teacher, text)
        spans = align_bytes(s, t, make(student), make(teacher))
        sides = [(make(student), s, spans[:, :2]), (make(teacher), t, spans[:, 2:])]
        parts = [[spelled(tok, ids[a:b]) for a, b in ends.tolist()] for tok, ids, ends in sides]
        if text:
            parts = [[side[0].removeprefix(b" " * (text[0] != " ")), *side[1:]] for side in parts]
        assert parts[0] == parts[1] and b"".join(parts[0]) in (text.encode(), b" " + text.encode())
        # Every token with bytes belongs to exactly one span; only a written space may stand before the first.
        for (_, ids, ends), name in zip(sides, (student, teacher), strict=True):
            inside = [i for a, b in ends.tolist() for i in range(a, b)]
            assert inside in (list(range(len(ids))), list(range(1, len(ids)))) and (
                len(inside) == len(ids) or name in PREFIXED
            )


def test_a_written_space_decides_where_the_first_distributions_are_comparable() -> None:
    qwen, llama = make("qwen"), make("llama2")
    merged = llama.encode("the end", add_special_tokens=False)
    assert merged.tokens[0].startswith("▁") and len(merged.tokens[0]) > 1
    spans, same = align_tokens(merged.ids, qwen.encode("the end").ids, llama, qwen)
    assert not same and spans[0].tolist()[::2] == [0, 0]
    assert not align_tokens(qwen.encode("the end").ids, merged.ids, qwen, llama).same_start
    alone = llama.encode("東", add_special_tokens=False)  # the mark is a token of its own
    assert alone.tokens[0] == "▁"
    spans, same = align_tokens(alone.ids, qwen.encode("東").ids, llama, qwen)
    assert same and spans[0].tolist()[::2] == [1, 0]
    # A real space is aligned as every other byte.
    assert align_tokens(llama.encode("the").ids, qwen.encode(" the").ids, llama, qwen).same_start
    assert align_tokens(merged.ids, merged.ids, llama, llama).same_start


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_groups_are_founded_by_common_tokens_and_hold_their_continuations(student: str, teacher: str) -> None:
    groups = build_token_groups(make(student), make(teacher), student_stop=4, teacher_stop=4)
    sides = [token_bytes(make(student)), token_bytes(make(teacher))]
    common = (set(sides[0]) & set(sides[1])) - {b""}
    assert groups.shared == len(common) > 50
    by_one = written(vocabulary(make(student)), common) ^ written(vocabulary(make(teacher)), common)
    assert len(by_one) < 5
    founding = common - by_one
    for tokens, numbers in zip(sides, (groups.student, groups.teacher), strict=True):
        of = {token: int(numbers[i]) for i, token in enumerate(tokens) if token in common}
        assert len({of[token] for token in founding}) == len(founding)
        founder = {number: token for token, number in sorted(of.items(), key=lambda item: -len(item[0]))}
        for i, token in enumerate(tokens):
            if token and int(numbers[i]) != groups.outside:
                assert token.startswith(founder[int(numbers[i])])
    assert groups.student[4] == groups.teacher[4] != groups.outside


@pytest.mark.parametrize(
    ("student", "teacher"), [("llama2", "qwen"), ("qwen", "gemma"), ("helium", "llama3")]
)
def test_the_probabilities_of_groups_sum_to_one(student: str, teacher: str) -> None:
    groups = build_token_groups(make(student), make(teacher), student_stop=4, teacher_stop=4)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, len(groups.teacher))).astype(np.float32) * 2
    logprobs = mx.array(z) - mx.logsumexp(mx.array(z), axis=-1, keepdims=True)
    ids = mx.broadcast_to(mx.arange(z.shape[1]), z.shape)
    _, masses, unlisted = group_topk(TopK(ids, logprobs), groups)
    outside = np.exp(np.array(logprobs))[:, groups.teacher == groups.outside].sum(1)
    np.testing.assert_allclose(np.exp(np.array(masses)).sum(1) + outside, 1, atol=1e-5)
    assert not np.array(unlisted).any()
    # A student with the same probabilities of groups has no divergence.
    mass = np.zeros((5, groups.count))
    np.add.at(mass, (slice(None), groups.teacher), np.exp(np.array(logprobs)))
    members = np.bincount(groups.student, minlength=groups.count)
    q = (mass / np.maximum(members, 1))[:, groups.student]
    value = token_group_kl(mx.log(mx.array(q.astype(np.float32) + 1e-30)), TopK(ids, logprobs), groups)
    lost = mass[:, members == 0].sum(1)
    np.testing.assert_allclose(np.array(value)[lost < 1e-6], 0, atol=1e-4)


def test_columns_of_the_student_limit_its_groups() -> None:
    groups = build_token_groups(make("llama2"), make("qwen"), student_columns=300)
    assert len(groups.student) == 300
    value = token_group_kl(mx.zeros((1, 300)), TopK(mx.array([[30]]), mx.array([[-0.5]])), groups)
    assert np.isfinite(np.array(value)).all()


def test_a_token_is_looked_up_as_the_continuation_of_a_text() -> None:
    llama = vocabulary(make("llama2"))
    (fine, space, nothing) = first_tokens(llama, ["fine", " fine", ""])
    assert llama.tokens[fine] != b"" and b"fine".startswith(llama.tokens[fine])  # type: ignore[index]
    assert llama.tokens[space].startswith(b" ") and nothing is None  # type: ignore[index]


def test_unknown_characters_have_no_bytes_and_their_texts_cannot_be_aligned() -> None:
    xlm = make("xlm_r")
    assert spelled(xlm, xlm.encode("the 東 end").ids) == b" the  end"
    with pytest.raises(DataError, match="differ at byte"):
        align_bytes(xlm.encode("the 東 end").ids, make("qwen").encode("the 東 end").ids, xlm, make("qwen"))
    same = "the end of the weather"
    assert len(align_bytes(xlm.encode(same).ids, make("qwen").encode(same).ids, xlm, make("qwen")))


def test_a_normalizer_that_changes_few_characters_is_found_at_the_text_that_has_them() -> None:
    nfkc, qwen = make("nfkc"), make("qwen")
    assert len(align_bytes(nfkc.encode("the end").ids, qwen.encode("the end").ids, nfkc, qwen))
    with pytest.raises(DataError, match="a tokenizer that normalizes"):
        align_bytes(nfkc.encode("ﬁne").ids, qwen.encode("ﬁne").ids, nfkc, qwen)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("word_piece", "a WordPiece tokenizer with WordPiece decoder does not name the bytes"),
        ("lower", "changes plain text: 'The answer .*' becomes ' the answer"),
    ],
)
def test_tokenizers_without_bytes_are_refused(kind: str, error: str) -> None:
    with pytest.raises(ModelError, match=error):
        token_bytes(make(kind))


def test_byte_tokens_that_are_marked_as_special_keep_their_byte() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(make("llama2").to_str())
    tokenizer.add_special_tokens(["<0x0A>"])
    assert token_bytes(tokenizer)[tokenizer.token_to_id("<0x0A>")] == b"\n"


def test_without_byte_fallback_in_the_decoder_a_byte_token_is_its_text() -> None:
    from tokenizers import Tokenizer

    raw: dict[str, Any] = json.loads(make("llama2").to_str())
    raw["decoder"] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    assert token_bytes(tokenizer)[tokenizer.token_to_id("<0x0A>")] == b"<0x0A>"
