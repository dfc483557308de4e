"""Prompts that hold their own row's answer behind a marker (``... ### Classification: hate``): cut there on
request, and found where nobody asked for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.recipe import SourceConfig
from mlx_distill.records import Example, Message
from mlx_distill.tasks.task import Task

_MIN_SHARE = 0.5  # of a source's rows, from which on it is no accident
_MIN_ROWS = 2
# A heading, else the last words of a line, up to a colon or the like.
_MARKERS = (re.compile(r"(#+[^\n#]*[:=>])\s*\Z"), re.compile(r"([^\n.!?,;:]{0,40}[:=>\])])\s*\Z"))


def cut_fields(
    row: Mapping[str, Any], fields: Iterable[str], marker: str
) -> tuple[dict[str, Any], str | None]:
    """The row without the last marker in its texts and what stands behind it, and the latter.

    >>> cut_fields({"text": "Go home. Label: rude"}, ["text"], "Label:")
    ({'text': 'Go home.'}, 'rude')
    """
    for name in fields:
        text = row.get(name)
        if isinstance(text, str) and marker in text:
            before, _, behind = text.rpartition(marker)
            return {**row, name: before.rstrip()}, behind.strip()
    return dict(row), None


def cut_turns(prompt: Sequence[Message], marker: str) -> tuple[tuple[Message, ...], str | None]:
    """The turns before an answer without the last marker in the last user turn and what stands behind it, and
    the latter.
    """
    last = max((index for index, turn in enumerate(prompt) if turn.role == "user"), default=-1)
    if last < 0 or marker not in prompt[last].content:
        return tuple(prompt), None
    before, _, behind = prompt[last].content.rpartition(marker)
    turn = Message("user", before.rstrip(), extra=prompt[last].extra)
    return (*prompt[:last], turn, *prompt[last + 1 :]), behind.strip()


class LeakCounter:
    """Counts, source by source, the rows whose prompt ends with their own answer behind a marker."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows: Counter[int] = Counter()
        self.leaks: Counter[int] = Counter()
        self.markers: dict[int, Counter[str]] = {}
        self.first: dict[int, str] = {}

    def add(
        self, number: int, source: SourceConfig, where: str, raw: Mapping[str, Any], row: Example
    ) -> None:
        """Look at one row: its last question, and the fields that the task's prompt names.

        Args:
            number: Of the source.
            source: Its settings.
            where: File and line of the row.
            raw: The row as the source has it.
            row: The row as it is prepared.
        """
        self.rows[number] += 1
        texts: list[Any] = [turn.content for turn in row.messages if turn.role == "user"][-1:]
        if not source.answer_after:  # else the fields are cut, and their raw texts are not
            texts += [raw.get(source.columns.get(name, name)) for name in self.task.input_fields]
        label = (row.answer or {}).get(self.task.label or "")
        answers = [row.messages[-1].content, *([label] if isinstance(label, str) else [])]
        for text in texts:
            found = (_marker_before(text, answer) for answer in answers if isinstance(text, str))
            marker = next(filter(None, found), None)
            if marker:
                self.leaks[number] += 1
                self.markers.setdefault(number, Counter())[marker] += 1
                self.first.setdefault(number, where)
                return

    def check(self) -> list[str]:
        """Warnings of single rows.

        Raises:
            DataError: half of a source's rows or more hold their answer.
        """
        warnings = []
        for source, leaks in sorted(self.leaks.items()):
            marker = _common_marker(self.markers[source])
            text = (
                f"data.sources[{source}]: in {leaks} of {self.rows[source]} rows the prompt ends with the "
                f"row's own answer, behind {marker!r} (the first: {self.first[source]})"
            )
            if leaks >= _MIN_ROWS and leaks >= _MIN_SHARE * self.rows[source]:
                raise DataError(
                    f"{text}; a model would learn to copy it",
                    fix=f"cut the prompts there: data.sources[{source}].answer_after: {marker!r}",
                )
            warnings.append(f"{text}; answer_after: cuts it")
        return warnings


def _marker_before(text: str, answer: str) -> str | None:
    """The marker behind which a text ends with the answer, or None."""
    ending = text.rstrip().rstrip(".\"'`*").rstrip()
    answer = answer.rstrip(".\"'`*")
    if not answer or len(ending) <= len(answer) or ending[-len(answer) :].casefold() != answer.casefold():
        return None
    before = ending[: -len(answer)].rstrip("\"'`* \t\n")
    found = next(filter(None, (pattern.search(before) for pattern in _MARKERS)), None)
    return found[1].strip() if found else None


def _common_marker(markers: Counter[str]) -> str:
    """The marker of most rows, else what all end with."""
    best, count = markers.most_common(1)[0]
    columns = zip(*(text[::-1] for text in markers), strict=False)
    common = takewhile(lambda column: len(set(column)) == 1, columns)
    ending = "".join(column[0] for column in common)[::-1].strip()
    return best if 2 * count >= markers.total() or not ending else ending
