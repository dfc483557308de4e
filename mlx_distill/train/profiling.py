"""Where the time of a training's steps goes: a stopwatch for the loop, and a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PARTS = (
    "data",
    "forward",
    "backward",
    "project",
    "ranks",
    "clip",
    "update",
    "validate",
    "save",
    "hooks",
    "other",
)


class Stopwatch:
    """Seconds by part; the time of a part inside another one counts for the inner part only, and the time
    outside of all parts is ``other``.

    MLX is lazy: the time of a computation counts for the part in which it is evaluated. With ``exact`` a part
    evaluates its results before it ends, so building a graph and computing it no longer overlap.

    >>> watch = Stopwatch()
    >>> with watch.part("data"):
    ...     pass
    >>> sorted(watch.take()) == sorted(PARTS), watch.seconds["data"]
    (True, 0.0)
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.seconds = dict.fromkeys(PARTS, 0.0)
        # Seconds of the parts inside each open part; the first entry is for the parts that are inside none.
        self._inner = [0.0]
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that passes inside to a part."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            duration = time.perf_counter() - start
            self.seconds[name] += duration - self._inner.pop()
            self._inner[-1] += duration

    def settle(self, *arrays: Any) -> None:
        """Evaluate results of the open part, if this stopwatch is exact."""
        if self.exact:
            import mlx.core as mx

            mx.eval(*arrays)

    def take(self) -> dict[str, float]:
        """The seconds since the last call, reset to zero. Not inside a part."""
        now = time.perf_counter()
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        seconds["other"] = max(now - self._start - self._inner[0], 0.0)
        self._start, self._inner = now, [0.0]
        return seconds


_MEANING = {
    "data": "rows to padded batches",
    "forward": "the model and its loss",
    "backward": "the gradient",
    "project": "GaLore: bases computed, gradients projected",
    "ranks": "sums over the ranks",
    "clip": "the gradient's norm",
    "update": "the optimizer",
    "validate": "the validation rows",
    "save": "checkpoints",
    "hooks": "progress and other sinks",
    "other": "the loop itself",
}

_NO_STEP = "no step was taken: nothing to measure (--from teach, or --from distill, trains again)"


@dataclass
class Profile:
    """The times of the steps of one or more trainings. Its stopwatch is exact, so steps are a little slower.

    Give ``watch`` to :func:`~mlx_distill.train.loop.train` and :meth:`add` as a hook, and call :meth:`finish`
    at the end. The first step of a training, with its compilation and first allocations, is shown separately.

    >>> profile, timing = Profile(), dict.fromkeys(PARTS, 0.0) | {"forward": 0.25, "backward": 0.75}
    >>> for _ in range(3):
    ...     profile.add({"stage": "teach", "tokens": 100, "timing": timing})
    >>> print("\\n".join(profile.lines))
    teach: 2 steps of 1000.0 ms, 100 tokens a second (first step: 1000.0 ms, not counted)
    part         ms a step   share
    forward          250.0   25.0%  the model and its loss
    backward         750.0   75.0%  the gradient
    """

    watch: Stopwatch = field(default_factory=lambda: Stopwatch(exact=True))
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one step; a hook."""
        step = {"tokens": row["tokens"], "timing": dict(row["timing"])}
        self.rows.setdefault(row.get("stage", "train"), []).append(step)

    def finish(self) -> None:
        """Add the time of hooks and checkpoint after the last step."""
        seconds = self.watch.take()
        if self.rows:
            timing = list(self.rows.values())[-1][-1]["timing"]
            timing |= {name: timing[name] + seconds[name] for name in ("save", "hooks")}

    @property
    def lines(self) -> list[str]:
        """The table as text."""
        return [line for stage in self.to_dict()["stages"] for line in _table(stage)] or [_NO_STEP]

    def to_dict(self) -> dict[str, Any]:
        """By stage: steps, seconds a step, tokens a second, the first step's seconds, and seconds a step by
        part.
        """
        return {"stages": [_summary(name, rows) for name, rows in self.rows.items()]}


def _summary(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the steps of a training, without the first if there are others."""
    first, later = rows[0], rows[1:] or rows
    parts = {part: sum(row["timing"][part] for row in later) / len(later) for part in PARTS}
    seconds = sum(parts.values())
    return {
        "stage": name,
        "steps": len(later),
        "seconds_per_step": seconds,
        "tokens_per_second": sum(row["tokens"] for row in later) / max(seconds * len(later), 1e-9),
        "first_step_seconds": sum(first["timing"].values()),
        "first_step_apart": len(rows) > 1,
        "parts": parts,
    }


def _table(stage: Mapping[str, Any]) -> list[str]:
    count, step, first = stage["steps"], stage["seconds_per_step"], stage["first_step_seconds"]
    steps = f"{count} step{'s' if count > 1 else ''} of {1e3 * step:.1f} ms"
    title = f"{stage['stage']}: {steps}, {stage['tokens_per_second']:.0f} tokens a second"
    first_step = f" (first step: {1e3 * first:.1f} ms, not counted)" if stage["first_step_apart"] else ""
    lines = [title + first_step, f"{'part':<10} {'ms a step':>11} {'share':>7}"]
    for part, seconds in stage["parts"].items():
        if seconds > 0:
            lines.append(
                f"{part:<10} {1e3 * seconds:>11.1f} {seconds / max(step, 1e-9):>7.1%}  {_MEANING[part]}"
            )
    return lines
