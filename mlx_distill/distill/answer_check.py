"""The teacher's own answers under the task: how many fit, why the others do not, with an example of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_distill.tasks.answer import CUT, error_kind

if TYPE_CHECKING:
    from mlx_distill.infer.engine import Generation

FACT = "teacher_answers"
"""The key of the counts among the facts of the targets stage."""
NOT_KEPT = "thinking cannot be kept"
"""The reason of rows that are left out though their answers fit the task."""
_LONGEST_TEXT = 300


@dataclass
class AnswerCheck:
    """Counts of generated answers.

    Attributes:
        rows: The number of answers.
        valid: How many fit the task.
        reasons: For each kind of reason ``count`` and an example (``id``, ``text``, ``error``). Of answers
            that were cut also ``data_longer``, the number of them whose row's own answer is longer than the
            limit, ``data_tokens``, the longest of these, and ``data_fits``, the number of them whose row's
            own answer is not.
        valid_again: Of the answers that do not fit, those in whose place another sample does.
        left_out: Rows that have no targets, since the teacher's thinking before the answer cannot be used.
    """

    rows: int = 0
    valid: int = 0
    valid_again: int = 0
    left_out: int = 0
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self, id: str, generation: Generation, schema: Mapping[str, Any], data_tokens: int | None
    ) -> bool:
        """Count one answer, and return whether it fits.

        Args:
            id: The row's.
            generation: The answer.
            schema: The task's.
            data_tokens: The length of the row's own answer.
        """
        from mlx_distill.infer.predict import read_answer

        answer, error = read_answer(generation, schema)
        self.rows += 1
        if answer is not None:
            self.valid += 1
            return True
        kind = error_kind(generation.finish, str(error))
        example = {"id": id, "text": generation.text[:_LONGEST_TEXT], "error": error}
        reason = self.reasons.setdefault(kind, {"count": 0, **example})
        reason["count"] += 1
        if kind == CUT and data_tokens is not None:
            longer = data_tokens > generation.answer_tokens
            name = "data_longer" if longer else "data_fits"
            reason[name] = reason.get(name, 0) + 1
            if longer:
                reason["data_tokens"] = max(reason.get("data_tokens", 0), data_tokens)
        return False

    def add_again(self, generation: Generation, schema: Mapping[str, Any]) -> bool:
        """Count another sample in the place of an answer that does not fit, if this one does; whether it
        does.
        """
        from mlx_distill.infer.predict import read_answer

        fits = read_answer(generation, schema)[0] is not None
        self.valid_again += fits
        return fits

    def leave_out(self, id: str, text: str, error: str) -> None:
        """Count a row that has no targets though its answer fits the task."""
        self.left_out += 1
        example = {"id": id, "text": text[:_LONGEST_TEXT], "error": error}
        self.reasons.setdefault(NOT_KEPT, {"count": 0, **example})["count"] += 1

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain JSON."""
        more = {"valid_again": self.valid_again, "left_out": self.left_out}
        counts = {"rows": self.rows, "valid": self.valid, "reasons": self.reasons}
        return counts | {name: count for name, count in more.items() if count}


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of several :meth:`AnswerCheck.to_dict` together, with the first example of each reason.

    >>> one = {"rows": 2, "valid": 1, "reasons": {"cut": {"count": 1, "id": "a", "text": "{", "error": ""}}}
    >>> both = joined([one, one])
    >>> both["rows"], both["reasons"]["cut"]["count"], both["reasons"]["cut"]["id"]
    (4, 2, 'a')
    """
    out = AnswerCheck()
    for part in parts:
        out.rows += part["rows"]
        out.valid += part["valid"]
        out.valid_again += part.get("valid_again", 0)
        out.left_out += part.get("left_out", 0)
        for kind, reason in part["reasons"].items():
            known = out.reasons.setdefault(kind, {**reason, "count": 0})
            if known["count"]:
                for key, add in (("data_longer", sum), ("data_fits", sum), ("data_tokens", max)):
                    if key in reason:
                        known[key] = add((known.get(key, 0), reason[key]))
            known["count"] += reason["count"]
    return out.to_dict()
