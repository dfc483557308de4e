"""Error rates by group: planted differences are found, equal groups stay silent."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.goals import check_goals, judge_goals
from mlx_distill.evaluate.groups import group_changes, group_errors
from mlx_distill.recipe import GoalConfig
from mlx_distill.tasks.task import load_task


def row(group: str | None, number: int, truth: str, label: str | None) -> dict[str, Any]:
    return {
        "id": f"{group}-{truth}-{number}",
        "truth": {"kind": truth},
        "answer": None if label is None else {"kind": label},
        "label": label,
        "fields": {} if group is None else {"g": group},
    }


def rows_of(
    group: str | None, false_positives: int, negatives: int, misses: int, positives: int
) -> list[Any]:
    return [row(group, i, "a", "b" if i < false_positives else "a") for i in range(negatives)] + [
        row(group, i, "b", "a" if i < misses else "b") for i in range(positives)
    ]


def errors(rows: list[Any], **settings: Any) -> dict[str, Any]:
    return group_errors(rows, "kind", ["b"], "g", **settings)


def test_rates_counts_and_what_is_too_few() -> None:
    rows = rows_of("one", 6, 40, 1, 35) + rows_of("two", 4, 40, 2, 29) + rows_of("rare", 2, 2, 0, 0)
    rows += rows_of(None, 30, 50, 0, 50)
    rows[-1] = row(None, 99, "b", None)  # invalid: wrong
    result = errors(rows)
    one = result["groups"]["one"]
    assert (one["n"], one["false_positives"], one["negatives"], one["false_negatives"]) == (75, 6, 40, 1)
    assert one["false_positive_rate"]["value"] == 6 / 40 and one["false_positive_rate"]["low"] < 0.15
    assert result["groups"]["two"]["few"] == ["false_negative_rate"]
    assert result["groups"]["rare"]["false_negative_rate"]["value"] is None
    assert result["groups"]["(none)"]["false_negatives"] == 1
    test = result["tests"]["false_positive_rate"]
    assert test["groups"] == 2 and set(test["left_out"]) == {"rare", "(none)"}
    assert test["pooled"]["value"] == 10 / 80 and not test["differs"]
    assert result["tests"]["false_negative_rate"] is None  # only one group has 30 positives
    assert "gaps" not in result and "limits" in result["groups"]["rare"]
    assert result["groups"]["rare"]["limits"] == {} == result["groups"]["(none)"]["limits"]
    json.dumps(result)


def test_an_invalid_answer_is_wrong_in_both_rates() -> None:
    rows = rows_of("one", 0, 40, 0, 40) + rows_of("two", 0, 40, 0, 40)
    for i in (0, 1, 2, 40, 41):
        rows[i] = {**rows[i], "answer": None, "label": None}
    result = errors(rows)
    for name, errors_of_one in (("false_positive", 3), ("false_negative", 2)):
        assert result["groups"]["one"][f"{name}s"] == errors_of_one
        assert result["tests"][f"{name}_rate"]["pooled"]["value"] == errors_of_one / 80
    clean = rows_of("one", 0, 40, 0, 40) + rows_of("two", 0, 40, 0, 40)
    (change,) = group_changes({"teacher_before": clean, "teacher": rows}, "kind", ["b"], "g")
    assert change["rates"]["false_positive_rate"]["one"]["broken"] == 3


def test_a_group_made_three_times_worse_is_found() -> None:
    rows = [r for g in "abcdefg" for r in rows_of(g, 10, 100, 10, 100)] + rows_of("h", 30, 100, 10, 100)
    result = errors(rows)
    test = result["tests"]["false_positive_rate"]
    assert test["differs"] and test["adjusted_p"] < 0.01
    outside = {
        name: group["limits"]["false_positive_rate"]["outside"] for name, group in result["groups"].items()
    }
    assert outside == {**dict.fromkeys("abcdefg"), "h": "99.8"}
    assert not result["tests"]["false_negative_rate"]["differs"]


def test_eight_equal_groups_stay_silent() -> None:
    rng, alarms, draws = np.random.default_rng(0), 0, 120
    for seed in range(draws):
        rows = []
        for g in "abcdefgh":
            rows += rows_of(g, int(rng.binomial(50, 0.1)), 50, int(rng.binomial(50, 0.1)), 50)
        tests = errors(rows, permutations=399, seed=seed)["tests"]
        alarms += any(test["differs"] for test in tests.values())
    assert alarms / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_the_order_of_rows_does_not_matter() -> None:
    rows = rows_of("one", 6, 40, 3, 35) + rows_of("two", 14, 40, 2, 40)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert errors(rows) == errors(shuffled)


def test_p_values_are_corrected_over_the_two_rates() -> None:
    rows = rows_of("one", 9, 60, 30, 60) + rows_of("two", 2, 60, 29, 60)
    tests = errors(rows)["tests"]
    first, second = tests["false_positive_rate"], tests["false_negative_rate"]
    assert first["adjusted_p"] == pytest.approx(min(2 * first["p_value"], second["p_value"], 1.0))


def test_changes_within_each_group_are_paired() -> None:
    before = rows_of("one", 17, 40, 3, 40) + rows_of("two", 5, 40, 3, 40) + rows_of("rare", 1, 5, 1, 5)
    after = rows_of("one", 5, 40, 3, 40) + rows_of("two", 5, 40, 3, 40) + rows_of("rare", 0, 5, 1, 5)
    models = {"teacher_before": before, "teacher": after[::-1], "other": after}
    (change,) = group_changes(models, "kind", ["b"], "g")
    assert (change["before"], change["after"], change["field"]) == ("teacher_before", "teacher", "g")
    one = change["rates"]["false_positive_rate"]["one"]
    assert (one["before"], one["after"], one["fixed"], one["broken"], one["n"]) == (
        17 / 40,
        5 / 40,
        12,
        0,
        40,
    )
    assert one["difference"]["value"] == pytest.approx(-0.3) and one["difference"]["high"] < 0
    assert one["adjusted_p"] < 0.01
    two = change["rates"]["false_positive_rate"]["two"]
    assert two["difference"]["value"] == 0 and two["difference"]["low"] < 0 < two["difference"]["high"]
    rare = change["rates"]["false_positive_rate"]["rare"]
    assert rare["few"] and rare["difference"] is None and rare["adjusted_p"] is None
    json.dumps(change)


def test_rows_that_share_a_cluster_widen_the_interval() -> None:
    before, after = rows_of("one", 17, 40, 3, 40), rows_of("one", 5, 40, 3, 40)
    for rows in (before, after):
        for number, entry in enumerate(rows):
            entry["fields"]["artist"] = f"artist {number // 6}"
    models = {"teacher_before": before, "teacher": after}

    def width(cluster: str | None) -> float:
        (change,) = group_changes(models, "kind", ["b"], "g", cluster=cluster)
        difference = change["rates"]["false_positive_rate"]["one"]["difference"]
        return float(difference["high"] - difference["low"])

    assert width("artist") > 1.3 * width(None)


def test_a_groups_rate_can_be_a_goal() -> None:
    task = load_task("moderation")
    metric = "by_group.groups.women.false_positive_rate"
    check_goals([GoalConfig(model="teacher", metric=metric, at_most=0.35)], task)
    for wrong, of_task in ((metric + "s", task), (metric, load_task("music"))):
        with pytest.raises(ConfigError, match="no figure"):
            check_goals([GoalConfig(model="teacher", metric=wrong, at_most=0.35)], of_task)
    figures = {"by_group": errors(rows_of("women", 2, 40, 0, 40) + rows_of("men", 30, 40, 0, 40))}
    report = {"metrics": {"teacher": figures}}
    goals = [
        {"model": "teacher", "metric": f"by_group.groups.{who}.false_positive_rate", "at_most": 0.35}
        for who in ("women", "men", "others")
    ]
    assert [goal["state"] for goal in judge_goals(goals, report, task)] == ["met", "missed", "not_measured"]
