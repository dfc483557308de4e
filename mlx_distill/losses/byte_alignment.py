"""Alignment of two tokenizations of the same text by their bytes.

Every token of a byte-level BPE is a string of bytes. The *common boundaries* of two tokenizations are the
byte positions at which both end a token. Between two successive boundaries is a *span*: some tokens of the
student and some of the teacher that hold the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
from jaxtyping import Int

from mlx_distill.errors import DataError, ModelError

# Ids as callers have them: a list, a numpy or an mlx array.
Ids: TypeAlias = Sequence[int] | np.ndarray | mx.array


class Vocabulary(NamedTuple):
    """A tokenizer's bytes and byte lengths by token id, and the text of its special tokens by id."""

    tokens: tuple[bytes, ...]
    lengths: np.ndarray
    special: dict[int, str]
    backend: Any


# Reading 200,000 tokens takes a fraction of a second, aligning a row microseconds. Keyed by id(); an entry
# holds its tokenizer, so that no other object can get the same id.
_cache: dict[int, Vocabulary] = {}
_CACHE_SIZE = 8


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token of a byte-level BPE, by id.

    A token's text is written in GPT-2's alphabet of 256 printable characters, one per byte. Special tokens
    have no text and give ``b""``, as do unused ids; other added tokens are their own UTF-8. Source: Radford
    et al. 2019 (GPT-2).

    Args:
        tokenizer: From ``transformers``, ``mlx_lm`` or ``tokenizers``.

    Returns:
        One ``bytes`` per id, up to the highest id.

    Raises:
        ModelError: Not a byte-level BPE (SentencePiece, WordPiece, a tokenizer without a ``tokenizer.json``).

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"Ġ": 0, "a": 1, "Ã": 2}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> token_bytes(tokenizer)
    [b' ', b'a', b'\\xc3']
    """
    return list(vocabulary(tokenizer).tokens)


def align_bytes(
    student_ids: Ids, teacher_ids: Ids, student_tokenizer: Any, teacher_tokenizer: Any
) -> Int[np.ndarray, "spans 4"]:
    """The smallest spans of tokens that hold the same bytes in both tokenizations.

    A span ends wherever both tokenizations end a token. Special tokens hold no bytes; at the edge of a span
    they belong to none. Source: the chunks of Minixhofer et al. 2025 (ALM), https://arxiv.org/abs/2503.20083.

    Args:
        student_ids: Token ids of a text.
        teacher_ids: Token ids of the same text.
        student_tokenizer: A byte-level BPE from ``transformers``, ``mlx_lm`` or ``tokenizers``.
        teacher_tokenizer: The same.

    Returns:
        ``[spans, 4]`` int32: student start, student end, teacher start, teacher end; ends are exclusive.

    Raises:
        DataError: The two texts differ (the message says where), or an id that its tokenizer does not have.
        ModelError: A tokenizer that is not byte-level.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> align_bytes([0, 1, 3], [2, 3], tokenizer, tokenizer).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]
    """
    student, teacher = vocabulary(student_tokenizer), vocabulary(teacher_tokenizer)
    s, t = _ids(student_ids, student, "student"), _ids(teacher_ids, teacher, "teacher")
    student_text = b"".join(student.tokens[i] for i in s.tolist())
    teacher_text = b"".join(teacher.tokens[i] for i in t.tolist())
    if student_text != teacher_text:
        raise _difference(student_text, teacher_text)
    return align_lengths(student.lengths[s], teacher.lengths[t])


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


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Bytes, byte lengths and special tokens of a tokenizer; cached."""
    backend = backend_of(tokenizer)
    cached = _cache.get(id(backend))
    if cached is None or len(cached.tokens) < backend.get_vocab_size():
        while len(_cache) >= _CACHE_SIZE:
            _cache.pop(next(iter(_cache)))
        cached = _cache[id(backend)] = _read(backend)
    return cached


def backend_of(tokenizer: Any) -> Any:
    """The ``tokenizers.Tokenizer`` of a tokenizer from ``transformers`` or ``mlx_lm``, or the argument."""
    for candidate in (
        tokenizer,
        getattr(tokenizer, "backend_tokenizer", None),
        getattr(tokenizer, "_tokenizer", None),
    ):
        if (
            hasattr(candidate, "get_added_tokens_decoder")
            and hasattr(candidate, "encode_batch")
            and hasattr(candidate, "to_str")
        ):
            return candidate
    raise ModelError(
        f"a {type(tokenizer).__name__} does not expose the bytes of its tokens",
        fix="use a fast tokenizer: a model folder with a tokenizer.json",
    )


def _read(backend: Any) -> Vocabulary:
    if "ByteLevel" not in str(backend.decoder):
        raise ModelError(
            "the tokenizer is not a byte-level BPE: its tokens do not name their bytes",
            fix="use models with a GPT-2 style tokenizer.json (Qwen, gpt-oss, Llama 3, SmolLM)",
        )
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max([*vocab.values(), *added, -1]) + 1)
    table = {ord(character): byte for byte, character in enumerate(byte_alphabet())}
    for text, i in vocab.items():
        if i not in added:
            try:
                tokens[i] = text.translate(table).encode("latin-1")
            except UnicodeEncodeError:
                raise ModelError(
                    f"token {i} ({text!r}) is not written in the byte alphabet",
                    fix="use a byte-level BPE tokenizer",
                ) from None
    special = {}
    for i, token in added.items():
        if token.special:
            special[i] = token.content
        else:
            tokens[i] = token.content.encode("utf-8")
    return Vocabulary(
        tuple(tokens), np.array([len(token) for token in tokens], dtype=np.int64), special, backend
    )


def byte_alphabet() -> str:
    """GPT-2's 256 printable characters, in the order of the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(letters[byte] for byte in range(256))


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
