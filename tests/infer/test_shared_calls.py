"""Calls from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mlx_distill.infer.shared_calls import SharedCalls


class Slow:
    """Doubles its rows; waits in its first call until it may go on. Fails for rows that are None."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []
        self.started, self.go = threading.Event(), threading.Event()

    def __call__(self, rows: Sequence[Any], on_done: Callable[[int], None] | None = None) -> list[Any]:
        self.seen.append(list(rows))
        self.started.set()
        assert self.go.wait(30)
        if None in rows:
            raise ValueError("a row is None")
        return [2 * row for row in rows]


def outcomes(answer: Slow, lists: list[list[Any]], most: int = 8) -> list[Any]:
    """The answers or the errors of calls in threads: all others are made while the first is at work."""
    calls, out = SharedCalls(most), [None] * len(lists)

    def run(place: int) -> None:
        try:
            out[place] = calls(answer, lists[place])  # type: ignore[call-overload]
        except ValueError as error:
            out[place] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(lists))]
    threads[0].start()
    assert answer.started.wait(30)
    for number, thread in enumerate(threads[1:], 2):
        thread.start()
        while len(calls._waiting) < number:
            thread.join(0.001)
    answer.go.set()
    for thread in threads:
        thread.join(30)
    assert not calls._waiting
    return out


def test_calls_that_wait_are_answered_together() -> None:
    answer = Slow()
    assert outcomes(answer, [[1], [2, 3], [4], []]) == [[2], [4, 6], [8], []]
    assert answer.seen[0] == [1] and len(answer.seen) == 2 and sorted(answer.seen[1]) == [2, 3, 4]


def test_not_more_rows_than_a_chunk_are_joined() -> None:
    answer = Slow()
    assert outcomes(answer, [[1], [2] * 5, [3] * 5, [4] * 5], most=10) == [[2], [4] * 5, [6] * 5, [8] * 5]
    assert sorted(map(len, answer.seen)) == [1, 5, 10]


def test_an_error_is_that_of_its_own_call() -> None:
    out = outcomes(Slow(), [[1], [2], [None], [3]])
    assert out[:2] == [[2], [4]] and isinstance(out[2], ValueError) and out[3] == [6]


def test_an_interrupted_call_leaves_nothing_behind() -> None:
    calls = SharedCalls(8)

    def interrupted(rows: Sequence[Any], on_done: Any) -> list[Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls(interrupted, [1])
    assert calls(lambda rows, on_done: list(rows), [1]) == [1]
