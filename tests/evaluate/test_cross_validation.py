"""What is computed from the answers of the folds of a cross-validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_run import LABELS, TASK

from mlx_distill.errors import DataError
from mlx_distill.evaluate.cross_validation import (
    check_fold,
    check_partition,
    learning_curve,
    pooled_figures,
)
from mlx_distill.metrics.clusters import clustered_rate
from mlx_distill.metrics.intervals import wilson
from mlx_distill.metrics.paired import compare_paired
from mlx_distill.tasks.task import parse_task


def task(**more: Any) -> Any:
    return parse_task({**TASK, **more}, "task")


def answers(right: list[bool], folds: int = 4, artists: int = 0) -> list[dict[str, Any]]:
    """One row for each, right or wrong by the list."""
    out = []
    for i, hit in enumerate(right):
        truth = LABELS[i % 2]
        label = truth if hit else LABELS[1 - i % 2]
        fields = {"artist": f"a{i % artists}"} if artists else {}
        out.append(
            {
                "id": f"r{i:03d}",
                "fold": i % folds + 1,
                "truth": {"colour": truth},
                "answer": {"colour": label},
                "label": label,
                "fields": fields,
            }
        )
    return out


def test_the_figure_is_that_of_the_pooled_rows_and_folds_are_shown_beside_it() -> None:
    hits = (np.random.default_rng(0).random(120) < 0.8).tolist()
    found = pooled_figures({"teacher": answers(hits)}, task(), [90] * 4)["figures"]["teacher"]
    low, high = wilson(sum(hits), 120)
    assert found["estimate"] == {"value": sum(hits) / 120, "low": low, "high": high, "n": 120}
    assert [fold["value"] for fold in found["folds"]] == [sum(hits[i::4]) / 30 for i in range(4)]


def test_clusters_widen_the_interval_of_rows_that_share_an_artist() -> None:
    hits = [(i % 10) < 7 for i in range(120)]
    rows = answers(hits, artists=10)
    found = pooled_figures({"teacher": rows}, task(cluster="artist"), [90] * 4)["figures"]["teacher"]
    expected = clustered_rate(hits, [f"a{i % 10}" for i in range(120)])
    assert found["estimate"]["clusters"] == 10 and found["estimate"]["few_clusters"]
    assert found["estimate"]["low"] == max(0.0, expected["low"] or 0.0)
    plain = pooled_figures({"teacher": rows}, task(), [90] * 4)["figures"]["teacher"]["estimate"]
    assert found["estimate"]["low"] < plain["low"] and found["estimate"]["high"] > plain["high"]


def test_models_are_compared_on_the_pooled_rows_and_over_folds() -> None:
    generator = np.random.default_rng(1)
    weak, strong = ((generator.random(160) < p).tolist() for p in (0.5, 0.9))
    found = pooled_figures({"teacher_before": answers(weak), "teacher": answers(strong)}, task(), [120] * 4)
    (comparison,) = found["comparisons"]
    assert (comparison["a"], comparison["b"], comparison["verdict"]) == (
        "teacher_before",
        "teacher",
        "better",
    )
    assert comparison["pooled"] == compare_paired(strong, weak)
    expected = [(sum(strong[i::4]) - sum(weak[i::4])) / 40 for i in range(4)]
    assert comparison["differences"] == pytest.approx(expected)
    assert comparison["corrected"]["n"] == 4 and comparison["corrected"]["low"] > 0
    # Folds of a third of the training rows share more of their variance: 1/4 + 1/3 against 1/4.
    half = (comparison["corrected"]["high"] - comparison["corrected"]["low"]) / 2
    deviation = np.std(comparison["differences"], ddof=1)
    assert half == pytest.approx(3.182446 * deviation * (1 / 4 + 40 / 120) ** 0.5)


def test_different_rows_are_refused() -> None:
    rows = answers([True] * 20)
    with pytest.raises(DataError, match="different rows, such as 'r019'"):
        pooled_figures({"teacher_before": rows[:-1], "teacher": rows}, task(), [15] * 4)


@pytest.mark.parametrize(("last", "words"), [(0.95, "still rises"), (0.5, "No difference is shown")])
def test_the_learning_curve_says_what_its_last_step_shows(last: float, words: str) -> None:
    generator = np.random.default_rng(2)
    points = [
        (share, round(400 * share), answers((generator.random(200) < p).tolist()))
        for share, p in ((0.5, 0.3), (0.75, 0.5), (1.0, last))
    ]
    curve = learning_curve(points, task())
    assert words in curve["sentence"] and "from 300 to 400 training rows" in curve["sentence"]
    assert [point["rows"] for point in curve["points"]] == [200, 300, 400]
    assert [step["from"] for step in curve["steps"]] == [200, 300]


def write_fold(folder: Path, **splits: list[tuple[str, str]]) -> Path:
    """Prepared rows, each an id and a text."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = [
            {"id": id, "messages": [{"role": "user", "content": text}], "fields": {"artist": f"by {text[0]}"}}
            for id, text in splits.get(split, [])
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("train", "kind"),
    [([("a", "other")], "id"), ([("b", "Some TEXT ")], "text"), ([("b", "same artist")], "artist")],
)
def test_a_test_row_among_the_training_rows_is_found(
    tmp_path: Path, train: list[tuple[str, str]], kind: str
) -> None:
    fold = write_fold(tmp_path / "data", train=train, test=[("a", "some text")])
    with pytest.raises(DataError, match=f"the test row 'a' has the {kind} of a training row"):
        check_fold(fold, task(cluster="artist"))
    check_fold(write_fold(tmp_path / "other", train=[("b", "other")], test=[("a", "some text")]), task())


def test_every_row_is_tested_in_one_fold(tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "y"), ("c", "z")]
    first = write_fold(tmp_path / "1", train=rows[1:], test=rows[:1])
    second = write_fold(tmp_path / "2", train=rows[:1], test=rows[1:])
    assert check_partition([first, second], task()) == 3
    with pytest.raises(DataError, match="'a' is a test row of"):
        check_partition([first, first], task())
    with pytest.raises(DataError, match="2 rows are tested in no fold"):
        check_partition([first], task())
    third = write_fold(tmp_path / "3", train=rows[:1], test=rows[1:2])
    with pytest.raises(DataError, match="other rows than those of the first fold, such as 'c'"):
        check_partition([first, third], task())
