"""What a training's steps spend their time on: a hook that adds up, and a table."""

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
    """Seconds by part; a part inside another counts for itself alone, and ``other`` is what lies in none.

    MLX is lazy: a part holds what was evaluated inside it. With ``exact``, what a part made is evaluated
    before it ends, which costs the overlap of building a graph and computing it.

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


_MEANING = {
    "data": "rows to padded batches",
    "forward": "the model and its loss",
    "backward": "the gradient",
    "project": "GaLore: bases found, gradients into them",
    "ranks": "sums over the ranks",
    "clip": "the gradient's norm",
    "update": "the optimizer",
    "validate": "looks at the validation rows",
    "save": "checkpoints",
    "hooks": "progress and other sinks",
    "other": "the loop itself",
}

_NO_STEP = "no step was taken: nothing to measure (--from teach, or --from distill, takes them again)"


@dataclass
class Profile:
    """Takes the time of each step, a training after the other; everything is evaluated where it belongs, so
    steps are a little slower.

    Give ``watch`` to :func:`~mlx_distill.train.loop.train` and :meth:`add` as a hook, and call :meth:`finish`
    at the end. The first step of a training, with its compilation and first allocations, is told apart.

    >>> profile = Profile()
    >>> for _ in range(3):
    ...     profile.add({"stage": "teach", "tokens": 100, "timing": {**dict.fromkeys(PARTS, 0.0), "forward": 0.25, "backward": 0.75}})
    >>> print("\\n".join(profile.lines))
    teach: 2 steps of 1000.0 ms, 100 tokens a second (first step: 1000.0 ms, not counted)
    part         ms a step   share
    forward          250.0   25.0%  the model and its loss
    backward         750.0   75.0%  the gradient
    """

    watch: Stopwatch = field(default_factory=lambda: Stopwatch(exact=True))
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """One step; a hook."""
        taken = {"tokens": row["tokens"], "timing": dict(row["timing"])}
        self.rows.setdefault(row.get("stage", "train"), []).append(taken)

    def finish(self) -> None:
        """Count what came after the last step, its checkpoint for one."""
        rest = self.watch.take()
        if self.rows:
            timing = list(self.rows.values())[-1][-1]["timing"]
            timing |= {name: timing[name] + rest[name] for name in ("save", "hooks")}

    @property
    def lines(self) -> list[str]:
        """The table, for people."""
        return [line for stage in self.to_dict()["stages"] for line in _table(stage)] or [_NO_STEP]

    def to_dict(self) -> dict[str, Any]:
        """By stage: steps, seconds a step, tokens a second, the first step's seconds, and seconds a step by
        part.
        """
        return {"stages": [_summary(name, rows) for name, rows in self.rows.items()]}


def _summary(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
    count, whole, first = stage["steps"], stage["seconds_per_step"], stage["first_step_seconds"]
    steps = f"{count} step{'s' if count > 1 else ''} of {1e3 * whole:.1f} ms"
    head = f"{stage['stage']}: {steps}, {stage['tokens_per_second']:.0f} tokens a second"
    apart = f" (first step: {1e3 * first:.1f} ms, not counted)" if stage["first_step_apart"] else ""
    lines = [head + apart, f"{'part':<10} {'ms a step':>11} {'share':>7}"]
    for part, seconds in stage["parts"].items():
        if seconds > 0:
            lines.append(
                f"{part:<10} {1e3 * seconds:>11.1f} {seconds / max(whole, 1e-9):>7.1%}  {_MEANING[part]}"
            )
    return lines
