"""Error categories: conditions in YAML, their counts, and files for relabelling."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.predictions import prediction as row
from helpers.predictions import tone, tone_task

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.categories import error_categories, error_rows, parse_categories, write_error_rows
from mlx_distill.evaluate.conditions import Condition
from mlx_distill.tasks.task import load_task

PROPERTIES = tone_task().schema["properties"]


@pytest.mark.parametrize(
    ("raw", "holds", "holds_not"),
    [  # pairs of the true answer and the model's
        ({"answer": {"tone": "dark"}}, [("light", "dark")], [("dark", "light")]),
        ({"truth": {"tone": ["light", "dark"]}}, [("light", "dark")], []),
        ({"tone": "differs"}, [("light", "dark")], [("dark", "dark")]),
        (
            {"answer": {"points": {"at_least": 95}}, "truth": {"points": {"below": 80}}},
            [(79, 95)],
            [(80, 95), (79, 94)],
        ),
        ({"points": {"over_by": 20}}, [(50, 71)], [(50, 70), (71, 50)]),
        ({"points": {"under_by": 20}}, [(71, 50)], [(50, 71), (70, 50)]),
        ({"points": {"off_by": 20}}, [(71, 50), (50, 71)], [(50, 70)]),
        ({"answer": {"points": {"above": 10, "at_most": 20}}}, [(0, 20)], [(0, 10), (0, 21)]),
        ({"answer": {"points": {"none_of": [1, 2]}}}, [(0, 3)], [(0, 2)]),
        ({"themes": "missing"}, [(["a", "b"], ["A"])], [(["a"], ["a", "c"])]),
        ({"themes": "extra"}, [(["a"], ["a", "c"])], [(["a", "b"], ["A"]), (["a", "b"], ["b", "a"])]),
        ({"themes": {"missing": ["a", "b"]}}, [(["a", "c"], ["c"])], [(["c"], [])]),
        ([{"themes": "missing"}, {"themes": "extra"}], [(["a"], []), ([], ["a"])], [(["a"], ["a"])]),
        ({"themes": "differs"}, [(["a"], [])], [(["a", "b"], ["b", "A"])]),
        ({"answer": {"themes": {"contains": "a"}}}, [([], ["b", "A"])], [(["a"], ["b"])]),
        ({"answer": {"themes": {"empty": True}}}, [(["a"], [])], [([], ["a"])]),
    ],
)
def test_conditions(raw: Any, holds: list[Any], holds_not: list[Any]) -> None:
    condition = Condition(raw, PROPERTIES, "x")

    def answer(value: Any) -> dict[str, Any]:
        name = "tone" if isinstance(value, str) else "points" if isinstance(value, int) else "themes"
        return {**tone("dark"), name: value}

    for pairs, expected in ((holds, True), (holds_not, False)):
        for truth, given in pairs:
            assert condition.holds(row(1, answer(truth), answer(given))) is expected, (truth, given)
    if "truth" not in raw:  # an answer that is not valid has no value and no difference
        assert not condition.holds(row(1, tone("dark"), None))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "no condition"),
        ("differs", "'differs' is no condition"),
        ({"point": {"over_by": 3}}, r"x.point: the answer has no field 'point'"),
        ({"answer": {"point": 3}}, r"x.answer.point: the answer has no field 'point'"),
        ({"points": {"over_bi": 3}}, "x.points: unknown difference 'over_bi'"),
        ({"answer": {"points": {"over": 3}}}, "x.answer.points: unknown test 'over'"),
        ({"points": {"over_by": "3"}}, "x.points.over_by: '3'"),
        ({"answer": {"tone": "drak"}}, "x.answer.tone: 'drak' is no value of the field"),
        ({"points": 20}, "x.points: 20 is no difference"),
        ({"answer": "wrong"}, "x.answer: 'wrong' is no test"),
        ({"answer": {"points": {"at_least": "__import__('os')"}}}, "x.answer.points.at_least"),
        ([{"tone": "differs"}, {"tone": {}}], r"x\[1\].tone"),
    ],
)
def test_a_condition_that_is_wrong_is_refused_with_its_place(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Condition(raw, PROPERTIES, "x")
    assert caught.value.fix


TASK = tone_task(
    error_categories={
        "false_positive": {"answer": {"points": {"at_least": 95}}, "truth": {"points": {"below": 80}}},
        "overestimate": {"points": {"over_by": 20}},
    }
)
ROWS = [
    row(0, tone("dark", 50), tone("dark", 97)),
    row(1, tone("dark", 79), tone("dark", 95)),
    row(2, tone("dark", 90), tone("dark", 99)),
    row(3, tone("dark", 10), tone("dark", 40), input="=1+1"),
    row(4, tone("dark", 10), None, text="no JSON"),
    row(5, None, tone("dark", 99)),
]


def test_categories_are_counted_over_all_rows_and_over_those_where_they_are_possible() -> None:
    result = error_categories(ROWS, TASK)
    assert {name: entry["ids"] for name, entry in result.items()} == {
        "false_positive": ["0", "1"],
        "overestimate": ["0", "3"],
        "invalid": ["4"],
    }
    rates = result["false_positive"]["rate"], result["false_positive"]["rate_where_possible"]
    assert [(one["value"], one["n"]) for one in rates] == [(0.4, 5), (0.5, 4)]
    assert result["overestimate"]["rate_where_possible"] is None
    assert result["invalid"]["rate"]["n"] == 6  # a row without a true answer can be invalid


def test_rows_with_errors_are_written_for_relabelling(tmp_path: Path) -> None:
    stale = tmp_path / "errors" / "old.csv"
    stale.parent.mkdir()
    stale.write_text("", encoding="utf-8")
    paths = write_error_rows(tmp_path, {"student": ROWS}, TASK)
    assert [path.name for path in paths] == ["student.jsonl", "student.csv"]
    assert sorted(path.name for path in stale.parent.iterdir()) == ["student.csv", "student.jsonl"]
    lines = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
    kinds = {
        "0": ["false_positive", "overestimate"],
        "1": ["false_positive"],
        "3": ["overestimate"],
        "4": ["invalid"],
    }
    assert {line["id"]: line["categories"] for line in lines} == kinds
    assert lines[0]["answer"]["points"] == 97 and lines[0]["truth"]["points"] == 50
    with open(paths[1], encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(one["id"], one["categories"]) for one in table][:2] == [
        ("0", "false_positive, overestimate"),
        ("1", "false_positive"),
    ]
    assert table[2]["input"] == "'=1+1"  # no formula of a spreadsheet
    assert write_error_rows(tmp_path, {"student": ROWS}, tone_task()) == []
    assert not list(stale.parent.iterdir())


def test_the_packaged_tasks_have_the_errors_of_their_users() -> None:
    music = load_task("music")
    assert set(parse_categories(music)) >= {
        "false_positive",
        "false_negative",
        "overestimate",
        "underestimate",
        "theme_error",
        "reference_error",
        "invalid",
    }

    def song(score: int, *themes: str, references: tuple[str, ...] = ()) -> dict[str, Any]:
        return {
            "verdict": "ACCEPTABLE",
            "score": score,
            "themes": [*themes],
            "scripture_references": [*references],
        }

    rows = [
        row("wrongly recommended", song(70, "hope"), song(95, "hope")),
        row("missed", song(95, "hope"), song(79, "grief")),
        row("invented", song(60), song(60, references=("Psalm 23:4",))),
    ]
    kinds = {one["id"]: one["categories"] for one in error_rows(rows, music)}
    assert kinds == {
        "wrongly recommended": ["false_positive", "overestimate"],
        "missed": ["false_negative", "theme_error"],
        "invented": ["reference_error"],
    }
