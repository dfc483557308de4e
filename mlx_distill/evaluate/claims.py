"""A claim: one statement of an answer that a checker can judge, such as a scripture reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["valid", "invalid", "not checkable"]
VERDICTS: tuple[Verdict, ...] = ("valid", "invalid", "not checkable")


@dataclass(frozen=True)
class Claim:
    """A claim and what a checker says of it.

    ``text`` is ``value[start:end]`` of the text that was checked, ``item`` the place of that text in a list;
    ``reason`` says why the verdict is not ``valid``; ``reading`` is the canonical form that the checker
    understood, or None.
    """

    text: str
    verdict: Verdict
    reason: str = ""
    start: int = 0
    end: int = 0
    item: int = 0
    reading: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The claim as plain JSON values."""
        return asdict(self)
