"""Figures against the exact probabilities of rows: held to sums by hand, and refused where they are none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlx_distill.assets.music import drawn
from mlx_distill.errors import DataError
from mlx_distill.evaluate.known_probabilities import exact_probabilities, known_figures
from mlx_distill.evaluate.registry import task_metrics
from mlx_distill.evaluate.suite import evaluate_models
from mlx_distill.report.environment import render
from mlx_distill.tasks.task import load_task

TASK = load_task("music_drawn")


def predictions(sharpness: float = 1.0) -> list[dict[str, Any]]:
    """Rows whose label probabilities are powers of the exact ones; every tenth answer is invalid."""
    out = []
    for i, row in enumerate(drawn.generate(200, seed=31, part="test")):
        exact = row["probabilities"]["verdict"]
        powers = {name: p**sharpness for name, p in exact.items()}
        own = {name: p / sum(powers.values()) for name, p in powers.items()}
        label = max(own, key=lambda name: own[name])
        answer = None if i % 10 == 0 else {"verdict": label, "score": 50}
        out.append(
            {
                "id": row["id"],
                "set": "test",
                "fields": {"probabilities": row["probabilities"]},
                "truth": row["answer"],
                "answer": answer,
                "error": None if answer else "cut",
                "label": label if answer else None,
                "label_probs": own,
                "score": 50 if answer else None,
                "latency_s": 0.1,
                "tokens": 9,
                "prompt_tokens": 50,
                "text": "",
                "title": None,
                "input": "",
                "constrained": None,
            }
        )
    return out


def test_a_model_that_knows_the_probabilities_has_the_attainable_figures() -> None:
    rows = [row for row in predictions() if row["answer"]]
    found = known_figures(rows, TASK)
    assert found is not None and found["n"] == 180
    best = sum(max(row["fields"]["probabilities"]["verdict"].values()) for row in rows) / len(rows)
    assert found["attainable_accuracy"]["value"] == pytest.approx(best)
    assert found["expected_accuracy"]["value"] == pytest.approx(best) and found["best_label"]["value"] == 1
    assert found["kl_to_truth"]["value"] == pytest.approx(0, abs=1e-12)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-12)


def test_invalid_answers_and_sharper_probabilities_cost_what_they_must() -> None:
    rows = predictions(sharpness=3.0)
    found = known_figures(rows, TASK)
    assert found is not None
    kl, right = 0.0, 0.0
    for row in rows:
        exact = row["fields"]["probabilities"]["verdict"]
        kl += sum(p * math.log(p / row["label_probs"][name]) for name, p in exact.items())
        right += max(exact.values()) if row["answer"] else 0.0
    assert found["kl_to_truth"]["value"] == pytest.approx(kl / len(rows), rel=1e-4)
    assert found["expected_accuracy"]["value"] == pytest.approx(right / len(rows))
    assert found["best_label"]["value"] == pytest.approx(0.9) and found["calibration_error"] > 0.05
    by_name = {metric.name: metric.figure(rows, 0.95) for metric in task_metrics(TASK)}
    assert by_name["kl_to_truth"] == found["kl_to_truth"]
    assert by_name["expected_accuracy"]["value"] == pytest.approx(found["expected_accuracy"]["value"])


def test_rows_without_probabilities_have_no_such_figures() -> None:
    rows = [{**row, "fields": {}} for row in predictions()]
    assert known_figures(rows, TASK) is None
    figures = evaluate_models({"teacher": rows}, TASK)["by_set"]["test"]["teacher"]
    assert "known_probabilities" not in figures
    assert figures["task_metrics"]["kl_to_truth"] == {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"RECOMMENDED": 1.0},
        dict.fromkeys(TASK.labels, 0.5),
        {**dict.fromkeys(TASK.labels, 0.0), "RECOMMENDED": "1"},
        {**dict.fromkeys(TASK.labels, 0.5), "RECOMMENDED": -0.5},
    ],
)
def test_what_is_no_distribution_over_the_classes_is_refused(wrong: dict[str, Any]) -> None:
    row = {"id": "a", "fields": {"probabilities": {"verdict": wrong}}}
    with pytest.raises(DataError, match="row 'a': probabilities: verdict is not the exact distribution"):
        exact_probabilities(row, TASK)
    # Another mapping of that name is nobody's business.
    assert exact_probabilities({"fields": {"probabilities": {"RECOMMENDED": 1.0}}}, TASK) is None


def test_the_paired_comparison_and_the_section_show_them() -> None:
    figures = evaluate_models({"teacher": predictions(), "student": predictions(3.0)}, TASK)
    own = figures["by_set"]["test"]
    difference = own["student"]["task_comparisons"]["kl_to_truth"]["difference"]
    assert difference["value"] == pytest.approx(
        own["student"]["known_probabilities"]["kl_to_truth"]["value"], abs=1e-6
    )
    view = {name: entry["known_probabilities"] for name, entry in own.items()}
    page = render("sections/known-probabilities.html.j2", view=view, report={})
    assert "Attainable" in page and page.count("<tr") == 3
    assert f"{own['student']['known_probabilities']['kl_to_truth']['value']:.3f}" in page
