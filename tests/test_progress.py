"""Progress: which lines are printed, how often, and the estimate of the time left."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mlx_distill.progress import Estimate, NullProgress, PlainProgress, RichProgress, make_progress
from mlx_distill.text import duration


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def test_the_estimate_ignores_a_slow_first_step(clock: _Clock) -> None:
    estimate = Estimate(total=1000, clock=clock)
    clock.now += 60  # one step took a minute: compilation
    estimate.left(1)
    for done in range(2, 101):
        clock.now += 1
        left = estimate.left(done)
    assert left == pytest.approx(900.0)


def test_there_is_no_estimate_before_enough_was_seen(clock: _Clock) -> None:
    estimate = Estimate(total=400, clock=clock)
    clock.now += 16  # the first row, with loading and compilation: 1 h 46 min by its rate
    assert estimate.left(1) is None
    for done in (2, 3):
        clock.now += 4
        assert estimate.left(done) is None  # of few updates
    clock.now += 4
    assert estimate.left(4) == pytest.approx(396 * 4)
    estimate = Estimate(total=400, clock=clock)
    for done in range(1, 6):
        clock.now += 1
        assert estimate.left(done) is None  # of a short time
    clock.now += 1
    assert estimate.left(6) == pytest.approx(394)


def test_the_estimate_of_a_resumed_task_counts_this_run_only(clock: _Clock) -> None:
    estimate = Estimate(total=100, clock=clock)
    for done in (91, 92, 93, 94):  # after 90 of a run before
        clock.now += 2
        left = estimate.left(done)
    assert left == pytest.approx(12.0)


def test_what_is_done_has_no_time_left(clock: _Clock) -> None:
    assert Estimate(total=3, clock=clock).left(3) == 0.0


@pytest.mark.parametrize("total", [None, 0])
def test_no_total_no_estimate(total: int | None, clock: _Clock) -> None:
    estimate = Estimate(total, clock=clock)
    clock.now += 1
    assert estimate.left(1) is None


def test_plain_lines_come_at_most_every_few_seconds(clock: _Clock) -> None:
    stream = io.StringIO()
    with PlainProgress(stream, every=10, clock=clock).task("teach", total=100, unit="step") as bar:
        for done in range(1, 101):
            clock.now += 1
            bar.update(done, loss=1 / done)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "teach: 100 steps"
    assert lines[1] == "teach: 10/100 (10%), 1 min 30 s left, loss 0.1"
    assert len(lines) == 2 + 9
    assert lines[-1] == "teach: done, 100 steps in 1 min 40 s, loss 0.01"


def test_a_task_that_fails_says_where_and_raises(clock: _Clock) -> None:
    stream = io.StringIO()

    def convert() -> None:
        with PlainProgress(stream, clock=clock).task("convert", total=8, unit="tensor") as bar:
            bar.update(3)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        convert()
    assert stream.getvalue().splitlines()[-1] == "convert: stopped after 0 s at 3/8"


def test_a_resumed_task_says_where_it_continues(clock: _Clock) -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, clock=clock)
    with progress.task("teach", total=32, unit="step", start=25) as bar:
        bar.update(32, loss=0.5)
    with progress.task("teach", total=32, unit="step", start=32):
        pass  # killed after the last step
    assert stream.getvalue().splitlines() == [
        "teach: 32 steps, continuing after step 25",
        "teach: done, 32 steps (25 of them before) in 0 s, loss 0.5",
        "teach: 32 steps, continuing after step 32",
        "teach: done, 32 steps (32 of them before) in 0 s",
    ]


def test_without_a_terminal_lines_are_plain_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress()
    assert isinstance(progress, PlainProgress)
    with progress.task("prepare") as bar:
        bar.update(2)
    progress.note("2 rows")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    assert captured.err.splitlines()[-1] == "2 rows"


def test_the_live_bar_ends_in_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RichProgress()
    with progress.task("teach", total=3, unit="step", start=1) as bar:
        bar.update(3, loss=0.25)
    progress.note("rows [left] out")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "teach: done, 3 steps (1 of them before) in 0 s, loss 0.25" in captured.err
    assert "rows [left] out" in captured.err


def test_null_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = NullProgress()
    with progress.task("teach", total=3, unit="step") as bar:
        bar.update(3, loss=0.25)
    progress.note("text")
    assert capsys.readouterr() == ("", "")


def test_units_of_measurement_have_no_plural() -> None:
    stream = io.StringIO()
    for unit in ("MB", "row"):
        with PlainProgress(stream, clock=lambda: 0.0).task("convert", total=1200, unit=unit):
            pass
    assert [line for line in stream.getvalue().splitlines() if "done" not in line] == [
        "convert: 1,200 MB",
        "convert: 1,200 rows",
    ]


def test_durations_are_rounded() -> None:
    assert [duration(s) for s in (0, 59.4, 59.6, 3599.6)] == ["0 s", "59 s", "1 min 00 s", "1 h 00 min"]
