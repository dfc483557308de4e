"""The stream of a job: every event and step once, also over a lost connection, and never all history."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.jobs.curves import Curve, Curves
from mlx_distill.serve.pages.job_stream import MAX_NEW_POINTS, Cursor, View, stream


def row(step: int, every: int = 10) -> str:
    values: dict[str, Any] = {"step": step, "loss": 3 / step, "seconds": step / 2, "tokens_per_second": 9.0}
    values["peak_memory_bytes"] = 2_000_000_000
    if step % every == 0:
        values["valid_loss"] = 3.5 / step
    return json.dumps(values) + "\n"


def write(path: Path, first: int, last: int, mode: str = "a") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode) as file:
        file.writelines(row(step) for step in range(first, last + 1))


# -- curves


def test_a_curve_grows_with_its_file_as_if_it_were_read_at_once(tmp_path) -> None:
    path, grown = tmp_path / "metrics.jsonl", Curve(tmp_path / "metrics.jsonl", limit=20)
    for first in range(1, 700, 7):
        write(path, first, first + 6)
        grown.read()
    whole = Curve(path, limit=20)
    whole.read()
    assert (grown.points, grown.stride, grown.last) == (whole.points, whole.stride, whole.last)
    assert whole.stride == 32
    assert whole.last is not None
    assert whole.last.step == 700
    assert len(whole.points) <= 2 * 20 + 2 * 20
    assert all(point.loss == 3 / point.step for point in whole.points)


def test_a_short_curve_is_whole(tmp_path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 30)
    curve = Curve(tmp_path / "metrics.jsonl", limit=20)
    curve.read()
    assert [point.step for point in curve.points] == list(range(1, 31))
    assert [point.step for point in curve.points if point.valid_loss is not None] == [10, 20, 30]
    assert curve.points[9].memory_gb == 2.0


def test_a_half_written_line_waits(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    with open(path, "a") as file:
        file.write(row(3)[:20])
    curve = Curve(path)
    curve.read()
    assert [point.step for point in curve.points] == [1, 2]
    with open(path, "a") as file:
        file.write(row(3)[20:])
    curve.read()
    assert [point.step for point in curve.points] == [1, 2, 3]


@pytest.mark.parametrize("last", [5, 30, 60])
def test_a_file_that_was_cut_to_a_checkpoint_is_read_again(last: int, tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 25)
    curve = Curve(path)
    curve.read()
    lines = path.read_text().splitlines(keepends=True)[:4]
    path.write_text("".join(lines))
    write(path, 5, last)
    curve.read()
    assert [point.step for point in curve.points] == list(range(1, last + 1))


def test_damaged_lines_and_values_are_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\nnot json\n[]\n{"loss": 1}\n{"step": 2, "loss": 0.5}\n')
    curve = Curve(path)
    curve.read()
    assert [(point.step, point.loss) for point in curve.points] == [(1, None), (2, 0.5)]


def test_the_curves_of_a_run_move_with_the_stage(tmp_path) -> None:
    curves = Curves()
    write(tmp_path / ".teacher.partial/scratch/metrics.jsonl", 1, 3)
    assert [point.step for point in curves.of(tmp_path)["teacher"].points] == [1, 2, 3]
    (tmp_path / "teacher").mkdir()
    (tmp_path / ".teacher.partial/scratch/metrics.jsonl").rename(tmp_path / "teacher/metrics.jsonl")
    write(tmp_path / "teacher/metrics.jsonl", 4, 4)
    assert [point.step for point in curves.of(tmp_path)["teacher"].points] == [1, 2, 3, 4]
    assert curves.of(None) == {}


# -- the stream


class Browser:
    """What a page has got, and a job that goes on between two looks."""

    def __init__(self, run: Path) -> None:
        self.run, self.curves = run, Curves()
        self.events = [{"id": 2 * n, "message": f"event {n}"} for n in range(1, 5)]
        self.view = View("running", False, "<p>step 1\nof 9</p>", [], False, {})
        self.seen: list[tuple[str | None, Any]] = []
        self.cursor: Cursor | None = Cursor()

    def look(self, after: int) -> View:
        new = [event for event in self.events if event["id"] > after]
        return replace(self.view, events=new[:3], more=len(new) > 3, curves=self.curves.of(self.run))

    def read(self, messages: int = 100, stop: bool = True) -> list[tuple[str | None, Any]]:
        """Connect, and read at most so many messages before the connection is lost."""

        async def work() -> list[str]:
            out: list[str] = []

            def is_lost() -> bool:
                return stop and bool(out)

            async for text in stream(self.look, self.cursor or Cursor(), interval=0, stopping=is_lost):
                out.extend(text.split("\n\n")[:-1])
            return out

        seen: list[tuple[str | None, Any]] = []
        for text in asyncio.run(work())[:messages]:
            fields = [line.partition(": ")[::2] for line in text.split("\n")]
            named = dict(fields)
            if "id" in named:
                self.cursor = Cursor.read(named["id"])
            data = "\n".join(value for key, value in fields if key == "data")
            event = named.get("event")
            seen.append((event, json.loads(data) if event in ("job-log", "job-points") else data))
        self.seen += seen
        return seen

    def got(self, event: str) -> list[Any]:
        return [data for name, data in self.seen if name == event]


def test_each_event_and_step_arrives_once_however_often_the_connection_is_lost(tmp_path) -> None:
    path = tmp_path / ".teacher.partial/scratch/metrics.jsonl"
    browser = Browser(tmp_path)
    for round in range(40):
        write(path, 1 + 3 * round, 3 + 3 * round)
        browser.events.append({"id": 100 + round, "message": f"event {5 + round}"})
        browser.read(messages=round % 4)
    browser.read()
    browser.read()
    assert [data["message"] for data in browser.got("job-log")] == [f"event {n}" for n in range(1, 45)]
    steps = [point[0] for data in browser.got("job-points") for point in data["points"]]
    assert steps == list(range(1, 121))
    assert [data["whole"] for data in browser.got("job-points")] == [True] + [False] * (
        len(browser.got("job-points")) - 1
    )


def test_a_page_that_is_far_behind_gets_a_thinned_curve(tmp_path) -> None:
    path = tmp_path / "student/metrics.jsonl"
    write(path, 1, 10)
    browser = Browser(tmp_path)
    browser.read()
    write(path, 11, 9000)
    browser.read()
    first, second = browser.got("job-points")
    assert not [data for data in (first,) if len(data["points"]) != 10]
    assert second["whole"]
    assert second["stride"] == 8
    assert MAX_NEW_POINTS < len(second["points"]) < 2600
    assert second["points"][-1][0] == 9000


def test_a_second_training_begins_a_curve_of_its_own(tmp_path) -> None:
    write(tmp_path / "teacher/metrics.jsonl", 1, 5)
    browser = Browser(tmp_path)
    browser.read()
    write(tmp_path / ".student.partial/scratch/metrics.jsonl", 1, 2)
    browser.read()
    assert [(data["training"], data["whole"]) for data in browser.got("job-points")] == [
        ("teacher", True),
        ("student", True),
    ]
    browser.read()
    assert len(browser.got("job-points")) == 2


def test_the_stream_ends_with_the_job_and_tells_when_buttons_change(tmp_path) -> None:
    browser = Browser(tmp_path)
    browser.events = []
    browser.view = replace(browser.view, finished=True, state="succeeded")
    assert browser.read(stop=False) == [(None, "<p>step 1\nof 9</p>"), ("job-end", "succeeded")]


def test_a_state_that_changed_before_the_connection_is_told(tmp_path) -> None:
    browser = Browser(tmp_path)
    browser.view = replace(browser.view, finished=True, state="paused")

    async def first() -> str:
        return await anext(stream(browser.look, Cursor(), state="running pause", interval=0))

    assert "event: job-state\ndata: paused" in asyncio.run(first())


def test_a_stranger_s_cursor_is_no_cursor() -> None:
    for text in (None, "", "1:2", "-1:2:x", "1:2:<b>", "9" * 16 + ":1:x", "٣:1:x"):
        assert Cursor.read(text) is None
    assert Cursor.read(str(Cursor(3, 4, "controls/labels"))) == Cursor(3, 4, "controls/labels")
