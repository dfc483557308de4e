"""Alignment of two tokenizations of the same text by their bytes.

Every token is a string of bytes (:mod:`mlx_distill.losses.token_bytes`). The *common boundaries* of two
tokenizations are the byte positions at which both end a token. Between two successive boundaries is a *span*:
some tokens of the student and some of the teacher that hold the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
from jaxtyping import Int

from mlx_distill.errors import DataError
from mlx_distill.losses.token_bytes import Vocabulary, vocabulary

# Ids as callers have them: a list, a numpy or an mlx array.
Ids: TypeAlias = Sequence[int] | np.ndarray | mx.array


def align_bytes(
    student_ids: Ids, teacher_ids: Ids, student_tokenizer: Any, teacher_tokenizer: Any
) -> Int[np.ndarray, "spans 4"]:
    """The smallest spans of tokens that hold the same bytes in both tokenizations.

    A span ends wherever both tokenizations end a token. Special tokens hold no bytes; at the edge of a span
    they belong to none. A space that a tokenizer writes before a text that has none is left out. Source: the
    chunks of Minixhofer et al. 2025 (ALM), https://arxiv.org/abs/2503.20083.

    Args:
        student_ids: Token ids of a text.
        teacher_ids: Token ids of the same text.
        student_tokenizer: From ``transformers``, ``mlx_lm`` or ``tokenizers``; its tokens name their bytes.
        teacher_tokenizer: The same.

    Returns:
        ``[spans, 4]`` int32: student start, student end, teacher start, teacher end; ends are exclusive.

    Raises:
        DataError: The two texts differ (the message says where), or an id that its tokenizer does not have.
        ModelError: A tokenizer whose tokens do not name their bytes.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> align_bytes([0, 1, 3], [2, 3], tokenizer, tokenizer).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]
    """
    return align_tokens(student_ids, teacher_ids, student_tokenizer, teacher_tokenizer).spans


class Alignment(NamedTuple):
    """``spans [spans, 4]`` as of :func:`align_bytes`, and whether the first tokens of both texts begin at the
    same byte. They do not where one of them begins with a space that its tokenizer writes before a text: then
    the distributions that they are drawn from are over different texts.
    """

    spans: Int[np.ndarray, "spans 4"]
    same_start: bool


def align_tokens(
    student_ids: Ids, teacher_ids: Ids, student_tokenizer: Any, teacher_tokenizer: Any
) -> Alignment:
    """:func:`align_bytes` with what is known of the texts' beginnings."""
    student, teacher = vocabulary(student_tokenizer), vocabulary(teacher_tokenizer)
    s, t = _ids(student_ids, student, "student"), _ids(teacher_ids, teacher, "teacher")
    student_text = b"".join(student.tokens[i] for i in s.tolist())
    teacher_text = b"".join(teacher.tokens[i] for i in t.tolist())
    lengths = student.lengths[s], teacher.lengths[t]
    same_start = True
    if student_text != teacher_text:
        if student.prefix_space and student_text == b" " + teacher_text:
            written = lengths[0]
        elif teacher.prefix_space and teacher_text == b" " + student_text:
            written = lengths[1]
        else:
            raise _difference(student_text, teacher_text)
        first = np.flatnonzero(written)[0]
        written[first] -= 1  # a copy
        same_start = written[first] == 0
    return Alignment(align_lengths(*lengths), bool(same_start))


def common_cut(
    student_ids: Ids, teacher_ids: Ids, student_tokenizer: Any, teacher_tokenizer: Any, length: int
) -> tuple[int, int]:
    """How many tokens of either tokenization stand before the last byte position, of a text of ``length``
    bytes, at which both end a token: the tokens behind it hold text that only one of them has.

    Args:
        student_ids, teacher_ids, student_tokenizer, teacher_tokenizer: As in :func:`align_bytes`.
        length: Bytes that both have in common.

    Raises:
        DataError: the two texts differ before that.
    """
    student, teacher = vocabulary(student_tokenizer), vocabulary(teacher_tokenizer)
    texts, ends = [], []
    for ids, tokens, model in ((student_ids, student, "student"), (teacher_ids, teacher, "teacher")):
        own = _ids(ids, tokens, model)
        text = b"".join(tokens.tokens[i] for i in own.tolist())
        shift = int(tokens.prefix_space and text[:1] == b" ")  # written before a text that has none
        texts.append(text[shift:])
        ends.append(np.cumsum(tokens.lengths[own]) - shift)
    if texts[0][:length] != texts[1][:length]:
        raise _difference(texts[0][:length], texts[1][:length])
    shared = np.intersect1d(ends[0], ends[1])
    last = max((end for end in shared.tolist() if end <= length), default=0)
    student_count, teacher_count = (int(np.searchsorted(end, last, side="right")) for end in ends)
    return student_count, teacher_count


def align_lengths(
    student_lengths: Int[np.ndarray, " l"], teacher_lengths: Int[np.ndarray, " m"]
) -> Int[np.ndarray, "spans 4"]:
    """:func:`align_bytes` from the tokens' byte lengths alone, for texts that are known to be equal.

    Args:
        student_lengths: Bytes of each student token, 0 for special tokens.
        teacher_lengths: Those of the teacher's tokens, with the same sum.

    Returns:
        ``[spans, 4]`` int32: student start, student end, teacher start, teacher end.

    Raises:
        DataError: The sums differ.

    >>> align_lengths(np.array([1, 1, 1]), np.array([2, 1])).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]
    """
    s, t = np.flatnonzero(student_lengths), np.flatnonzero(teacher_lengths)
    s_ends, t_ends = np.cumsum(student_lengths[s]), np.cumsum(teacher_lengths[t])
    if s_ends[-1:].tolist() != t_ends[-1:].tolist():
        raise DataError(
            f"the student's tokens hold {s_ends[-1:].sum()} bytes and the teacher's {t_ends[-1:].sum()}",
            fix="give both models' tokens of the same text",
        )
    shared = np.intersect1d(s_ends, t_ends, assume_unique=True)
    columns = []
    for kept, ends in ((s, s_ends), (t, t_ends)):
        last = np.searchsorted(ends, shared)
        first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
        columns += [kept[first], kept[last] + 1]
    return np.stack(columns, axis=1).astype(np.int32)


def _ids(ids: Ids, tokens: Vocabulary, model: str) -> np.ndarray:
    out = np.asarray(ids, dtype=np.int64).reshape(-1)
    unknown = out[(out < 0) | (out >= len(tokens.tokens))]
    if len(unknown):
        raise DataError(
            f"the {model}'s tokenizer has no token {unknown[0]}",
            fix="give each model's ids together with its own tokenizer",
        )
    return out


def _difference(student: bytes, teacher: bytes) -> DataError:
    at = next(
        (i for i, (a, b) in enumerate(zip(student, teacher, strict=False)) if a != b),
        min(len(student), len(teacher)),
    )
    window = slice(max(0, at - 10), at + 20)
    return DataError(
        f"the two texts differ at byte {at}: student {student[window]!r}, teacher {teacher[window]!r}",
        fix=(
            "tokenize the same text for both; a tokenizer that normalizes (Qwen: NFC) needs text that is "
            "normalized already"
        ),
    )
