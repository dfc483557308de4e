"""Progress with an estimate of the time left: a live bar on a terminal, a line every few seconds elsewhere.

Stages take a :class:`Progress` and use two methods of it::

    with progress.task("teach", total=steps, unit="step") as bar:
        bar.update(done, loss=0.12)
    progress.note("teacher: 42 rows are longer than 512 tokens and were left out")

Everything goes to standard error; standard output belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from mlx_distill.text import counted, duration, plural

Clock = Callable[[], float]
_WINDOW_S = 30.0
MIN_UPDATES = 3
"""So many updates behind the first one are seen before the time left is estimated."""
MIN_SECONDS = 5.0
"""And so many seconds behind the first one."""


@runtime_checkable
class Stream(Protocol):
    """Where lines are written."""

    def write(self, text: str, /) -> object:
        """Write text."""

    def flush(self) -> object:
        """Write out what is buffered."""


@runtime_checkable
class Bar(Protocol):
    """One running task."""

    def update(self, done: float, **info: Any) -> None:
        """Set how much is done in all (not how much more), with figures to show beside it."""


@runtime_checkable
class Progress(Protocol):
    """Shows how far a stage has come."""

    def task(
        self, name: str, total: float | None = None, unit: str = "", start: float = 0
    ) -> AbstractContextManager[Bar]:
        """Start a task of ``total`` units, of which a resumed run has done ``start`` before. Without a total
        there is no estimate.
        """

    def note(self, text: str) -> None:
        """Write a line that stays."""


class Estimate:
    """Estimates the seconds left from the rate of the last half minute.

    The rate is that since the first update: until then a task loads and compiles, and a resumed one jumps to
    where it was. There is no estimate before :data:`MIN_UPDATES` further updates over :data:`MIN_SECONDS`.

    >>> now = [0.0]
    >>> estimate = Estimate(total=10, clock=lambda: now[0])
    >>> for done in range(1, 6):
    ...     now[0] += 2.0
    ...     print(estimate.left(done))
    None
    None
    None
    12.0
    10.0
    """

    def __init__(self, total: float | None, clock: Clock = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.began = clock()
        self._seen: deque[tuple[float, float]] = deque()
        self._updates = 0

    def left(self, done: float) -> float | None:
        """Seconds left when ``done`` units are done now; None without a total, or before enough was seen."""
        now = self.clock()
        self._seen.append((now, done))
        self._updates += 1
        if self.total and done >= self.total:
            return 0.0
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        enough = self._updates > MIN_UPDATES and now - then >= MIN_SECONDS
        if not self.total or not enough or done <= before:
            return None
        return (self.total - done) * (now - then) / (done - before)

    def elapsed(self) -> float:
        """Seconds since the task was started."""
        return self.clock() - self.began


def show_info(info: dict[str, Any]) -> str:
    """The figures beside a bar as text; floats get four digits.

    >>> show_info({"loss": 0.123456, "rows": 12, "note": "greedy"})
    'loss 0.1235, rows 12, note greedy'
    """
    shown = {
        key.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else value
        for key, value in info.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


class NullProgress:
    """Shows nothing: for libraries, notebooks and tests."""

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Bar]:
        yield _Silent()

    def note(self, text: str) -> None:
        pass


class _Silent:
    def update(self, done: float, **info: Any) -> None:
        pass


class PlainProgress:
    """A line at the start, at the end, and at most every ``every`` seconds: for logs and pipes.

    >>> progress = PlainProgress(sys.stdout, clock=lambda: 0.0)
    >>> with progress.task("teach", total=2, unit="step") as bar:
    ...     bar.update(2, loss=0.5)
    teach: 2 steps
    teach: done, 2 steps in 0 s, loss 0.5
    """

    def __init__(
        self, stream: Stream | None = None, every: float = 10.0, clock: Clock = time.monotonic
    ) -> None:
        self.stream, self.every, self.clock = stream, every, clock

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Bar]:
        self.note(
            f"{name}: {counted(total, unit)}" + (f", continuing after {unit} {start:g}" if start else "")
            if total
            else name
        )
        bar = _PlainBar(self, name, Estimate(total, self.clock), unit, start)
        try:
            yield bar
        except BaseException:
            self.note(
                f"{name}: stopped after {duration(bar.estimate.elapsed())}"
                + (f" at {bar.done:g}/{total:g}" if total else "")
            )
            raise
        self.note(_done(name, bar, unit, start))

    def note(self, text: str) -> None:
        print(text, file=self.stream or sys.stderr, flush=True)


class _PlainBar:
    def __init__(
        self, progress: PlainProgress, name: str, estimate: Estimate, unit: str, done: float
    ) -> None:
        self.progress, self.name, self.estimate, self.unit = progress, name, estimate, unit
        self.done, self.info, self.last = done, "", estimate.began

    def update(self, done: float, **info: Any) -> None:
        self.done, self.info = done, show_info(info)
        left, now = self.estimate.left(done), self.progress.clock()
        if now - self.last < self.progress.every or done == self.estimate.total:
            return
        self.last = now
        total = self.estimate.total
        where = f"{done:g}/{total:g} ({done / total:.0%})" if total else counted(done, self.unit)
        parts = [
            where,
            *([f"{duration(left)} left"] if left is not None else []),
            *([self.info] if self.info else []),
        ]
        self.progress.note(f"{self.name}: {', '.join(parts)}")


def _done(name: str, bar: _PlainBar | _RichBar, unit: str, start: float) -> str:
    """The line at the end of a task; its seconds are those of this run, without earlier ones."""
    before = f" ({start:g} of them before)" if start else ""
    text = f"{name}: done, {counted(bar.done, unit)}{before} in {duration(bar.estimate.elapsed())}"
    return f"{text}, {bar.info}" if bar.info else text


class RichProgress:
    """A live bar on a terminal, with the time left and the task's figures."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Bar]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Live

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(plural(unit)),
            TextColumn("[cyan]{task.fields[left]}"),
            TextColumn("{task.fields[info]}", markup=False),
        )
        with Live(*columns, console=self.console, transient=True) as live:
            bar = _RichBar(
                live,
                live.add_task(name, total=total, completed=int(start), left="", info=""),
                Estimate(total),
                start,
            )
            yield bar
        self.console.print(_done(name, bar, unit, start), markup=False)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)


class _RichBar:
    def __init__(self, live: Any, task_id: Any, estimate: Estimate, done: float) -> None:
        self.live, self.task_id, self.estimate = live, task_id, estimate
        self.done, self.info = done, ""

    def update(self, done: float, **info: Any) -> None:
        self.done, self.info = done, show_info(info)
        left = self.estimate.left(done)
        shown = f"{duration(left)} left" if left is not None else ""
        self.live.update(self.task_id, completed=done, left=shown, info=self.info)


class EventProgress:
    """Calls a function with every change as a dict, besides passing it on to another :class:`Progress`.

    >>> progress = EventProgress(NullProgress(), print)
    >>> with progress.task("teach", total=2, unit="step") as bar:
    ...     bar.update(2, loss=0.5)
    {'event': 'task_started', 'task': 'teach', 'done': 0, 'total': 2, 'unit': 'step', 'info': {}}
    {'event': 'progress', 'task': 'teach', 'done': 2, 'total': 2, 'unit': 'step', 'info': {'loss': 0.5}}
    {'event': 'task_ended', 'task': 'teach', 'done': 2, 'total': 2, 'unit': 'step', 'info': {'loss': 0.5}}
    """

    def __init__(self, progress: Progress, events: Callable[[dict[str, Any]], None]) -> None:
        self.progress, self.events = progress, events

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Bar]:
        with self.progress.task(name, total, unit, start) as inner:
            bar = _EventBar(
                inner, self.events, {"task": name, "done": start, "total": total, "unit": unit, "info": {}}
            )
            bar.emit("task_started")
            yield bar
            bar.emit("task_ended")

    def note(self, text: str) -> None:
        self.progress.note(text)
        self.events({"event": "note", "text": text})


class _EventBar:
    def __init__(self, bar: Bar, events: Callable[[dict[str, Any]], None], state: dict[str, Any]) -> None:
        self.bar, self.events, self.state = bar, events, state

    def update(self, done: float, **info: Any) -> None:
        self.bar.update(done, **info)
        self.state = {**self.state, "done": done, "info": info}
        self.emit("progress")

    def emit(self, event: str) -> None:
        self.events({"event": event, **self.state})


_listener: Callable[[dict[str, Any]], None] | None = None


@contextmanager
def report_events(events: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let every progress that :func:`make_progress` makes in the block report its events too, also those of
    the stages of a run.
    """
    global _listener
    before, _listener = _listener, events
    try:
        yield
    finally:
        _listener = before


def events_of(progress: Progress) -> Callable[[dict[str, Any]], None] | None:
    """The function that a progress reports its events to, None where there is none."""
    return getattr(progress, "events", None)


def make_progress(stream: Stream | None = None) -> Progress:
    """A live bar where standard error is a terminal, plain lines where it is not."""
    is_terminal = stream is None and sys.stderr.isatty()
    progress: Progress = RichProgress() if is_terminal else PlainProgress(stream)
    return progress if _listener is None else EventProgress(progress, _listener)
