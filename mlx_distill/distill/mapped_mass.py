"""How much of a teacher's distribution has a place in the student's tokens, by kind of text.

At a *common start*, where both models begin a token at the same byte, a distribution over the teacher's
tokens becomes one over token groups (:mod:`mlx_distill.losses.token_groups`). What a teacher says inside a
token of the student has no position there, and tokens without a counterpart have no group: that mass is lost
to a loss over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.distill.token_kinds import KINDS, TokenKinds
from mlx_distill.losses.byte_alignment import align_tokens
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_groups import TokenGroups

ROWS = 200
"""The answers that are measured, the first ones."""
_TEACHER = ("tokens", "aligned", "one_to_one", "same_group", "mapped", "ambiguous", "tail", "unsure")
_STUDENT = ("student_tokens", "soft_target", "many_to_one")


class MappedMass:
    """Sums over answers, added one by one.

    Args:
        student_tokenizer: Its tokens name their bytes, or it is the teacher's.
        teacher_tokenizer: The same.
        groups: Makes the token groups of the two, when the first answer is added. None: both have the same
            tokens by id, and each is its own.
        columns: Of a student with the teacher's tokens; 0: it has a column for each.
        max_rows: Answers behind so many are not counted.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        groups: Callable[[], TokenGroups] | None,
        *,
        columns: int = 0,
        max_rows: int = ROWS,
    ) -> None:
        self.tokenizers = student_tokenizer, teacher_tokenizer
        self.same_tokenizer, self.max_rows = groups is None, max_rows
        self._make_groups = groups
        self._columns = columns
        self.rows = 0
        self._kinds = TokenKinds(student_tokenizer), TokenKinds(teacher_tokenizer)
        self._sums = {name: np.zeros(len(KINDS)) for name in (*_TEACHER, *_STUDENT)}

    @cached_property
    def groups(self) -> TokenGroups:
        """The token groups."""
        if self._make_groups is not None:
            return self._make_groups()
        width = max(self.tokenizers[1].get_vocab().values()) + 1
        return own_groups(self._columns or width, max(self._columns, width))

    def add(self, student_ids: Int[np.ndarray, " l"], targets: TeacherTargets) -> None:
        """Count an answer.

        Args:
            student_ids: The student's tokens of the answer, its stop token last.
            targets: The teacher's, of the same text.

        Raises:
            DataError: the two texts differ.
        """
        if self.rows >= self.max_rows:
            return
        self.rows += 1
        teacher_ids, student_ids = targets.ids, np.asarray(student_ids)
        spans, first = self._spans(student_ids, teacher_ids)
        ours, theirs = self._kinds[0].of(student_ids), self._kinds[1].of(teacher_ids)
        counts = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
        used = spans[first:]
        places = {
            "one_to_one": spans[(counts[0] == 1) & (counts[1] == 1), 2],
            "aligned": used[:, 2],
            "same_group": used[self._same_group(student_ids, teacher_ids, used), 2],
        }
        self._count("tokens", theirs)
        for name, at in places.items():
            self._count(name, theirs[at])
        for name, mass in self._masses(targets, used[:, 2]).items():
            self._count(name, theirs[used[:, 2]], mass)
        self._count("unsure", theirs, 1 - np.exp(targets.topk_logprobs.max(axis=1).astype(np.float64)))
        self._count("student_tokens", ours)
        self._count("soft_target", ours[used[:, 0]])
        self._count("many_to_one", ours[spans[(counts[0] == 1) & (counts[1] > 1), 0]])

    def _spans(self, student_ids: np.ndarray, teacher_ids: np.ndarray) -> tuple[np.ndarray, int]:
        """The spans of both answers, that of the stop tokens last, and the first one that both begin at the
        same text.
        """
        ends = len(student_ids) - 1, len(teacher_ids) - 1
        stop = np.array([[ends[0], ends[0] + 1, ends[1], ends[1] + 1]])
        if self.same_tokenizer and np.array_equal(student_ids[:-1], teacher_ids[:-1]):
            each = np.arange(ends[0])
            return np.concatenate([np.stack([each, each + 1, each, each + 1], axis=1), stop]), 0
        spans, same_start = align_tokens(student_ids[:-1], teacher_ids[:-1], *self.tokenizers)
        return np.concatenate([spans, stop]), 0 if same_start else 1

    def _same_group(self, student_ids: np.ndarray, teacher_ids: np.ndarray, used: np.ndarray) -> np.ndarray:
        ours = _group(student_ids[used[:, 0]], self.groups.student, self.groups.outside)
        theirs = _group(teacher_ids[used[:, 2]], self.groups.teacher, self.groups.outside)
        return (ours == theirs) & (ours != self.groups.outside)

    def _masses(self, targets: TeacherTargets, at: np.ndarray) -> Mapping[str, np.ndarray]:
        """Of the distributions at some tokens: the mass in groups, in groups of several student tokens, and
        outside of the top k.
        """
        logs = targets.topk_logprobs[at].astype(np.float64)
        p = np.where(logs <= LOWEST / 2, 0.0, np.exp(logs))
        group = _group(targets.topk_ids[at], self.groups.teacher, self.groups.outside)
        in_group = np.where(group == self.groups.outside, 0.0, p)
        members = np.bincount(self.groups.student, minlength=self.groups.count)
        ambiguous = np.where(members[group] > 1, in_group, 0.0).sum(axis=1)
        return {"mapped": in_group.sum(axis=1), "ambiguous": ambiguous, "tail": 1 - p.sum(axis=1)}

    def _count(self, name: str, kinds: np.ndarray, weights: np.ndarray | None = None) -> None:
        self._sums[name] += np.bincount(kinds, weights=weights, minlength=len(KINDS))

    def facts(self) -> dict[str, Any]:
        """The figures as JSON.

        Returns:
            ``rows``; ``vocabulary`` with the tokens of ``student`` and ``teacher`` and those that are
            ``shared``; under ``kinds`` for each kind of text that occurs, and for ``all``:

            - of the teacher's tokens: their number ``tokens``; the shares that begin at a common start
              (``aligned``) and that are one token of the student (``one_to_one``); of the aligned ones the
              share whose group is that of the student's token there (``same_group``);
            - of the teacher's mass: the shares in groups (``mapped``), of that in groups of more than one
              student token, so that it is open which of them has it (``ambiguous``), outside of the top k
              (``tail``), ``lost`` inside of the student's tokens (``unaligned``) or without a counterpart;
            - ``unsure``: one minus the probability of the most probable token, summed, an answer: so many of
              its tokens would be others if it were sampled;
            - of the student's tokens: their number ``student_tokens``, the shares that have a distribution as
              target (``soft_target``) and that hold several of the teacher's tokens (``many_to_one``).
        """
        kinds = {
            name: self._rates({key: float(values[number]) for key, values in self._sums.items()})
            for number, name in enumerate(KINDS)
            if self._sums["tokens"][number] or self._sums["student_tokens"][number]
        }
        groups = self.groups
        return {
            "rows": self.rows,
            "vocabulary": {
                "student": len(groups.student),
                "teacher": len(groups.teacher),
                "shared": groups.shared,
                "same": self.same_tokenizer,
            },
            "kinds": {**kinds, "all": self._rates({k: float(v.sum()) for k, v in self._sums.items()})},
        }

    def _rates(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        tokens, aligned, ours = sums["tokens"], sums["aligned"], sums["student_tokens"]
        mapped, tail = _share(sums["mapped"], tokens), _share(sums["tail"], tokens)
        return {
            "tokens": round(tokens),
            "aligned": _share(aligned, tokens),
            "one_to_one": _share(sums["one_to_one"], tokens),
            "same_group": _share(sums["same_group"], aligned),
            "mapped": mapped,
            "ambiguous": _share(sums["ambiguous"], sums["mapped"]),
            "tail": tail,
            "lost": None if mapped is None or tail is None else max(1 - mapped - tail, 0.0),
            "unaligned": _share(tokens - aligned, tokens),
            "unsure": sums["unsure"] / max(self.rows, 1),
            "student_tokens": round(ours),
            "soft_target": _share(sums["soft_target"], ours),
            "many_to_one": _share(sums["many_to_one"], ours),
        }


def own_groups(columns: int, teacher_columns: int) -> TokenGroups:
    """The groups of one tokenizer of two models: each token is its own, those that the student has no column
    for are outside.

    >>> own_groups(2, 3).teacher.tolist()
    [0, 1, 2]
    """
    teacher = np.minimum(np.arange(teacher_columns), columns)
    return TokenGroups(np.arange(columns), teacher, columns + 1, min(columns, teacher_columns))


def _group(ids: np.ndarray, table: np.ndarray, outside: int) -> np.ndarray:
    known = ids < len(table)
    return np.where(known, table[np.where(known, ids, 0)], outside)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
