"""How much answers vary between runs, and with the order of the labels."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from helpers.small_run import TASK

from mlx_distill.errors import DataError
from mlx_distill.evaluate.repeats import order_figures, repeat_figures
from mlx_distill.tasks.task import Task, parse_task

SCORED = {
    **TASK,
    "score": "points",
    "score_scale": [0, 50],
    "schema": {
        "type": "object",
        "required": ["colour", "points"],
        "properties": {
            **TASK["schema"]["properties"],  # type: ignore[index]
            "points": {"type": "integer", "minimum": 0, "maximum": 50},
        },
    },
}


@pytest.fixture
def task() -> Task:
    return parse_task(SCORED, "task")


def line(
    id: str, run: int, label: str | None, score: float | None = 10.0, kind: str = "sampled"
) -> dict[str, Any]:
    answer = None if label is None else {"colour": label, "points": score}
    return {"id": id, "kind": kind, "run": run, "answer": answer, "label": label, "score": score}


def predictions(*ids: str) -> list[dict[str, Any]]:
    return [{"id": id, "truth": {"colour": "yes", "points": 10}} for id in ids]


def test_rows_are_averaged_over_their_runs_before_any_interval(task: Task) -> None:
    runs = {
        "steady": [("yes", 10.0)] * 3,
        "flips": [("yes", 10.0), ("no", 20.0), ("yes", 30.0)],
        "invalid": [("yes", 40.0), (None, None), ("yes", 50.0)],
        "wrong": [("no", 5.0)] * 3,
    }
    lines = [line(id, run, *one) for id, values in runs.items() for run, one in enumerate(values, 1)]
    header = {"runs": 3, "temperatures": {"sampled": 0.7}}
    found = repeat_figures(header, lines, predictions(*runs), task)
    assert found is not None and found["runs"] == 3
    figures = found["sampled"]
    assert figures["temperature"] == 0.7
    assert figures["flip_rate"]["value"] == 0.5 and figures["flip_rate"]["n"] == 4
    assert figures["accuracy"]["value"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)
    assert figures["accuracy"]["n"] == 4  # four rows, not twelve answers
    assert figures["right_in_all_runs"]["value"] == 0.25
    deviations = [0.0, statistics.stdev([10, 20, 30]), statistics.stdev([40, 50]), 0.0]
    assert figures["score_deviation"]["value"] == pytest.approx(statistics.mean(deviations) / 50)


def test_rows_of_other_sets_do_not_count_and_a_missing_run_is_an_error(task: Task) -> None:
    header = {"runs": 2, "temperatures": {"shuffled": 0.0}}
    lines = [line(id, run, "yes", kind="shuffled") for id in ("a", "b") for run in (1, 2)]
    found = repeat_figures(header, lines, predictions("a"), task)
    assert found and found["shuffled"]["flip_rate"]["n"] == 1
    assert repeat_figures(header, lines, predictions("other"), task) is None
    with pytest.raises(DataError, match="the row 'b' has 1 of 2 runs"):
        repeat_figures(header, lines[:-1], predictions("a", "b"), task)


def test_without_a_label_the_whole_answer_has_to_stay(task: Task) -> None:
    plain = parse_task({**SCORED, "label": None}, "task")
    header = {"runs": 2, "temperatures": {"sampled": 0.7}}
    lines = [line("a", run, "yes", 10.0) for run in (1, 2)] + [
        line("b", run, "yes", 9.0 + run) for run in (1, 2)
    ]
    found = repeat_figures(header, lines, predictions("a", "b"), plain)
    assert found and found["sampled"]["flip_rate"]["value"] == 0.5
    assert found["sampled"]["right_in_all_runs"]["value"] == 0.5


def test_labels_that_change_with_the_order_of_the_options_are_counted() -> None:
    header = {"orders": [["yes", "no"], ["no", "yes"]], "left_out": 1}
    lines = [{"id": "a", "labels": ["yes", "yes"]}, {"id": "b", "labels": ["yes", "no"]}]
    found = order_figures(header, lines, predictions("a", "b"))
    assert found and found["orders"] == 2 and found["left_out"] == 1
    assert (found["flip_rate"]["value"], found["flip_rate"]["n"]) == (0.5, 2)
    assert order_figures(header, lines, predictions("other")) is None
