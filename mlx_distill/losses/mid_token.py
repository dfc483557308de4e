"""Distributions at places where one model begins a token in the middle of a token of the other, and where
token groups do not hold.

Token groups compare two distributions where both models begin a token. Elsewhere one of them has written a
part of the other's token, and the other's distribution is conditioned on that part:

- *inside*: the student begins a token inside a token of the teacher, of which the bytes u are written. Of the
  teacher's distribution at the beginning of its token the tokens that go on behind u count, each as the token
  that the student writes next in their text.
- *across*: the teacher begins a token inside a token of the student, of which the bytes v are written (a
  student that writes "73" at once, of a teacher that writes single digits). Of the student's distribution at
  the beginning of its token the tokens that begin with v count; v itself is the outcome that the student's
  token ends there.
- *by context*: both begin a token, but the two tokens that stand there are in different groups, since groups
  do not know the text around, which some tokens depend on. It is *inside* with nothing written.

Which token the student writes for one of the teacher's may depend on the text before, which is asked for, and
on the text behind, which is known for the token that stands there alone. That one counts as what the student
did write. Over texts of the teacher this is a sample of what its token becomes, and never contradicts a text.

A distribution over tokens becomes one over the text behind a prefix of bytes by summing over the tokens that
cover the prefix (Vieira et al. 2024, https://arxiv.org/abs/2412.03719), here with tokenizers that write each
text in one way. The outcomes are this library's own: strings of bytes, shortened by each tokenizer in turn
until both write them. Where a tokenizer's choice depends on the text that
follows, the teacher's tokens so far say something of that text, and its distribution is of texts that fit.

**Mass that cannot be placed.** What the top k does not list, what ends exactly at u and goes on with the
teacher's next token, and tokens whose bytes are no text can belong to any outcome. They stay unlisted, and
the losses place them so that the divergence is smallest: it is a lower bound, and zero at equality. Tokens
that would have had other tokens of the student before this place are impossible, and are left out of the sum.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_bytes import Vocabulary, continuations, vocabulary
from mlx_distill.losses.token_groups import TokenGroups

MAX_EXTENSIONS = 2048
"""Tokens of the student that may begin with the written part of one; a place where more do has no row."""
_ENDS = b""
_CACHE = 1 << 16
_CONTEXT = 3
"""Tokens of the student before a span of both tokenizations that its next token may depend on."""


class _Place(NamedTuple):
    """Where one model begins a token inside the token of the other.

    Args:
        student, teacher: The numbers of the two tokens.
        before: Some of the student's tokens before this place, in ``across`` before its own outer token.
        text: Their bytes up to the beginning of the outer token.
        written: The bytes of the outer token up to this place.
    """

    is_inside: bool
    student: int
    teacher: int
    before: tuple[int, ...]
    text: bytes
    written: bytes


@dataclass(frozen=True)
class MidTokenTargets:
    """The teacher's targets of an answer in the middle of tokens.

    Args:
        inside_starts: ``[a]`` the student's tokens that begin inside a token of the teacher, or at its
            beginning where groups do not hold.
        inside_groups: ``[a, k]`` token groups; ``outside`` marks an unused slot.
        inside_logprobs: ``[a, k]`` the teacher's log-masses of them; ``LOWEST`` in unused slots. What is
            missing to one is of no known group.
        across_starts: ``[b]`` the student's tokens that the teacher begins a token in.
        across_logprobs: ``[b, k]`` the teacher's log-masses of its outcomes.
        across_sizes: ``[b]`` how many tokens of the student are possible there.
        across_tokens: ``[e]`` their ids, place by place.
        across_slots: ``[e]`` the outcome of each; k where the teacher lists none for it.
    """

    inside_starts: Int[np.ndarray, " a"]
    inside_groups: Int[np.ndarray, "a k"]
    inside_logprobs: Float[np.ndarray, "a k"]
    across_starts: Int[np.ndarray, " b"]
    across_logprobs: Float[np.ndarray, "b k"]
    across_sizes: Int[np.ndarray, " b"]
    across_tokens: Int[np.ndarray, " e"]
    across_slots: Int[np.ndarray, " e"]


class MidTokens:
    """Makes the targets in the middle of tokens of two tokenizers, answer by answer.

    Args:
        student_tokenizer: From ``transformers``, ``mlx_lm`` or ``tokenizers``; its tokens name their bytes.
        teacher_tokenizer: The same.
        groups: Of :func:`~mlx_distill.losses.token_groups.build_token_groups`.
        in_middle: Whether there are targets in the middle of tokens, besides those by context.
        max_extensions: More tokens of the student with one beginning give no targets.

    Attributes:
        counts: Of all answers: ``inside`` (``by_context`` among them) and ``across``, the places with
            targets; and by reason those left out: ``context`` (the student writes the text before the place
            otherwise if nothing follows), ``outcome`` (the student's token has none), ``ends`` (the student
            has no token that ends there), ``many`` (too many tokens begin so), ``unlisted`` (the top k lists
            none of the outcomes).
        unplaced: The sum of the mass that has no known outcome.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        groups: TokenGroups,
        *,
        in_middle: bool = True,
        max_extensions: int = MAX_EXTENSIONS,
    ) -> None:
        self.student, self.teacher = vocabulary(student_tokenizer), vocabulary(teacher_tokenizer)
        self.groups, self.in_middle, self.max_extensions = groups, in_middle, max_extensions
        self.counts: Counter[str] = Counter()
        self.unplaced = 0.0
        self._writes = tuple(lru_cache(_CACHE)(_writer(side)) for side in (self.student, self.teacher))
        self._extensions = lru_cache(4096)(self._find_extensions)
        self._outcome = lru_cache(_CACHE)(self._follow)

    def targets(
        self,
        student_ids: Int[np.ndarray, " l"],
        teacher_ids: Int[np.ndarray, " m"],
        spans: Int[np.ndarray, "n 4"],
        topk_ids: Int[np.ndarray, "t k"],
        topk_logprobs: Float[np.ndarray, "t k"],
    ) -> MidTokenTargets:
        """The targets of an answer.

        Args:
            student_ids: The student's tokens of the text.
            teacher_ids: The teacher's.
            spans: Of :func:`~mlx_distill.losses.byte_alignment.align_bytes`, those whose distributions are
                over the same text.
            topk_ids: The teacher's most probable tokens at each of its tokens, and at more behind them.
            topk_logprobs: Their log-probabilities at temperature 1 over its whole vocabulary, nats.
        """
        k = topk_ids.shape[1]
        places = self._by_context(student_ids, teacher_ids, spans)
        if self.in_middle:
            places = chain(self._places(student_ids, teacher_ids, spans), places)
        inside: list[tuple[int, np.ndarray, np.ndarray]] = []
        across: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        for place in places:
            p = np.exp(np.maximum(topk_logprobs[place.teacher].astype(np.float64), LOWEST))
            listed = [
                (self._teacher_bytes(int(i)), float(mass))
                for i, mass in zip(topk_ids[place.teacher], p, strict=True)
                if mass > 0
            ]
            own = self.teacher.tokens[int(teacher_ids[place.teacher])]
            context = self._context(place, own)
            if context is None:
                self._left_out("context")
            elif place.is_inside:
                row = self._inside(context, int(student_ids[place.student]), own, listed, k)
                inside += [(place.student, *row)] if row else []
            else:
                wide = self._across(context, int(student_ids[place.student]), own, listed, k)
                across += [(place.student, *wide)] if wide else []
        return MidTokenTargets(
            np.array([row[0] for row in inside], dtype=np.int32),
            np.array([row[1] for row in inside], dtype=np.int32).reshape(-1, k),
            np.array([row[2] for row in inside], dtype=np.float32).reshape(-1, k),
            np.array([row[0] for row in across], dtype=np.int32),
            np.array([row[1] for row in across], dtype=np.float32).reshape(-1, k),
            np.array([len(row[2]) for row in across], dtype=np.int32),
            np.concatenate([np.zeros(0, np.int32), *(row[2] for row in across)]),
            np.concatenate([np.zeros(0, np.int32), *(row[3] for row in across)]),
        )

    def in_other_groups(
        self,
        student_ids: Int[np.ndarray, " l"],
        teacher_ids: Int[np.ndarray, " m"],
        spans: Int[np.ndarray, "n 4"],
    ) -> Bool[np.ndarray, " n"]:
        """The spans that begin with two tokens of different groups: their distributions are not to be
        compared over groups, and :meth:`targets` has them by context.
        """
        ours = self.groups.student[np.asarray(student_ids)[spans[:, 0]]]
        theirs = self.groups.teacher[np.asarray(teacher_ids)[spans[:, 2]]]
        return ours != theirs

    def facts(self) -> dict[str, Any]:
        """The counts as JSON, with the mean mass of a place that has no known outcome."""
        kept = self.counts["inside"] + self.counts["across"]
        reasons = ("context", "outcome", "ends", "many", "unlisted")
        return {
            "inside": self.counts["inside"],
            "by_context": self.counts["by_context"],
            "across": self.counts["across"],
            "unplaced_mass": self.unplaced / kept if kept else None,
            "left_out": {name: self.counts[name] for name in reasons},
        }

    def _places(
        self, student_ids: np.ndarray, teacher_ids: np.ndarray, spans: np.ndarray
    ) -> Iterator[_Place]:
        counts = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
        for first, last, other_first, other_last in spans[(counts[0] > 1) | (counts[1] > 1)].tolist():
            ours = [int(i) for i in student_ids[first:last]]
            pieces = [self.student.tokens[i] for i in ours]
            others = [self.teacher.tokens[int(i)] for i in teacher_ids[other_first:other_last]]
            text = b"".join(pieces)
            if text != b"".join(others) or not all(pieces) or not all(others):
                continue  # special tokens inside of a span
            begins, other_begins = _begins(pieces), _begins(others)
            earlier, lead = self._before(student_ids, first, spans)
            # Starts inside of the other's tokens: of the student's tokens, then of the teacher's.
            for is_inside, inner, outer in ((True, begins, other_begins), (False, other_begins, begins)):
                for number, at in enumerate(inner[1:], 1):
                    around = bisect.bisect_right(outer, at) - 1
                    own, other = (number, around) if is_inside else (around, number)
                    start = outer[around]
                    before, written = (*earlier, *ours[:own]), text[start:at]
                    yield _Place(
                        is_inside, first + own, other_first + other, before, lead + text[:start], written
                    )

    def _by_context(
        self, student_ids: np.ndarray, teacher_ids: np.ndarray, spans: np.ndarray
    ) -> Iterator[_Place]:
        others = spans[self.in_other_groups(student_ids, teacher_ids, spans)]
        for first, _, other_first, _ in others.tolist():
            earlier, text = self._before(student_ids, first, spans)
            yield _Place(True, first, other_first, earlier, text, b"")

    def _before(
        self, student_ids: np.ndarray, first: int, spans: np.ndarray
    ) -> tuple[tuple[int, ...], bytes]:
        """Some of the student's tokens before a span, and their bytes."""
        earlier = tuple(int(i) for i in student_ids[max(first - _CONTEXT, spans[0, 0]) : first])
        return earlier, b"".join(self.student.tokens[i] for i in earlier)

    def _context(self, place: _Place, teachers: bytes) -> _Place | None:
        """The place with as many of the tokens before it as the student writes again when it begins there."""
        rest = teachers if place.is_inside else place.written + teachers
        for dropped in range(len(place.before) + 1):
            skip = sum(len(self.student.tokens[i]) for i in place.before[:dropped])
            if skip > len(place.text):
                break
            short = place._replace(before=place.before[dropped:], text=place.text[skip:])
            if self._behind(short.before, short.text + rest) not in (None, _IMPOSSIBLE):
                return short
        return None if place.written else place._replace(before=(), text=b"")

    def _inside(
        self, place: _Place, token: int, teachers: bytes, listed: Sequence[tuple[bytes, float]], k: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Groups and log-masses of the text behind a part of the teacher's token."""
        written, before, outside = place.written, place.before, self.groups.outside
        own = int(self.groups.student[token])
        if own == outside:
            return self._left_out("outcome")
        ending = self._writes[1](written)
        masses: dict[int, float] = {}
        unplaced = max(1 - sum(mass for _, mass in listed), 0.0)
        for text, mass in listed:
            if len(text) > len(written) and text.startswith(written):
                group = own if text == teachers else self._next(before, place.text + text)
                if group is None or group == outside:
                    unplaced += mass
                elif group >= 0:
                    masses[group] = masses.get(group, 0.0) + mass
            elif text == (ending[0] if ending else written) or (
                not ending and text and written.startswith(text)
            ):
                unplaced += mass  # the teacher's token ends here; what follows is not known
        row = self._row(masses, unplaced, k)
        if row is None:
            return None
        self.counts["inside"] += 1
        self.counts["by_context"] += not written
        keys, logs = row
        return np.array([*keys, *[outside] * (k - len(keys))]), logs

    def _next(self, before: tuple[int, ...], text: bytes) -> int | None:
        """The group of the token that the student writes behind some tokens; None where the bytes are no
        text, -1 where it writes others before.
        """
        piece = self._behind(before, text)
        if piece == _IMPOSSIBLE:
            return -1
        number = None if piece is None else self._student_ids.get(piece)
        return None if number is None else int(self.groups.student[number])

    def _behind(self, before: tuple[int, ...], text: bytes) -> bytes | None:
        """The student's next token in a text behind some tokens; None where the bytes are no text."""
        pieces = self._writes[0](text)
        if pieces is None:
            return None
        n = len(before)
        if len(pieces) <= n or any(
            piece != self.student.tokens[i] for piece, i in zip(pieces, before, strict=False)
        ):
            return _IMPOSSIBLE
        return pieces[n]

    def _across(
        self, place: _Place, token: int, teachers: bytes, listed: Sequence[tuple[bytes, float]], k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Log-masses of the outcomes behind a part of the student's token, its possible tokens, and the
        outcome of each.
        """
        written = place.written
        pieces = self._writes[0](written)
        if pieces is None or pieces != (written,):
            return self._left_out("ends")
        extensions = self._extensions(written)
        if extensions is None:
            return self._left_out("many")
        ids, outcomes = extensions
        own = self._outcome(written, self.student.tokens[token][len(written) :])
        if own in (None, _IMPOSSIBLE):
            return self._left_out("outcome")
        masses: dict[bytes, float] = {}
        unplaced = max(1 - sum(mass for _, mass in listed), 0.0)
        for text, mass in listed:
            outcome = own if text == teachers else self._behind_part(place, text) if text else _ENDS
            if outcome is None:
                unplaced += mass
            elif outcome != _IMPOSSIBLE:
                masses[outcome] = masses.get(outcome, 0.0) + mass
        row = self._row(masses, unplaced, k)
        if row is None:
            return None
        self.counts["across"] += 1
        slot = {outcome: i for i, outcome in enumerate(row[0])}
        slots = np.array([slot.get(outcome, k) for outcome in outcomes], dtype=np.int32)
        return row[1], ids, slots

    def _behind_part(self, place: _Place, text: bytes) -> bytes | None:
        """The outcome of a token of the teacher behind a part of the student's."""
        piece = self._behind(place.before, place.text + place.written + text)
        if piece is None or piece == _IMPOSSIBLE:
            return piece
        if not piece.startswith(place.written):
            return _IMPOSSIBLE
        return self._outcome(place.written, piece[len(place.written) :])

    def _find_extensions(self, written: bytes) -> tuple[np.ndarray, list[bytes]] | None:
        """The student's tokens that begin with some bytes, and the outcome of each; None: too many."""
        tokens, ids = self._sorted
        first = bisect.bisect_left(tokens, written)
        last = first
        while last < len(tokens) and tokens[last].startswith(written):
            last += 1
            if last - first > self.max_extensions:
                return None
        out = []
        for token in tokens[first:last]:
            outcome = self._outcome(written, token[len(written) :])
            out.append(token + b"\xff" if outcome in (None, _IMPOSSIBLE) else outcome)
        return np.array(ids[first:last], dtype=np.int32), out

    def _follow(self, written: bytes, text: bytes) -> bytes | None:
        """The outcome of a text behind a part of the student's token: the beginning that both write. ``b""``:
        the student's token ends; None: the bytes are no text.
        """
        while text:
            pieces = self._writes[0](written + text)
            if pieces is None or not pieces:
                return None
            if not pieces[0].startswith(written):
                return _IMPOSSIBLE
            behind = pieces[0][len(written) :]
            if behind != text:
                if len(behind) >= len(text):
                    return None
                text = behind
                continue
            theirs = self._writes[1](text)
            if not theirs or len(theirs[0]) > len(text):
                return None
            if theirs[0] == text:
                return text
            text = theirs[0]
        return _ENDS

    def _row(self, masses: dict[Any, float], unplaced: float, k: int) -> tuple[list[Any], np.ndarray] | None:
        total = sum(masses.values()) + unplaced
        if not masses:
            return self._left_out("unlisted")
        keys = sorted(masses, key=lambda key: -masses[key])
        logs = np.full(k, LOWEST, dtype=np.float32)
        logs[: len(keys)] = np.log([masses[key] / total for key in keys])
        self.unplaced += unplaced / total
        return keys, logs

    def _left_out(self, reason: str) -> Any:
        """None, counted."""
        self.counts[reason] += 1
        return None

    def _teacher_bytes(self, number: int) -> bytes:
        return self.teacher.tokens[number] if number < len(self.teacher.tokens) else b""

    @cached_property
    def _student_ids(self) -> dict[bytes, int]:
        width = len(self.groups.student)
        return {t: i for i, t in reversed(list(enumerate(self.student.tokens[:width]))) if t}

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        """The student's tokens in the order of their bytes, and their ids."""
        width = len(self.groups.student)
        pairs = sorted((t, i) for i, t in enumerate(self.student.tokens[:width]) if t)
        return [t for t, _ in pairs], [i for _, i in pairs]


_IMPOSSIBLE = b"\xff\xff"  # in no text


def _begins(pieces: Sequence[bytes]) -> list[int]:
    ends = np.cumsum([len(piece) for piece in pieces])
    return [0, *ends[:-1].tolist()]


def _writer(tokens: Vocabulary) -> Any:
    """A function from the bytes of a text to those of the tokens that it is written in; None where the bytes
    are no text, or the tokenizer changes them.
    """

    def write(data: bytes) -> tuple[bytes, ...] | None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return None
        pieces = tuple(tokens.tokens[i] for i in continuations(tokens, [text])[0])
        return pieces if b"".join(pieces) == data else None

    return write
