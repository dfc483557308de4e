"""Goals are judged by the ends of intervals, and refused before a run where they name nothing."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.predictions import prediction as row
from helpers.predictions import tone, tone_task

from mlx_distill.errors import ConfigError, QualityGateError
from mlx_distill.evaluate.goals import check_goals, goal_state, goal_text, judge_goals, require_goals
from mlx_distill.evaluate.suite import evaluate_models
from mlx_distill.recipe import GoalConfig
from mlx_distill.tasks.task import load_task

TASK = tone_task(
    score_threshold=60,
    metrics=[{"metric": "list_f1", "field": "themes", "name": "theme_f1"}],
    error_categories={"overestimate": {"points": {"over_by": 20}}},
)


def report(count: int, wrong: int) -> dict[str, Any]:
    rows = [
        row(
            i,
            tone("dark", 50, "a"),
            tone("light", 90, "a") if i < wrong else tone("dark", 50, "a"),
            latency_s=0.5 + i % 7 / 100,
        )
        for i in range(count)
    ]
    figures = evaluate_models({"teacher": rows}, TASK)["by_set"]["test"]["teacher"]
    return {
        "metrics": {"teacher": {**figures, "peak_memory_gb": 12.5}},
        "repeats": {"teacher": {"flip_rate": 0.02}},
    }


@pytest.mark.parametrize(
    ("count", "wrong", "state"),
    [(400, 20, "met"), (40, 2, "undecided"), (400, 80, "missed"), (20, 0, "undecided"), (20, 18, "missed")],
)
def test_a_goal_is_judged_by_the_end_of_the_interval(count: int, wrong: int, state: str) -> None:
    measured = report(count, wrong)
    goals = [{"model": "teacher", "metric": "accuracy", "at_least": 0.9}]
    (goal,) = judge_goals(goals, measured, TASK)
    assert (goal["state"], goal["met"]) == (state, state == "met")
    (upside_down,) = judge_goals(
        [{"model": "teacher", "metric": "overestimate", "at_most": 0.1}], measured, TASK
    )
    assert upside_down["state"] == state  # the overestimated rows are the wrong ones


def test_figures_are_found_by_name_path_and_section_with_their_units() -> None:
    measured = report(400, 20)
    goals = [
        {"model": "teacher", "metric": metric, "at_most": 3.0}
        for metric in (
            "theme_f1",
            "at_threshold.accuracy",
            "fields.themes.f1",
            "error_categories.overestimate.rate",
            "latency_s",
            "score_mae",
            "peak_memory_gb",
            "repeats.flip_rate",
            "items_per_minute",
            "load_s",
        )
    ]
    judged = judge_goals(goals, measured, TASK)
    assert [goal["unit"] for goal in judged] == [*["share"] * 4, "s", "points", "GB", "share", "number", "s"]
    assert [goal["state"] for goal in judged] == [*["met"] * 6, "missed", "met", "missed", "not_measured"]
    assert judged[4]["measured"]["n"] == 400  # the interval, not the plain number
    assert "peak memory at most 3 GB; measured 12.5 GB" in goal_text(judged[6])
    assert goal_text(judged[9]) == "Teacher: load at most 3 s; not measured"


def test_a_model_that_was_not_measured_meets_nothing() -> None:
    (goal,) = judge_goals([{"model": "student", "metric": "accuracy", "at_least": 0.0}], report(10, 0), TASK)
    assert (goal["state"], goal["met"], goal["measured"]) == ("not_measured", False, None)


def test_an_end_that_is_not_bounded_decides_nothing() -> None:
    estimate = {"value": 2.0, "low": 1.5, "high": None, "n": 5}
    assert [goal_state(estimate, "at_most", limit) for limit in (1.0, 3.0)] == ["missed", "undecided"]
    assert [goal_state(estimate, "at_least", limit) for limit in (1.0, 1.7)] == ["met", "undecided"]


def test_unknown_models_and_figures_are_refused_before_a_run() -> None:
    goal = GoalConfig("student", "acuracy", at_least=0.9)
    with pytest.raises(ConfigError, match=r"goals\[0\]: no figure 'acuracy'") as caught:
        check_goals([goal], TASK)
    assert "did you mean 'accuracy'" in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="no model 'studnt'"):
        check_goals([GoalConfig("studnt", "accuracy", at_least=0.9)], TASK)
    with pytest.raises(ConfigError, match="no figure 'confusion'"):
        check_goals([GoalConfig("student", "confusion", at_least=0.9)], TASK)
    names = ["theme_f1", "overestimate", "accuracy_constrained", "fields.themes.f1", "agreement", "repeats.x"]
    check_goals([GoalConfig("student", name, at_least=0.9) for name in names], TASK)


def test_a_rate_of_one_group_can_be_a_goal() -> None:
    task = load_task("moderation")
    name = "by_group.groups.St. Ives.false_positive_rate"
    check_goals([GoalConfig("teacher", name, at_most=0.35)], task)
    for wrong in ("by_group.groups.cyclists.false_positives", "by_group.groups.f1"):
        with pytest.raises(ConfigError, match="no figure"):
            check_goals([GoalConfig("teacher", wrong, at_most=0.35)], task)
    with pytest.raises(ConfigError, match="no figure"):  # a task without groups
        check_goals([GoalConfig("teacher", "by_group.groups.folk.false_positive_rate", at_most=0.35)], TASK)
    rates = {"false_positive_rate": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 60}}
    measured = {"metrics": {"teacher": {"by_group": {"groups": {"cyclists": rates, "St. Ives": rates}}}}}
    goals = [
        {"model": "teacher", "metric": f"by_group.groups.{group}.false_positive_rate", "at_most": 0.35}
        for group in ("cyclists", "St. Ives", "sailors")
    ]
    judged = judge_goals(goals, measured, task)
    assert [goal["state"] for goal in judged] == ["met", "met", "not_measured"]


def test_the_gate_names_what_is_not_met() -> None:
    goals = [
        {"model": "teacher", "metric": "accuracy", "at_least": 0.5},
        {"model": "teacher", "metric": "accuracy", "at_least": 0.94},
        {"model": "teacher", "metric": "load_s", "at_most": 3},
    ]
    judged = judge_goals(goals, report(400, 20), TASK)
    require_goals(judged[:1])
    with pytest.raises(
        QualityGateError, match="2 of 3 goals not met: 1 undecided and 1 not measured"
    ) as caught:
        require_goals(judged)
    assert caught.value.exit_code == 3
