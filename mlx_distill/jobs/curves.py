"""The curves of a run's trainings for those who look at them while they run: what is new is read from the end
of each ``metrics.jsonl``, and never more points are kept than a chart can show.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill.storage import finished_name, scratch

MAX_POINTS = 600
"""Points of a curve that are kept; beyond twice as many every other one is dropped."""
_NAME = "metrics.jsonl"
_MAX_TRAININGS = 64


class Point(NamedTuple):
    """One step of a training: seconds since its start (without pauses), losses, tokens a second and the peak
    memory in GB so far. ``valid_loss`` is None at most steps.
    """

    step: int
    seconds: float | None
    loss: float | None
    valid_loss: float | None
    tokens_per_second: float | None
    memory_gb: float | None


@dataclass
class Curve:
    """The curve of one training, which grows with its file.

    A file of n lines is thinned to every k-th step before its lines are parsed, so that a long training opens
    as fast as a short one; all steps with a validation loss are kept, and thinned in the same way where they
    alone are too many.

    Attributes:
        path: Its ``metrics.jsonl``.
        limit: The number of points that are kept, of training and of validation each.
        stride: One step of so many is kept.
        points: The points, by rising step.
        last: The newest step, kept or not.
    """

    path: Path
    limit: int = MAX_POINTS
    stride: int = 1
    points: list[Point] = field(default_factory=list)
    last: Point | None = None
    _offset: int = 0
    _lines: int = 0
    _valid: int = 0
    _valid_stride: int = 1
    _identity: tuple[int, int] = (0, 0)

    def read(self) -> None:
        """Read what was appended; everything where the file was cut (by a resumed training) or replaced."""
        try:
            status = self.path.stat()
        except OSError:  # the stage has just been finished, and its folder renamed
            return
        identity = (status.st_dev, status.st_ino)
        if identity != self._identity or status.st_size < self._offset:
            self._forget(identity)
        if status.st_size == self._offset:
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read(status.st_size - self._offset)
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].split(b"\n")[:-1]
        if not lines:
            return
        first = _parse(lines[0])
        if self.last is not None and (first is None or first.step != self.last.step + 1):
            self._forget(identity)  # it was cut to a checkpoint and has grown past our place since
            self.read()
            return
        self._add(lines)
        self._offset += whole

    def _forget(self, identity: tuple[int, int]) -> None:
        self.points, self.last, self.stride = [], None, 1
        self._offset = self._lines = self._valid = 0
        self._valid_stride, self._identity = 1, identity

    def _add(self, lines: Sequence[bytes]) -> None:
        """Keep the lines that the strides choose. A line is parsed only where it may be kept."""
        while self._lines + len(lines) > 2 * self.limit * self.stride:
            self.stride *= 2
        for number, line in enumerate(lines, self._lines):
            if number % self.stride == 0 or b'"valid_loss"' in line:
                point = _parse(line)
                if point is not None:
                    self._keep(point, number)
        self.last = _parse(lines[-1]) or self.last
        self._lines += len(lines)
        self._thin()

    def _keep(self, point: Point, number: int) -> None:
        if point.valid_loss is not None:
            self._valid += 1
            if self._valid % self._valid_stride:
                point = point._replace(valid_loss=None)
        if number % self.stride == 0 or point.valid_loss is not None:
            self.points.append(point)

    def _thin(self) -> None:
        """Drop the points between those that the strides choose now."""
        validated = [point.step for point in self.points if point.valid_loss is not None]
        while len(validated) > 2 * self.limit:
            validated, self._valid_stride = validated[1::2], self._valid_stride * 2
        chosen, first = set(validated), self.points[0].step if self.points else 0
        self.points = [
            point if point.step in chosen else point._replace(valid_loss=None)
            for point in self.points
            if point.step in chosen or (point.step - first) % self.stride == 0
        ]

    def after(self, step: int) -> list[Point]:
        """The points behind a step; the newest step is always among them."""
        new = [point for point in self.points if point.step > step]
        if self.last is not None and self.last.step > step and (not new or new[-1].step < self.last.step):
            new.append(self.last)
        return new


def _parse(line: bytes) -> Point | None:
    """A line of ``metrics.jsonl``; None for a damaged one."""
    try:
        row = json.loads(line)
        memory = _number(row.get("peak_memory_bytes"))
        return Point(
            int(row["step"]),
            _number(row.get("seconds")),
            _number(row.get("loss")),
            _number(row.get("valid_loss")),
            _number(row.get("tokens_per_second")),
            None if memory is None else memory / 1e9,
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def training_files(run: Path) -> dict[str, Path]:
    """The ``metrics.jsonl`` of each training of a run, by the name of its stage, the newest last. A training
    that is going on counts before the result of an earlier one.
    """
    found: dict[str, Path] = {}
    for path in [*run.glob(f"*/{_NAME}"), *_unfinished(run)]:
        name = path.parent.name
        found[finished_name(path.parent.parent) if name == scratch(Path()).name else name] = path
    return dict(sorted(found.items(), key=lambda item: _modified(item[1])))


def _unfinished(run: Path) -> Iterator[Path]:
    return (path for path in run.glob(f".*.partial/{scratch(Path()).name}/{_NAME}"))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class Curves:
    """The curves that pages look at, shared by all of them, so that each file is read once."""

    def __init__(self) -> None:
        self._curves: dict[tuple[Path, str], Curve] = {}
        self._lock = threading.Lock()

    def of(self, run: Path | None) -> dict[str, Curve]:
        """The curves of a run's trainings by the name of the stage, up to date, the newest last."""
        if run is None:
            return {}
        out = {}
        with self._lock:
            for name, path in training_files(run).items():
                curve = self._curves.pop((run, name), None)
                if curve is None or curve.path != path:
                    curve = Curve(path)
                curve.read()
                self._curves[run, name] = out[name] = curve
            while len(self._curves) > _MAX_TRAININGS:
                del self._curves[next(iter(self._curves))]
        return out
