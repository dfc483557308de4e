"""The difference between teacher and quantized student, attributed to the steps between them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers.report_runs import make_predictions, make_task

from mlx_distill.errors import DataError
from mlx_distill.evaluate.attribution import CHAIN, attribute

TASK = make_task()


def models(n: int = 150) -> dict[str, list[dict[str, Any]]]:
    return {name: make_predictions(TASK, name, {"test": n})[1:] for name in CHAIN}


def test_the_steps_add_up_exactly_and_the_patterns_count_every_row() -> None:
    result = attribute(models(), TASK)
    assert result is not None
    differences = [step["difference"]["value"] for step in result["steps"]]
    assert abs(sum(differences) - result["total"]["difference"]["value"]) <= 1e-12
    assert result["n"] == 150 and len(result["patterns"]) == 8
    assert sum(pattern["count"] for pattern in result["patterns"]) == 150
    counts = {tuple(pattern["right"]): pattern["count"] for pattern in result["patterns"]}
    for i, step in enumerate(result["steps"]):
        fixed = sum(count for right, count in counts.items() if not right[i] and right[i + 1])
        broken = sum(count for right, count in counts.items() if right[i] and not right[i + 1])
        assert (step["fixed"], step["broken"]) == (fixed, broken)
        assert step["churn"] == pytest.approx((fixed + broken) / 150)
        assert step["label_kl"]["value"] > 0
        assert step["difference"]["low"] < step["difference"]["value"] < step["difference"]["high"]


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = models(60)
    before = attribute(rows, TASK)
    random.Random(1).shuffle(rows["student"])
    after = attribute(rows, TASK)
    assert before is not None and after is not None
    assert [s["difference"] for s in before["steps"]] == [s["difference"] for s in after["steps"]]


def test_a_share_of_what_may_be_nothing_is_not_shown() -> None:
    rows = models(60)
    same = attribute(dict.fromkeys(CHAIN, rows["teacher"]), TASK)
    assert same is not None and same["total"]["difference"]["value"] == 0
    assert [step["share"] for step in same["steps"]] == [None, None]
    worse = {**rows, "quantized": [{**row, "answer": None} for row in rows["quantized"]]}
    shares = attribute(worse, TASK)
    assert shares is not None and sum(step["share"] for step in shares["steps"]) == pytest.approx(1)


def test_without_a_model_or_on_other_rows_nothing_is_attributed() -> None:
    rows = models(10)
    assert attribute({name: rows[name] for name in CHAIN[:2]}, TASK) is None
    with pytest.raises(DataError, match="different rows"):
        attribute({**rows, "student": rows["student"][:9]}, TASK)
