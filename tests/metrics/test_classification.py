"""Classification and agreement metrics on rows whose result is computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlx_distill import metrics
from mlx_distill.errors import DataError
from mlx_distill.metrics import classification as scores
from mlx_distill.metrics.agreement import label_divergence, pair_by_id
from mlx_distill.metrics.intervals import wilson

LABELS = ["a", "b", "c"]


def row(
    id: str,
    truth: str | None,
    predicted: str | None,
    *,
    true_score: float = 50,
    score: float | None = 50,
    **more: Any,
) -> dict[str, Any]:
    """One prediction; ``predicted=None`` is an invalid answer."""
    answer = None if predicted is None else {"kind": predicted, "points": score}
    return {
        "id": id,
        "set": "test",
        "fields": more.pop("fields", {}),
        "title": None,
        "input": f"text of {id}",
        "truth": None if truth is None else {"kind": truth, "points": true_score},
        "text": "{" if predicted is None else "{...}",
        "answer": answer,
        "error": "not JSON" if predicted is None else None,
        "label": predicted,
        "score": None if predicted is None else score,
        "label_probs": None,
        "latency_s": 0.1,
        "prompt_tokens": 10,
        "tokens": 5,
        **more,
    }


def rows(*pairs: tuple[str | None, str | None]) -> list[dict[str, Any]]:
    return [row(str(i), truth, predicted) for i, (truth, predicted) in enumerate(pairs)]


def test_accuracy_counts_an_invalid_answer_as_wrong() -> None:
    result = scores.accuracy(rows(("a", "a"), ("b", "b"), ("b", "c"), ("c", None)), "kind")
    assert result == {"value": 0.5, "low": wilson(2, 4)[0], "high": wilson(2, 4)[1], "n": 4}


def test_accuracy_ignores_the_label_of_an_invalid_answer() -> None:
    invalid = {**row("x", "a", "a"), "answer": None}
    assert scores.accuracy([invalid], "kind")["value"] == 0.0
    assert metrics.verdict_agreement([invalid], [invalid])["value"] == 0.0
    assert scores.confusion_counts([invalid], "kind", ["a"]).false_negative == 1


def test_accuracy_leaves_out_rows_without_a_truth() -> None:
    assert scores.accuracy(rows(("a", "a"), (None, "b")), "kind")["n"] == 1
    assert scores.accuracy(rows((None, "b")), "kind")["value"] is None


def test_confidence_widens_the_interval() -> None:
    data = rows(("a", "a"), ("a", "b"), ("a", "a"))
    wide, narrow = (
        scores.accuracy(data, "kind", confidence=0.99),
        scores.accuracy(data, "kind", confidence=0.8),
    )
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


def test_json_valid() -> None:
    assert scores.json_valid(rows(("a", "a"), ("a", None), ("a", "c"), ("a", "b")))["value"] == 0.75


def test_verdict_agreement_pairs_by_id_and_an_invalid_answer_agrees_with_nothing() -> None:
    teacher = [
        row("1", "a", "a"),
        row("2", "a", "b"),
        row("3", "a", None),
        row("4", "a", "c"),
        row("5", "a", None),
    ]
    model = [
        row("5", "a", None),
        row("4", "a", None),
        row("3", "a", "a"),
        row("2", "a", "b"),
        row("1", "a", "c"),
        row("9", "a", "a"),
    ]
    result = metrics.verdict_agreement(model, teacher)
    assert (result["value"], result["n"]) == (0.2, 5)


def test_agreement_needs_the_same_label_and_a_score_within_the_tolerance() -> None:
    teacher = [row(str(i), "a", "a", score=60) for i in range(5)]
    model = [
        row("0", "a", "a", score=65),  # exactly at the tolerance
        row("1", "a", "a", score=66),
        row("2", "a", "b", score=60),  # another label
        row("3", "a", None),
        row("4", "a", "a", score=None),  # a valid answer without a score
    ]
    assert metrics.agreement(model, teacher, tolerance=5.0)["value"] == 0.2
    assert metrics.agreement(model, teacher, tolerance=6.0)["value"] == 0.4
    assert (
        metrics.agreement(model, teacher, tolerance=None)["value"]
        == metrics.verdict_agreement(model, teacher)["value"]
        == 0.6
    )


def test_agreement_of_fractional_scores_is_not_decided_by_rounding() -> None:
    assert (
        metrics.agreement([row("0", "a", "a", score=0.3)], [row("0", "a", "a", score=0.2)], tolerance=0.1)[
            "value"
        ]
        == 1.0
    )


def test_score_mae_is_against_the_truth_and_score_gap_against_the_teacher() -> None:
    model = [
        row("0", "a", "a", true_score=50, score=40),
        row("1", "a", "b", true_score=50, score=52),
        row("2", "a", None),
    ]
    teacher = [row("0", "a", "a", score=43), row("1", "a", "a", score=51), row("2", "a", "a", score=9)]
    truth, gap = scores.score_mae(model, "points"), metrics.score_gap(model, teacher)
    assert (truth["value"], truth["n"]) == (6.0, 2)
    assert (gap["value"], gap["n"]) == (2.0, 2)
    assert scores.score_mae(model, None)["value"] is None


def test_binary_rates_by_hand() -> None:
    # Positive: b and c. A prediction of the other positive class is a true positive, an invalid answer is
    # wrong whatever the truth is.
    data = rows(
        ("b", "b"),
        ("b", "c"),
        ("c", "a"),
        ("c", None),
        ("a", "a"),
        ("a", "b"),
        ("a", "a"),
        ("a", None),
        ("a", "a"),
    )
    counts = scores.confusion_counts(data, "kind", ["b", "c"])
    assert counts == scores.ConfusionCounts(
        true_positive=2, false_positive=2, true_negative=3, false_negative=2
    )
    assert scores.precision(counts)["value"] == 0.5
    assert scores.recall(counts)["value"] == 0.5
    assert scores.false_positive_rate(counts) == {
        "value": 0.4,
        "low": wilson(2, 5)[0],
        "high": wilson(2, 5)[1],
        "n": 5,
    }
    assert scores.false_negative_rate(counts)["value"] == 0.5
    f1 = scores.f1(counts)
    assert f1["value"] == 0.5
    assert f1["low"] < 0.5 < f1["high"]
    low, high = wilson(2, 6)
    assert (f1["low"], f1["high"]) == pytest.approx((2 * low / (1 + low), 2 * high / (1 + high)))


def test_rates_without_items_are_none() -> None:
    counts = scores.confusion_counts(rows(("a", "a")), "kind", ["b"])
    assert scores.precision(counts)["value"] is None
    assert scores.recall(counts)["value"] is None
    assert scores.f1(counts)["value"] is None


def test_macro_f1_by_hand() -> None:
    # a: 2tp=2, fp=1, fn=1 -> 0.5; b: 2tp=2, fp=0 fn=1 -> 2/3; c occurs in one answer alone -> 0
    data = rows(("a", "a"), ("a", "c"), ("b", "b"), ("b", "a"))
    assert scores.macro_f1(data, "kind", LABELS)["value"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert scores.macro_f1(data, "kind", [*LABELS, "unused"])["value"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)


def test_macro_f1_by_clusters_and_over_fixed_classes() -> None:
    one = [("a", "a")] * 5 + [("b", "b")] * 2 + [("b", "a")]
    data = rows(*one * 6)
    plain = scores.macro_f1(data, "kind", LABELS)
    alike = scores.macro_f1(data, "kind", LABELS, clusters=[i % 8 for i in range(48)])
    assert plain["classes"] == alike["classes"] == ["a", "b"]
    assert alike["value"] == plain["value"] and alike["high"] - alike["low"] > plain["high"] - plain["low"]
    # A class with a single row is missing in a third of the resamples, and then counts 0 there.
    rare = scores.macro_f1(rows(*[("a", "a")] * 30, ("c", "c")), "kind", LABELS)
    assert (rare["value"], rare["low"], rare["classes"]) == (1.0, 0.5, ["a", "c"])
    with pytest.raises(DataError, match="1 clusters of 48 rows"):
        scores.macro_f1(data, "kind", LABELS, clusters=["x"])


def test_interval_of_macro_f1_equals_resampling_the_rows() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    predicted = np.where(rng.random(80) < 0.7, truth, predicted)
    data = rows(*[("pn"[t], "pn"[s]) for t, s in zip(truth, predicted, strict=True)])
    fast = scores.macro_f1(data, "kind", ["p", "n"])
    assert fast == scores.macro_f1(data, "kind", ["p", "n"])
    resampled = []
    for _ in range(4_000):
        index = rng.integers(0, 80, 80)
        masks = [(truth[index] == label, predicted[index] == label) for label in (0, 1)]
        resampled.append(np.mean([2 * np.sum(t & s) / (np.sum(t) + np.sum(s)) for t, s in masks]))
    assert (fast["low"], fast["high"]) == pytest.approx(
        tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.015
    )


def test_f1_has_a_width_when_all_are_correct_or_wrong() -> None:
    for predicted, value in (("a", 1.0), ("b", 0.0)):
        data = rows(*[("a", predicted)] * 20)
        for estimate in (
            scores.macro_f1(data, "kind", LABELS),
            scores.f1(scores.confusion_counts(data, "kind", ["a"])),
        ):
            assert estimate["value"] == value
            assert estimate["high"] - estimate["low"] > 0.05


def test_interval_of_f1_has_its_nominal_coverage() -> None:
    rng, inside = np.random.default_rng(5), []
    for _ in range(1_500):
        tp, fp, fn, tn = (int(x) for x in rng.multinomial(100, [0.3, 0.08, 0.06, 0.56]))
        estimate = scores.f1(scores.ConfusionCounts(tp, fp, tn, fn))
        inside.append(estimate["low"] <= 0.6 / 0.74 <= estimate["high"])
    assert 0.93 <= np.mean(inside) <= 0.97


def test_confusion_rows_are_truth_and_the_last_column_is_invalid() -> None:
    data = rows(("a", "a"), ("a", "b"), ("b", None), ("b", "zzz"), (None, "a"), ("c", "a"))
    assert scores.confusion(data, "kind", LABELS) == {
        "labels": LABELS,
        "counts": [[1, 1, 0, 0], [0, 0, 0, 2], [1, 0, 0, 0]],
        "n": 5,
        "left_out": 1,
    }


def test_teacher_confusion_has_a_row_for_each_label_of_the_teacher() -> None:
    model, teacher = rows(("c", "a"), ("c", "b"), ("c", "b")), rows(("c", "b"), ("c", "b"), ("c", None))
    result = metrics.teacher_confusion(model, teacher, "kind", LABELS)
    assert result["counts"] == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert (result["n"], result["left_out"]) == (2, 1)


def test_slices_group_by_a_field_of_the_row() -> None:
    model = [
        row("0", "a", "a", fields={"genre": "x"}),
        row("1", "a", "b", fields={"genre": "x"}),
        row("2", "a", "a", fields={}),
    ]
    teacher = [row("0", "a", "a"), row("1", "a", "b"), row("2", "a", "b")]
    result = metrics.by_slice(model, teacher, "kind", ["genre"])["genre"]
    assert list(result) == ["(none)", "x"]
    assert (
        result["x"]["n"],
        result["x"]["accuracy"]["value"],
        result["x"]["verdict_agreement"]["value"],
    ) == (2, 0.5, 1.0)
    assert result["(none)"]["verdict_agreement"]["value"] == 0.0
    assert metrics.by_slice(model, None, "kind", ["genre"])["genre"]["x"]["verdict_agreement"] is None


def test_label_divergence_by_hand_and_its_properties() -> None:
    p, q = {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 0.2, "b": 0.5, "c": 0.3}
    assert label_divergence(p, q, LABELS) == pytest.approx(
        0.7 * math.log(3.5) + 0.2 * math.log(0.4) + 0.1 * math.log(1 / 3)
    )
    assert label_divergence(p, p, LABELS) == 0.0
    assert label_divergence({"a": 7, "b": 2, "c": 1}, q, LABELS) == pytest.approx(
        label_divergence(p, q, LABELS)
    )
    assert 10 < label_divergence({"a": 1.0}, {"b": 1.0}, LABELS) < 30  # finite where a probability is zero


def test_label_kl_is_the_mean_over_pairs_that_have_distributions() -> None:
    p, q = {"a": 0.5, "b": 0.5}, {"a": 0.75, "b": 0.25}
    teacher = [row(str(i), "a", "a", label_probs=p) for i in range(3)]
    model = [row("0", "a", "a", label_probs=q), row("1", "a", "a", label_probs=p), row("2", "a", "a")]
    result = metrics.label_kl(model, teacher, ["a", "b"])
    assert result["n"] == 2
    assert result["value"] == pytest.approx((0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2)


def test_disagreements_are_sorted_by_distance() -> None:
    p, near, far = {"a": 0.9, "b": 0.1}, {"a": 0.45, "b": 0.55}, {"a": 0.01, "b": 0.99}
    teacher = [row(str(i), "a", "a", score=50, label_probs=p) for i in range(4)]
    model = [
        row("0", "a", "a", score=90, label_probs=p),  # same label: not among them, whatever the score
        row("1", "a", "b", score=50, label_probs=near, title="One"),
        row("2", "a", "b", score=20, label_probs=far),
        row("3", "a", None, label_probs=None),
    ]
    result = metrics.disagreements(model, teacher, ["a", "b"], ["kind", "points"])
    assert [item["id"] for item in result] == ["2", "1", "3"]
    assert result[0]["differs"] == ["kind", "points"]
    assert result[1]["differs"] == ["kind"]
    assert (result[1]["title"], result[1]["input"], result[1]["truth"]["kind"]) == ("One", "text of 1", "a")
    assert (result[1]["teacher"]["label"], result[1]["model"]["label"]) == ("a", "b")
    assert (result[2]["model"]["text"], result[2]["model"]["error"]) == ("{", "not JSON")
    assert "text" not in result[1]["model"]
    assert len(metrics.disagreements(model, teacher, ["a", "b"], ["kind"], limit=1)) == 1


def test_accuracy_gain_pairs_the_rows() -> None:
    model = rows(("a", "a"), ("a", "a"), ("a", "b"), ("a", None), (None, "a"))
    teacher = rows(("a", "a"), ("a", "b"), ("a", "a"), ("a", "c"), (None, "a"))
    result = metrics.accuracy_gain(model, teacher, "kind")
    assert result is not None
    assert (result["both"], result["first_only"], result["second_only"], result["neither"]) == (1, 1, 1, 1)
    assert result["difference"]["n"] == 4


def test_agreement_gain_is_paired_over_three_models() -> None:
    teacher = rows(("a", "a"), ("a", "b"), ("a", "c"))
    before, after = rows(("a", "b"), ("a", "b"), ("a", "a")), rows(("a", "a"), ("a", "b"), ("a", "c"))
    result = metrics.agreement_gain(after, before, teacher)
    assert result is not None
    assert result["difference"]["value"] == pytest.approx(2 / 3)
    assert (result["both"], result["first_only"], result["second_only"]) == (1, 2, 0)


def test_latency_median_tail_and_throughput() -> None:
    data = [{"latency_s": t, "tokens": 20} for t in [0.1] * 18 + [1.1, 2.1]]
    result = scores.latency(data)
    assert result["latency_s"] == pytest.approx(0.1)
    assert result["latency_p95_s"] == pytest.approx(float(np.quantile([0.1] * 18 + [1.1, 2.1], 0.95)))
    assert result["items_per_minute"] == pytest.approx(60 * 20 / 5.0)
    assert result["tokens_per_second"] == pytest.approx(400 / 5.0)


def test_latency_of_rows_without_times_is_none() -> None:
    assert set(scores.latency([{"latency_s": 0.0, "tokens": 3}]).values()) == {None}
    assert set(scores.latency([]).values()) == {None}


def test_a_repeated_id_is_an_error() -> None:
    twice = rows(("a", "a")) * 2
    with pytest.raises(DataError, match="'0' occurs twice"):
        pair_by_id(rows(("a", "a")), twice)
    with pytest.raises(DataError, match="occurs twice"):
        pair_by_id(twice, rows(("a", "a")))
