"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ("data", "forward", "backward", "project", "ranks", "clip", "update", "validate", "save", "hooks", "other")


class Stopwatch:
    """Seconds by part; a part inside another counts for itself alone, and ``other`` is what lies in none.

    MLX is lazy: a part holds what was evaluated inside it. With ``exact``, what a part made is evaluated before it ends, which costs
    the overlap of building a graph and computing it.

    >>> watch = Stopwatch()
    >>> with watch.part("data"):
    ...     pass
    >>> sorted(watch.take()) == sorted(PARTS), watch.seconds["data"]
    (True, 0.0)
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]  # seconds of the parts inside each open one; first of all those inside none
        self._began = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to a part."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self.seconds[name] += whole - self._inner.pop()
            self._inner[-1] += whole

    def settle(self, *arrays: Any) -> None:
        """Evaluate what the open part has made, if this watch is exact."""
        if self.exact:
            import mlx.core as mx

            mx.eval(*arrays)

    def take(self) -> dict[str, float]:
        """The seconds since the last time, and begin again. Not inside a part."""
        now = time.perf_counter()
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        taken["other"] = max(now - self._began - self._inner[0], 0.0)
        self._began, self._inner = now, [0.0]
        return taken
