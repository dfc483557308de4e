"""Server-sent events of one job: what is new in its ledger events, its curves and its state.

Each message has the identifier of the place behind it, ``EVENT:STEP:TRAINING``. A browser that lost the
connection sends the last one (``Last-Event-ID``) and gets what came after it: every event of the ledger and
every step of a training once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_distill.jobs.curves import Curve, Point

HEARTBEAT_S = 5.0
"""Without news a ``job-beat`` is sent as often."""
SILENT_S = 3 * HEARTBEAT_S
"""A page that hears nothing for so long takes the connection for lost, and makes a new one: a network may go
silent without an error.
"""
MAX_EVENTS = 200
MAX_NEW_POINTS = 300
"""A page that is further behind gets the whole curve, which is thinned, in place of all that it missed."""
_CURSOR = re.compile(r"(\d{1,15}):(\d{1,15}):([\w./-]{0,100})", re.ASCII)


@dataclass(frozen=True)
class Cursor:
    """A place in what a page has seen of a job.

    Attributes:
        event: The identifier of the last event of the ledger.
        step: The last step of the curve.
        training: The stage whose curve it is.
    """

    event: int = 0
    step: int = 0
    training: str = ""

    @classmethod
    def read(cls, text: str | None) -> Cursor | None:
        """The place that a browser names; None where it names none that we made.

        >>> Cursor.read("7:120:teacher"), Cursor.read("x")
        (Cursor(event=7, step=120, training='teacher'), None)
        """
        match = _CURSOR.fullmatch(text or "")
        return cls(int(match[1]), int(match[2]), match[3]) if match else None

    def __str__(self) -> str:
        return f"{self.event}:{self.step}:{self.training}"


@dataclass(frozen=True)
class View:
    """What is known of a job at one time.

    Attributes:
        state: Its state, with what it was asked for: the buttons depend on it.
        finished: Whether nothing more comes.
        status: The HTML of its progress.
        events: Its events behind the cursor, the oldest first, as the page shows them.
        more: Whether there are further ones.
        curves: Its curves, the newest last.
    """

    state: str
    finished: bool
    status: str
    events: list[dict[str, Any]]
    more: bool
    curves: dict[str, Curve]


def message(data: str, *, event: str | None = None, cursor: Cursor | None = None) -> str:
    r"""One message of a stream.

    >>> message("a\nb", event="job-log", cursor=Cursor(3))
    'id: 3:0:\nevent: job-log\ndata: a\ndata: b\n\n'
    """
    lines = [] if cursor is None else [f"id: {cursor}"]
    lines += [] if event is None else [f"event: {event}"]
    lines += [f"data: {line}" for line in data.splitlines() or [""]]
    return "\n".join(lines) + "\n\n"


async def stream(
    look: Callable[[int], View],
    cursor: Cursor,
    *,
    state: str | None = None,
    interval: float = 1.0,
    stopping: Callable[[], bool] = lambda: False,
) -> AsyncIterator[str]:
    """The messages of a job until it ends.

    Unnamed messages hold the HTML of the progress; ``job-log`` an event of the ledger; ``job-points`` points
    of a curve; ``job-state`` that the buttons have changed; ``job-beat`` that nothing is new;
    ``job-end`` that nothing more comes.

    Args:
        look: Gives the view of the job with the events behind an identifier; called in a thread.
        cursor: What the page has.
        state: The state that its buttons are for; None for the one at the first look.
        interval: Seconds between two looks.
        stopping: Whether the server ends.
    """
    import anyio
    from anyio.to_thread import run_sync

    status, sent = None, time.monotonic()
    while not stopping():
        view = await run_sync(look, cursor.event)
        out = []
        for event in view.events:
            cursor = replace(cursor, event=event["id"])
            out.append(message(json.dumps(event), event="job-log", cursor=cursor))
        for place, points in new_points(view.curves, cursor):
            cursor = place
            out.append(message(json.dumps(points), event="job-points", cursor=cursor))
        if view.status != status:
            status = view.status
            out.append(message(status, cursor=cursor))
        if view.state != state:
            out += [message(view.state, event="job-state")] if state is not None else []
            state = view.state
        if out:
            yield "".join(out)
            sent = time.monotonic()
        if view.more:
            continue
        if view.finished:
            yield message(view.state, event="job-end")
            return
        if time.monotonic() - sent >= HEARTBEAT_S:
            yield message("", event="job-beat")
            sent = time.monotonic()
        await anyio.sleep(interval)


def new_points(curves: dict[str, Curve], cursor: Cursor) -> Iterator[tuple[Cursor, dict[str, Any]]]:
    """The points of each curve behind a cursor, with the cursor behind them."""
    names = list(curves)
    seen = names.index(cursor.training) if cursor.training in names else -1
    for number, name in enumerate(names):
        if number < seen:
            continue
        step = cursor.step if number == seen else 0
        points = curves[name].after(step)
        whole = step == 0 or len(points) > MAX_NEW_POINTS
        if whole:
            points = curves[name].after(0)
        if points:
            cursor = replace(cursor, training=name, step=points[-1].step)
            yield cursor, curve_data(name, curves[name].stride, points, whole=whole)


def curve_data(name: str, stride: int, points: list[Point], *, whole: bool) -> dict[str, Any]:
    """Points as the page's script reads them.

    Args:
        name: The stage.
        stride: One step of so many is among them.
        points: The points.
        whole: Whether they replace those that the page has.
    """
    return {"training": name, "stride": stride, "whole": whole, "points": [list(point) for point in points]}
