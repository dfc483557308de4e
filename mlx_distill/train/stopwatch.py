"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("data", "forward", "backward", "ranks", "update", "validate", "save")


class Stopwatch:
    """Seconds by part. MLX is lazy: a part holds what was evaluated inside it.

    >>> watch = Stopwatch()
    >>> with watch.part("data"):
    ...     pass
    >>> sorted(watch.take()) == sorted(PARTS), watch.seconds["data"]
    (True, 0.0)
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds so far, and begin again."""
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken
