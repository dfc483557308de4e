"""Cells: what the tokens of two byte-level vocabularies have in common.

A cell is named by a token that both have; a token that only one side has is in the cell of its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_distill.errors import ConfigError
from mlx_distill.losses.byte_alignment import Vocabulary, vocabulary


@dataclass(frozen=True)
class TokenGroups:
    """Which cell each token of either vocabulary belongs to.

    ``student [v]`` and ``teacher [w]`` int32 give a cell from 0 to ``cells - 1`` for each token id; the last
    cell, ``outside``, holds what the other side cannot say (special tokens, unused ids) and never counts as a
    target. ``shared`` is the number of tokens that both vocabularies have, special ones and stops apart.
    """

    student: np.ndarray
    teacher: np.ndarray
    cells: int
    shared: int

    @property
    def outside(self) -> int:
        """The cell of everything that has no counterpart."""
        return self.cells - 1


def build_token_groups(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_stop: int | Iterable[int] | None = None,
    teacher_stop: int | Iterable[int] | None = None,
) -> TokenGroups:
    """Lay two byte-level vocabularies over each other: one cell a shared token, every other token in the cell
    of its beginning.

    A token that only one side has joins the cell of the *first token of its re-encoding by the other side*
    (where its bytes are no text, of the longest token that begins it), again and again until a shared token
    is reached. Taking the re-encoding and not the longest prefix keeps the target in line with the text that
    the student is trained on. With one tokenizer on both sides each token is its own cell. The idea of prefix
    mass is that of byte-prefix marginalisation; the canonical parent is this library's own.

    Args:
        student_tokenizer: A byte-level BPE from ``transformers``, ``mlx_lm`` or ``tokenizers``.
        teacher_tokenizer: The same.
        student_stop: The token or tokens that end the student's turn; they share one cell with the teacher's.
        teacher_stop: The token or tokens that end the teacher's turn.

    Raises:
        ModelError: A tokenizer that is not byte-level.
        ConfigError: A stop token that its tokenizer does not have, or a stop on one side only.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> def tiny(vocab, merges=()):
    ...     tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    ...     tokenizer.decoder = decoders.ByteLevel()
    ...     return tokenizer
    >>> cells = build_token_groups(tiny({"a": 0, "b": 1}), tiny({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> cells.teacher.tolist(), cells.shared
    ([0, 1, 0], 2)
    """
    student, teacher = vocabulary(student_tokenizer), vocabulary(teacher_tokenizer)
    width = len(student.tokens)
    total = width + len(teacher.tokens)
    # Nodes: the student's tokens, then the teacher's, then "outside". Each points at its parent; roots point
    # at themselves.
    parent = np.full(total + 1, total, dtype=np.int64)
    mine = {token: i for i, token in reversed(list(enumerate(student.tokens))) if token}
    theirs = {token: i for i, token in reversed(list(enumerate(teacher.tokens))) if token}
    shared = mine.keys() & theirs.keys()
    for i, token in enumerate(student.tokens):
        if token in shared:
            parent[i] = mine[token]
    for i, token in enumerate(teacher.tokens):
        if token in shared:
            parent[width + i] = mine[token]
    _adopt(
        parent,
        {i: token for token, i in mine.items() if token not in shared},
        teacher,
        theirs,
        at=0,
        other_at=width,
    )
    _adopt(
        parent,
        {i: token for token, i in theirs.items() if token not in shared},
        student,
        mine,
        at=width,
        other_at=0,
    )
    _join_specials(parent, student, teacher, width)
    _join_stops(
        parent, _stops(student_stop, student, "student"), _stops(teacher_stop, teacher, "teacher"), width
    )
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    roots, cells = np.unique(parent, return_inverse=True)
    cells = cells.astype(np.int32)
    return TokenGroups(
        student=cells[:width], teacher=cells[width:total], cells=len(roots), shared=len(shared)
    )


def _adopt(
    parent: np.ndarray,
    orphans: dict[int, bytes],
    other: Vocabulary,
    ids: dict[bytes, int],
    *,
    at: int,
    other_at: int,
) -> None:
    """Give each token that only one side has its parent on the other side."""
    texts = {}
    for i, token in orphans.items():
        try:
            texts[i] = token.decode("utf-8")
        except UnicodeDecodeError:
            continue
    firsts: dict[int, bytes] = {}
    for i, encoding in zip(
        texts, other.backend.encode_batch(list(texts.values()), add_special_tokens=False), strict=True
    ):
        if encoding.ids:
            firsts[i] = other.tokens[encoding.ids[0]]
    for i, token in orphans.items():
        first = firsts.get(i, b"")
        # A normalizer or an added space can make the re-encoding begin with other bytes.
        if not first or len(first) >= len(token) or not token.startswith(first):
            first = next((token[:n] for n in range(len(token) - 1, 0, -1) if token[:n] in ids), b"")
        if first:
            parent[at + i] = other_at + ids[first]


def _join_specials(parent: np.ndarray, student: Vocabulary, teacher: Vocabulary, width: int) -> None:
    ids = {text: i for i, text in student.special.items()}
    for i, text in teacher.special.items():
        if text in ids:
            parent[ids[text]] = parent[width + i] = ids[text]


def _join_stops(parent: np.ndarray, student: list[int], teacher: list[int], width: int) -> None:
    if bool(student) != bool(teacher):
        raise ConfigError(
            "a stop token on one side only", fix="give both student_stop and teacher_stop, or neither"
        )
    for i in student:
        parent[i] = student[0]
    for i in teacher:
        parent[width + i] = student[0]


def _stops(stop: int | Iterable[int] | None, known: Vocabulary, side: str) -> list[int]:
    stops = [] if stop is None else [stop] if isinstance(stop, int | np.integer) else list(stop)
    for i in stops:
        if not 0 <= i < len(known.tokens):
            raise ConfigError(
                f"{side}_stop: the tokenizer has no token {i}",
                fix="give the id of the token that ends the assistant's turn",
            )
    return [int(i) for i in stops]
