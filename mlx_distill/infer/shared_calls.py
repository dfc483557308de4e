"""Calls from several threads that are answered together: the thread whose turn it is answers its own rows and
those of the threads that wait, in the same batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OnDone = Callable[[int], None] | None
Answer = Callable[[Sequence[Any], OnDone], list[Any]]
"""From rows, and a function that is told how many are done, to one answer a row."""


@dataclass(eq=False)
class _Call:
    answer: Answer
    rows: Sequence[Any]
    answers: list[Any] | None = None


class SharedCalls:
    """Runs one call at a time. A call alone is answered exactly as without this class.

    Args:
        most: Rows that are answered together, at most, where calls are joined.

    >>> calls = SharedCalls(8)
    >>> calls(lambda rows, on_done: [2 * row for row in rows], [1, 2])
    [2, 4]
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._turn = threading.Lock()
        self._waiting: list[_Call] = []
        self._list = threading.Lock()  # of those that wait

    def __call__(self, answer: Answer, rows: Sequence[Any], on_done: OnDone = None) -> list[Any]:
        """The answers to some rows. What ``answer`` raises concerns this call alone."""
        call = _Call(answer, rows)
        with self._list:
            self._waiting.append(call)
        try:
            with self._turn:
                if call.answers is None:
                    self._answer(call, on_done)
        finally:
            with self._list:
                if call in self._waiting:
                    self._waiting.remove(call)
        assert call.answers is not None
        return call.answers

    def _answer(self, call: _Call, on_done: OnDone) -> None:
        """Answer a call, and with it those that wait."""
        group = [call]
        with self._list:
            for other in self._waiting:
                together = sum(len(one.rows) for one in group) + len(other.rows)
                # One that is answered is listed until its own thread goes on.
                waits = other is not call and other.answers is None
                if waits and other.answer == call.answer and together <= self.most:
                    group.append(other)
        if len(group) > 1:
            try:
                answers = iter(call.answer([row for one in group for row in one.rows], None))
            except Exception:  # of which call is not known: each is answered alone
                group = [call]
            else:
                for one in group:
                    one.answers = [next(answers) for _ in one.rows]
                return
        call.answers = call.answer(call.rows, on_done)
