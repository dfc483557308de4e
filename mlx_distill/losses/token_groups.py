"""Token groups: a common partition of the tokens of two vocabularies, by their bytes.

Every token that both vocabularies have founds a group. A token that only one vocabulary has, or that only
one tokenizer ever writes, belongs to the group of a shared token that is a prefix of its bytes. Probabilities
over tokens of either vocabulary become probabilities over the same groups by summing, and can then be
compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_distill.errors import ConfigError
from mlx_distill.losses.token_bytes import Vocabulary, continuations, first_tokens, vocabulary, written


@dataclass(frozen=True)
class TokenGroups:
    """The group of each token of both vocabularies.

    Args:
        student: ``[v]`` int32, the group of each student token id, from 0 to ``count - 1``.
        teacher: ``[w]`` int32, the group of each teacher token id.
        count: The number of groups. The last one, ``outside``, holds the tokens without a counterpart
            (special tokens, unused ids); it is never a target.
        shared: How many tokens both vocabularies have, special and stop tokens not counted.
        same_token: ``[w]`` int32, the student's token that is the same as each of the teacher's: of the same
            bytes, a special one of the same text, or both stop tokens; -1: none. No token twice.
        pieces: ``[v, 4]`` int32, the first teacher tokens that each of the student's is written with: the
            same one, or those of its re-encoding; -1: no more. None where its bytes are no text.
    """

    student: np.ndarray
    teacher: np.ndarray
    count: int
    shared: int
    same_token: np.ndarray | None = None
    pieces: np.ndarray | None = None

    @property
    def outside(self) -> int:
        """The group of all tokens that have no counterpart."""
        return self.count - 1


def build_token_groups(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_stop: int | Iterable[int] | None = None,
    teacher_stop: int | Iterable[int] | None = None,
    student_columns: int = 0,
) -> TokenGroups:
    """Partition two vocabularies into common groups: one group per shared token, every other token
    in the group of a prefix of it.

    The parent of a token that only one model has is the *first token of its re-encoding by the other model's
    tokenizer* (if its bytes are not valid UTF-8, the other model's longest token that is a proper prefix).
    Parents are followed until a shared token is reached. The re-encoding is used, not the longest prefix,
    because it is what the student's tokenizer writes at that place in the text it is trained on. A token of
    both that only one of the tokenizers ever writes (Qwen's rule for words splits off Thai vowel signs, so
    its longer Thai tokens never occur) counts as one that only that model has. With the same tokenizer for
    both models each token is its own group. Summing mass over byte prefixes is known as byte-prefix
    marginalisation; the choice of the parent by re-encoding is this library's own.

    Args:
        student_tokenizer: From ``transformers``, ``mlx_lm`` or ``tokenizers``; its tokens name their bytes.
        teacher_tokenizer: The same.
        student_stop: The token or tokens that end the student's turn; they form one group with the teacher's.
        teacher_stop: The token or tokens that end the teacher's turn.
        student_columns: The width of the student's logits: its tokens beyond are left out. 0 for all.

    Raises:
        ModelError: A tokenizer whose tokens do not name their bytes.
        ConfigError: A stop token that its tokenizer does not have, or stop tokens of one model only.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> def tiny(vocab, merges=()):
    ...     tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    ...     tokenizer.decoder = decoders.ByteLevel()
    ...     return tokenizer
    >>> groups = build_token_groups(tiny({"a": 0, "b": 1}), tiny({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> groups.teacher.tolist(), groups.shared
    ([0, 1, 0], 2)
    """
    student, teacher = vocabulary(student_tokenizer), vocabulary(teacher_tokenizer)
    if student_columns:
        student = _within(student, student_columns)
    width = len(student.tokens)
    total = width + len(teacher.tokens)
    # A forest over the student's tokens, then the teacher's, then one node for "outside". Each node points at
    # its parent, a root at itself; a tree is a group.
    parent = np.full(total + 1, total, dtype=np.int64)
    student_ids, teacher_ids = _ids_by_bytes(student), _ids_by_bytes(teacher)
    shared = student_ids.keys() & teacher_ids.keys()
    for i, token in enumerate(student.tokens):
        if token in shared:
            parent[i] = student_ids[token]
    for i, token in enumerate(teacher.tokens):
        if token in shared:
            parent[width + i] = student_ids[token]
    students, teachers = _written_by_one(student, teacher, shared)
    for token in teachers:  # the teacher's token is the one that gets a parent
        parent[student_ids[token]] = parent[width + teacher_ids[token]] = width + teacher_ids[token]
    student_only = {i: t for t, i in student_ids.items() if t not in shared or t in students}
    teacher_only = {i: t for t, i in teacher_ids.items() if t not in shared or t in teachers}
    for i, token_id in _prefix_parents(student_only, teacher, teacher_ids):
        parent[i] = width + token_id
    for i, token_id in _prefix_parents(teacher_only, student, student_ids):
        parent[width + i] = token_id
    _join_specials(parent, student, teacher, width)
    stops = _stops(student_stop, student, "student"), _stops(teacher_stop, teacher, "teacher")
    _join_stops(parent, *stops, width)
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    roots, groups = np.unique(parent, return_inverse=True)
    groups = groups.astype(np.int32)
    same = _same_tokens(student, teacher, *stops)
    return TokenGroups(
        student=groups[:width],
        teacher=groups[width:total],
        count=len(roots),
        shared=len(shared),
        same_token=same,
        pieces=_pieces(student, teacher, same),
    )


def _written_by_one(
    student: Vocabulary, teacher: Vocabulary, shared: Collection[bytes]
) -> tuple[set[bytes], set[bytes]]:
    """The shared tokens that the student alone and that the teacher alone writes: where the one has the
    token, the other has the shorter tokens of its re-encoding.
    """
    by_student, by_teacher = written(student, shared), written(teacher, shared)
    return by_student - by_teacher, by_teacher - by_student


def _same_tokens(
    student: Vocabulary, teacher: Vocabulary, student_stop: list[int], teacher_stop: list[int]
) -> np.ndarray:
    """The student's token that is the same as each token of the teacher, or -1."""
    ours = {text: i for i, text in student.special.items()} | _ids_by_bytes(student)
    theirs = {text: i for i, text in teacher.special.items()} | _ids_by_bytes(teacher)
    same = np.full(len(teacher.tokens), -1, dtype=np.int32)
    for name in ours.keys() & theirs.keys():
        same[theirs[name]] = ours[name]
    if student_stop:
        same[np.isin(same, student_stop)] = -1
        same[teacher_stop] = -1
        same[teacher_stop[0]] = student_stop[0]
    return same


def _pieces(student: Vocabulary, teacher: Vocabulary, same: np.ndarray) -> np.ndarray:
    """The first four tokens of the teacher that each token of the student is written with."""
    pieces = np.full((len(student.tokens), 4), -1, dtype=np.int32)
    pieces[same[same >= 0], 0] = np.flatnonzero(same >= 0)
    texts = {}
    for i in np.flatnonzero(pieces[:, 0] < 0).tolist():
        try:
            texts[i] = student.tokens[i].decode()
        except UnicodeDecodeError:
            continue
    for i, ids in zip(texts, continuations(teacher, list(texts.values())), strict=True):
        if all(one < len(teacher.tokens) for one in ids):
            pieces[i, : min(4, len(ids))] = ids[:4]
    return pieces


def _within(tokens: Vocabulary, columns: int) -> Vocabulary:
    """The tokens with an id below ``columns``."""
    special = {i: text for i, text in tokens.special.items() if i < columns}
    return tokens._replace(tokens=tokens.tokens[:columns], lengths=tokens.lengths[:columns], special=special)


def _ids_by_bytes(tokens: Vocabulary) -> dict[bytes, int]:
    """The lowest id of each byte string; tokens without bytes (special ones) are left out."""
    return {token: i for i, token in reversed(list(enumerate(tokens.tokens))) if token}


def _prefix_parents(
    orphans: dict[int, bytes], other: Vocabulary, other_ids: dict[bytes, int]
) -> Iterator[tuple[int, int]]:
    """For each token that only one model has, the id of the other model's token that its re-encoding starts
    with; nothing for a token without such a prefix.
    """
    texts = {}
    for i, token in orphans.items():
        try:
            texts[i] = token.decode("utf-8")
        except UnicodeDecodeError:
            continue
    firsts = dict(zip(texts, first_tokens(other, list(texts.values())), strict=True))
    for i, token in orphans.items():
        first = firsts.get(i)
        prefix = b"" if first is None or first >= len(other.tokens) else other.tokens[first]
        # A normalizer or an added space can make the re-encoding start with other bytes.
        if not prefix or len(prefix) >= len(token) or not token.startswith(prefix):
            prefix = next((token[:n] for n in range(len(token) - 1, 0, -1) if token[:n] in other_ids), b"")
        if prefix:
            yield i, other_ids[prefix]


def _join_specials(parent: np.ndarray, student: Vocabulary, teacher: Vocabulary, width: int) -> None:
    """Special tokens of the same text form one group."""
    ids = {text: i for i, text in student.special.items()}
    for i, text in teacher.special.items():
        if text in ids:
            parent[ids[text]] = parent[width + i] = ids[text]


def _join_stops(parent: np.ndarray, student: list[int], teacher: list[int], width: int) -> None:
    """All stop tokens of both models form one group."""
    if bool(student) != bool(teacher):
        raise ConfigError(
            "stop tokens of one model only", fix="give both student_stop and teacher_stop, or neither"
        )
    for i in student:
        parent[i] = student[0]
    for i in teacher:
        parent[width + i] = student[0]


def _stops(stop: int | Iterable[int] | None, tokens: Vocabulary, model: str) -> list[int]:
    stops = [] if stop is None else [stop] if isinstance(stop, int | np.integer) else list(stop)
    for i in stops:
        if not 0 <= i < len(tokens.tokens):
            raise ConfigError(
                f"{model}_stop: the tokenizer has no token {i}",
                fix="give the id of the token that ends the assistant's turn",
            )
    return [int(i) for i in stops]
