from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_distill.errors import DataError, ModelError
from mlx_distill.losses import align_bytes, align_lengths, token_bytes
from mlx_distill.losses.token_bytes import byte_alphabet, vocabulary

SAMPLES = [
    'The answer is {"label": "fine", "score": 73}',
    "1984 and 12345678 and 3.14159",
    "naïve café, 東京 привет",
    "👩‍👩‍👧‍👦🎵 \U0001f1e9\U0001f1ea\n\n\t  x",
    "a",
    "",
]


def plain(student: list[int], teacher: list[int]) -> list[list[int]]:
    """Two pointers over byte lengths."""
    spans, s, t, s_from, t_from, s_end, t_end = [], 0, 0, 0, 0, 0, 0
    while s < len(student) and t < len(teacher):
        if s_end + student[s] < t_end + teacher[t]:
            s_end += student[s]
            s += 1
        elif s_end + student[s] > t_end + teacher[t]:
            t_end += teacher[t]
            t += 1
        else:
            s_end, t_end = s_end + student[s], t_end + teacher[t]
            s, t = s + 1, t + 1
            spans.append([s_from, s, t_from, t])
            s_from, t_from = s, t
    return spans


def assert_aligned(text: str, tokenizers: Any) -> np.ndarray:
    ids = [tokenizer.encode(text).ids for tokenizer in tokenizers]
    bytes_of = [token_bytes(tokenizer) for tokenizer in tokenizers]
    spans = align_bytes(ids[0], ids[1], tokenizers.student, tokenizers.teacher)
    assert b"".join(bytes_of[0][i] for i in ids[0]) == text.encode()
    assert spans.tolist() == plain(
        *[[len(b[i]) for i in side] for b, side in zip(bytes_of, ids, strict=True)]
    )
    for a, b, c, d in spans.tolist():
        assert b"".join(bytes_of[0][i] for i in ids[0][a:b]) == b"".join(bytes_of[1][i] for i in ids[1][c:d])
    # Every token belongs to exactly one span.
    assert [i for a, b, _, _ in spans for i in range(a, b)] == list(range(len(ids[0])))
    assert [i for _, _, c, d in spans for i in range(c, d)] == list(range(len(ids[1])))
    return spans


@pytest.mark.parametrize("text", SAMPLES)
def test_spans_are_the_smallest_that_hold_the_same_bytes(text: str, tokenizers: Any) -> None:
    assert_aligned(text, tokenizers)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=40)
    | st.text(alphabet="0123456789 ,.thefr", max_size=40)
    | st.text(alphabet="é東🎵👩‍👧ïя", max_size=12)
)
def test_any_text(text: str, tokenizers: Any) -> None:
    assert_aligned(text, tokenizers)


@settings(max_examples=150, deadline=None)
@given(cuts=st.tuples(*[st.sets(st.integers(1, 29), max_size=29)] * 2))
def test_any_two_splits_of_thirty_bytes(cuts: tuple[set[int], set[int]]) -> None:
    lengths = [np.diff([0, *sorted(side), 30]) for side in cuts]
    assert align_lengths(*lengths).tolist() == plain(*[side.tolist() for side in lengths])


def test_grouped_and_single_digits_end_together(tokenizers: Any) -> None:
    spans = assert_aligned("12345", tokenizers)
    assert len(spans) < 5
    assert spans[-1].tolist()[1::2] == [len(tokenizers.student.encode("12345").ids), 5]


def test_special_tokens_belong_to_no_span(tokenizers: Any) -> None:
    student, teacher = tokenizers
    s, t = student.encode("fine, so").ids, teacher.encode("fine, so").ids
    bare = align_bytes(s, t, student, teacher)
    s_stop, t_stop = student.token_to_id("<|return|>"), teacher.token_to_id("<|im_end|>")
    np.testing.assert_array_equal(align_bytes([*s, s_stop], [*t, t_stop, t_stop], student, teacher), bare)
    np.testing.assert_array_equal(
        align_bytes([s_stop, *s], t, student, teacher), bare + np.array([1, 1, 0, 0])
    )
    assert align_bytes([s_stop], [t_stop], student, teacher).shape == (0, 4)


def test_lists_and_arrays_of_ids_are_the_same(tokenizers: Any) -> None:
    s, t = (tokenizer.encode(SAMPLES[0]).ids for tokenizer in tokenizers)
    want = align_bytes(s, t, *tokenizers)
    np.testing.assert_array_equal(align_bytes(np.array(s), mx.array(t), *tokenizers), want)
    assert want.dtype == np.int32


def test_different_texts_are_refused_with_the_position(tokenizers: Any) -> None:
    s, t = (
        tokenizers.student.encode("caf\u00e9 au lait").ids,
        tokenizers.teacher.encode("cafe\u0301 au lait").ids,
    )
    with pytest.raises(DataError, match=r"differ at byte 3: student b'caf\\xc3\\xa9 au lait'.*NFC"):
        align_bytes(s, t, *tokenizers)
    with pytest.raises(DataError, match="differ at byte 4"):
        align_bytes(
            tokenizers.student.encode("fine").ids, tokenizers.teacher.encode("fine!").ids, *tokenizers
        )
    with pytest.raises(DataError, match="3 bytes and the teacher's 2"):
        align_lengths(np.array([3]), np.array([1, 1]))


def test_ids_of_another_tokenizer_are_refused(tokenizers: Any) -> None:
    with pytest.raises(DataError, match="student's tokenizer has no token 100000"):
        align_bytes([100_000], [1], *tokenizers)


def test_alphabet_is_a_bijection_and_spells_space_as_gpt_2_does() -> None:
    letters = byte_alphabet()
    assert len(set(letters)) == 256
    assert (letters[0x20], letters[0x0A], letters[0x41], letters[0xAD]) == ("Ġ", "Ċ", "A", "Ń")


def test_special_tokens_and_unused_ids_have_no_bytes_and_added_tokens_their_own(tokenizers: Any) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(tokenizers.student.to_str())
    before = token_bytes(tokenizer)
    tokenizer.add_tokens([AddedToken("<thïnk>", normalized=False)])
    tokenizer.add_special_tokens(["<|call|>"])
    after = token_bytes(tokenizer)
    assert after[: len(before)] == before
    assert after[tokenizer.token_to_id("<thïnk>")] == "<thïnk>".encode()
    assert after[tokenizer.token_to_id("<|call|>")] == b""
    assert vocabulary(tokenizer).special[tokenizer.token_to_id("<|call|>")] == "<|call|>"


def test_tokenizers_of_transformers_and_mlx_lm_work_too(tokenizers: Any) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizers.student)
    assert token_bytes(fast) == token_bytes(tokenizers.student) == token_bytes(TokenizerWrapper(fast))


def test_tokenizers_that_are_not_byte_level_are_refused() -> None:
    from tokenizers import Tokenizer, decoders, models

    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece tokenizer with WordPiece decoder"):
        token_bytes(word_piece)
    odd = Tokenizer(models.BPE({"▁a": 0}, []))
    odd.decoder = decoders.ByteLevel()
    with pytest.raises(ModelError, match="byte alphabet"):
        token_bytes(odd)
    with pytest.raises(ModelError, match="a dict does not expose"):
        token_bytes({})
