"""One suite over any number of models: the same rows, and invalid answers are wrong everywhere."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers.predictions import prediction as row
from helpers.predictions import tone, tone_task

from mlx_distill.errors import DataError
from mlx_distill.evaluate.suite import check_same_rows, evaluate_models


def test_models_that_answered_other_rows_are_refused_with_counts_and_examples() -> None:
    rows = [row(i, tone("dark"), tone("dark")) for i in range(8)]
    with pytest.raises(DataError, match=r"3 of 8 rows of a are not in b \('0', '1', '2'\)"):
        evaluate_models({"a": rows, "b": rows[3:]}, tone_task())
    with pytest.raises(DataError, match=r"5 of 8 rows of a are not in c \('0', '1', '2', ...\), 1 of 4"):
        evaluate_models({"a": rows, "c": [*rows[5:], row(99, None, None)]}, tone_task())
    with pytest.raises(DataError, match="id '3' occurs twice"):
        check_same_rows({"a": [*rows, rows[3]]})
    with pytest.raises(DataError, match="row '2' has other true answers"):
        check_same_rows({"a": rows, "b": [*rows[:2], row(2, tone("light"), None), *rows[3:]]})


def test_the_order_of_rows_changes_nothing() -> None:
    a = [row(i, tone("dark" if i % 3 else "light", i), tone("dark", 2 * i)) for i in range(12)]
    b = [{**one, "answer": tone("light", 3), "label": "light", "score": 3} for one in a]
    first = evaluate_models({"teacher": a, "student": b}, tone_task())
    again = evaluate_models({"teacher": a[::-1], "student": b[5:] + b[:5]}, tone_task())
    for name in ("teacher", "student"):
        ours, theirs = (result["by_set"]["test"][name] for result in (first, again))
        for key in ("accuracy", "f1", "macro_f1", "confusion", "score_mae", "agreement", "counts"):
            assert ours[key] == theirs[key] or ours[key] == pytest.approx(theirs[key]), key
    assert first["comparisons"] == again["comparisons"]


def test_an_invalid_answer_is_wrong_in_every_figure() -> None:
    lists = [
        {"metric": "list_f1", "field": "themes", "average": kind} for kind in ("micro", "macro", "samples")
    ]
    fields = [{"metric": kind, "field": "themes"} for kind in ("field_accuracy", "completeness", "contains")]
    own = tone_task(
        score_threshold=60,
        metrics=["accuracy", "f1", "macro_f1", "score_mae", "exact_match", *lists, *fields],
    )
    truths = [tone("dark", 90, "a"), tone("light", 10, "b"), tone("dark", 70, "a", "b")]
    rows = [row(i, truth, truth) for i, truth in enumerate(truths)]
    broken = [{**rows[0], "answer": None}, {**rows[1], "answer": None}, rows[2]]
    result = evaluate_models({"whole": rows, "broken": broken}, own, reference=None)["by_set"]["test"]
    whole, part = result["whole"], result["broken"]
    for key in ("accuracy", "macro_f1", "precision", "recall", "f1", "json_valid", "exact_match"):
        assert (whole[key]["value"], part[key]["value"] < 1) == (1.0, True), key
    for key in ("false_positive_rate", "false_negative_rate"):
        assert (whole[key]["value"], part[key]["value"] > 0) == (0.0, True), key
    for key in ("accuracy", "precision", "recall", "f1"):
        assert (whole["at_threshold"][key]["value"], part["at_threshold"][key]["value"] < 1) == (1.0, True)
    assert (whole["score_mae"], part["score_mae"]) == (0.0, pytest.approx((90 + 90 + 0) / 3))
    for name, figure in whole["task_metrics"].items():
        value = part["task_metrics"][name]["value"]
        if name == "score_mae":
            assert (figure["value"], value) == (0.0, part["score_mae"])
        else:
            assert (figure["value"], value < 1) == (1.0, True), name


def test_a_threshold_on_the_score_has_figures_of_its_own() -> None:
    pairs = [(97, 96), (99, 50), (40, 98), (95, 95), (94, 10)]  # answer, truth
    rows = [row(i, tone("dark", truth), tone("dark", given)) for i, (given, truth) in enumerate(pairs)]
    figures = evaluate_models({"m": rows}, tone_task(score_threshold=95))["by_set"]["test"]["m"][
        "at_threshold"
    ]
    assert figures["threshold"] == 95
    assert list(figures["counts"].values()) == [2, 1, 1, 1]  # TP, FP, TN, FN
    assert figures["accuracy"]["value"] == 0.6
    for key in ("precision", "recall", "f1"):
        assert figures[key]["value"] == pytest.approx(2 / 3)
    assert evaluate_models({"m": rows}, tone_task())["by_set"]["test"]["m"]["at_threshold"] is None


def test_the_teacher_is_compared_with_itself_before() -> None:
    before = [row(i, tone("dark"), tone("light")) for i in range(6)]
    after = [row(i, tone("dark"), tone("dark")) for i in range(6)]
    (result,) = evaluate_models({"teacher_before": before, "teacher": after}, tone_task())["comparisons"]
    names = (result["first"], result["second"], result["difference"]["value"])
    assert names == ("teacher", "teacher_before", 1.0)


@pytest.mark.parametrize("changes", [{}, {"label": None, "positive": []}])
def test_rows_of_one_cluster_are_not_independent(changes: dict[str, object]) -> None:
    songs = [(artist, song) for artist in range(30) for song in range(5)]
    fields = [{"artist": f"a{artist}"} for artist, _ in songs]
    right = [artist % 4 != 0 for artist, _ in songs]  # all songs of an artist are right, or none
    before = [row(i, tone("dark"), tone("light"), fields=own) for i, own in enumerate(fields)]
    after = [
        row(i, tone("dark"), tone("dark" if hit else "light"), fields=own)
        for i, (hit, own) in enumerate(zip(right, fields, strict=True))
    ]
    models = {"teacher_before": before, "teacher": after}
    (plain,) = evaluate_models(models, tone_task(**changes))["comparisons"]
    (clustered,) = evaluate_models(models, tone_task(cluster="artist", **changes))["comparisons"]
    widths = [one["difference"]["high"] - one["difference"]["low"] for one in (plain, clustered)]
    assert (plain["clusters"], clustered["clusters"]) == (None, 30)
    assert widths[1] > 1.7 * widths[0]  # sqrt(5) times for equal clusters of 5


def estimates_of(figures: Any, name: str = "") -> dict[str, Any]:
    """Every estimate among figures, by its path."""
    if not isinstance(figures, dict):
        return {}
    if {"value", "low", "high"} <= set(figures):
        return {name: figures}
    parts = [estimates_of(value, f"{name}.{key}".strip(".")) for key, value in figures.items()]
    return {path: estimate for part in parts for path, estimate in part.items()}


@pytest.mark.parametrize("changes", [{}, {"label": None, "positive": []}])
def test_the_figures_of_a_model_have_the_intervals_of_clusters(changes: dict[str, Any]) -> None:
    rng = random.Random(0)
    kinds = ("micro", "macro", "samples")
    lists = [{"metric": "list_f1", "field": "themes", "average": kind} for kind in kinds]
    metrics = ["score_mae", "exact_match", *lists]
    category = {"far": {"answer": {"points": {"at_least": 50}}}}
    own = {"score_threshold": 50, "slices": ["genre"], "metrics": metrics, "error_categories": category}
    teacher, student = [], []
    for artist in range(40):  # one song's answers, five times
        truth = tone(rng.choice(["light", "dark"]), rng.randrange(101), rng.choice("ab"))
        right = rng.random() < 0.7
        answer = truth if right else tone(rng.choice(["light", "dark"]), rng.randrange(101), "a", note="c")
        if rng.random() < 0.1:
            answer = None
        fields = {"artist": f"a{artist}", "genre": "folk" if artist % 2 else "jazz"}
        likely = {"light": 0.9 if right else 0.2, "dark": 0.1 if right else 0.8}
        for song in range(5):
            more = {"fields": fields, "label_probs": likely, "latency_s": 0.0}
            student.append(row(5 * artist + song, truth, answer, **more))
            teacher.append(row(5 * artist + song, truth, truth, **{**more, "label_probs": {"light": 0.6}}))
    models = {"teacher": teacher, "student": student}
    plain, clustered = (
        estimates_of(
            evaluate_models(models, tone_task(**own, **more, **changes))["by_set"]["test"]["student"]
        )
        for more in ({}, {"cluster": "artist"})
    )
    assert plain.keys() == clustered.keys()
    assert not any("clusters" in estimate for estimate in plain.values())
    checked = 0
    for name, estimate in plain.items():
        if estimate["low"] is None or "difference" in name:
            continue
        widths = [one["high"] - one["low"] for one in (estimate, clustered[name])]
        assert clustered[name]["value"] == pytest.approx(estimate["value"]), name
        assert widths[1] > 1.5 * widths[0], name  # sqrt(5) times, less where an end is near 0 or 1
        checked += 1
    assert checked >= 24


def test_a_slice_that_a_set_does_not_have_is_no_slice_of_it() -> None:
    own = tone_task(slices=["genre", "hard_case"])
    rows = [row(i, tone("dark"), tone("dark"), fields={"genre": "folk"}) for i in range(4)]
    rows += [
        row(i, tone("dark"), tone("dark"), set="written", fields={"genre": "folk", "hard_case": kind})
        for i, kind in enumerate(["irony", None])
    ]
    by_set = evaluate_models({"student": rows}, own)["by_set"]
    assert list(by_set["test"]["student"]["by_slice"]) == ["genre"]
    assert list(by_set["written"]["student"]["by_slice"]["hard_case"]) == ["(none)", "irony"]
