"""Metrics by name: values by hand, values of libraries, your own functions, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.predictions import prediction as row
from helpers.predictions import tone, tone_task

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate import text_metrics
from mlx_distill.evaluate.latency import latency_quantile
from mlx_distill.evaluate.multilabel import multilabel_f1
from mlx_distill.evaluate.registry import METRICS, compare_by, measure, metric_named, task_metrics
from mlx_distill.evaluate.row_metrics import find_metric

ROWS = [
    row(0, tone("dark", 80, "a", "b", note="the red door"), tone("dark", 70, "B", "c", note="The red door.")),
    row(1, tone("light", 20, "a", note="sea"), tone("dark", 20, "a", note="")),
    row(2, tone("light", 30, note="hope and grief"), tone("light", 30, note="grief")),
    row(3, tone("dark", 90, "b", note="a long way"), None),
]


def value(spec: Any, rows: Any = ROWS) -> Any:
    (metric,) = task_metrics(tone_task(metrics=[spec]))
    (figure,) = measure([metric], rows).values()
    return figure["value"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("accuracy", 2 / 4),
        ("precision", 1 / 2),
        ("recall", 1 / 2),
        ("f1", 1 / 2),
        ({"metric": "f1", "positive": "light"}, 1 / 2),  # row 3 is wrong, and so a false positive of light
        ("score_mae", (10 + 0 + 0 + 90) / 4),
        ("exact_match", 0.0),
        ("json_valid", 3 / 4),
        ({"metric": "list_f1", "field": "themes"}, 2 * 2 / (2 * 2 + 1 + 2)),
        ({"metric": "list_f1", "field": "themes", "average": "macro"}, (2 / 3 + 2 / 3 + 0) / 3),
        ({"metric": "list_f1", "field": "themes", "average": "samples"}, (1 / 2 + 1 + 1 + 0) / 4),
        ({"metric": "field_accuracy", "field": "themes"}, 2 / 4),
        ({"metric": "completeness", "field": "themes"}, 2 / 4),
        ({"metric": "completeness", "field": "themes", "expected": True}, 2 / 3),
        ({"metric": "contains", "field": "note"}, 1 / 4),
        ({"metric": "contains", "field": "themes"}, 2 / 4),
    ],
)
def test_values_by_hand(spec: Any, expected: float) -> None:
    assert value(spec) == pytest.approx(expected)


def test_every_metric_has_its_options_checked_and_a_figure() -> None:
    fields = {"list_f1": "themes", "field_accuracy": "themes", "completeness": "themes", "contains": "note"}
    fields |= {"rouge": "note", "bleu": "note"}
    for name in METRICS:
        options = {"field": fields[name]} if name in fields else {}
        (metric,) = task_metrics(tone_task(metrics=[{"metric": name, **options}]))
        assert metric.figure(ROWS, 0.95), name
        assert metric.figure([], 0.95) is not None, name
        if metric.values is not None:
            assert len(metric.values(ROWS)) == len(ROWS)
            exact = name in ("kl_to_truth", "expected_accuracy")  # of rows with exact probabilities
            assert metric.values([ROWS[3]])[0] in ((None,) if exact else (0, 90))  # the worst, or wrong


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", "metrics: acuracy: no such metric"),
        ("list_f1", "list_f1: field is missing"),
        ({"metric": "list_f1", "field": "theme"}, "no field 'theme'"),
        ({"metric": "list_f1", "field": "themes", "averge": "macro"}, "unknown option 'averge'"),
        ({"metric": "list_f1", "field": "themes", "average": "weighted"}, "average: 'weighted'"),
        ({"metric": "accuracy", "field": "tone"}, "unknown option 'field'"),
        ({"metric": "f1", "positive": "drak"}, "positive: 'drak' is no class"),
        ({"metric": "latency", "quantile": 95}, "quantile: 95"),
        ({"metric": "bleu", "field": "note", "tokenize": "14a"}, "no tokenizer '14a'"),
        ("no_such_module:rhyme", "the module 'no_such_module' cannot be imported"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        task_metrics(tone_task(metrics=[spec]))
    assert caught.value.fix


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="'accuracy' twice"):
        task_metrics(tone_task(metrics=["accuracy", {"metric": "exact_match", "name": "accuracy"}]))


def test_multilabel_f1_is_that_of_the_counts_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(40):
        rows = []
        for i in range(60):
            truth = [name for name in "abc" if rng.random() < 0.5]
            answer = [name for name in "abc" if (name in truth) != (rng.random() < 0.2)]
            rows.append(row(i, tone("dark", 1, *truth), tone("dark", 1, *answer)))
        estimate = multilabel_f1(rows, "themes", "micro", resamples=300, seed=seed)
        covered += estimate["low"] <= 0.8 <= estimate["high"]
    assert 34 <= covered <= 40  # F1 of labels of prevalence 1/2 that are right with 0.8 is 0.8


def test_rouge_and_bleu_are_those_of_their_libraries() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    pairs = [
        ("the cat sat on the mat", "the cat is on the mat"),
        ("a dog", "a big brown dog ran"),
        ("", "x y"),
    ]
    rows = [
        row(i, tone("dark", note=truth), tone("dark", note=text)) for i, (text, truth) in enumerate(pairs)
    ]
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([kind])
        expected = np.mean([scorer.score(truth, text)[kind].fmeasure for text, truth in pairs])
        assert value({"metric": "rouge", "field": "note", "type": kind}, rows) == pytest.approx(expected)
    expected = corpus_bleu([text for text, _ in pairs], [[truth for _, truth in pairs]]).score / 100
    assert value({"metric": "bleu", "field": "note"}, rows) == pytest.approx(expected)


def test_rouge_reads_words_of_other_scripts() -> None:
    assert text_metrics.rouge("rouge1")("красная дверь", "Красная дверь!") == 1.0
    assert text_metrics.rouge("rouge1", stem=True)("doors opened", "door opening") == 1.0


def test_a_library_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="rouge needs rouge-score") as caught:
        task_metrics(tone_task(metrics=[{"metric": "rouge", "field": "note"}]))
    assert "mlx-distill[text-metrics]" in (caught.value.fix or "")


def test_latency_has_the_interval_of_order_statistics() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rows = [{"latency_s": float(seconds)} for seconds in rng.exponential(1.0, 80)]
        estimate = latency_quantile(rows, 0.5)
        covered += estimate["low"] <= np.log(2) <= estimate["high"]
    assert covered >= 184  # 190 expected
    assert latency_quantile([{"latency_s": 1.0}, {"latency_s": 2.0}], 0.95)["high"] is None


OWN = """
def rhymes(rows, letters=1):
    def ending(answer):
        return answer["note"][-letters:]

    return [row["truth"] and ending(row["answer"]) == ending(row["truth"]) for row in rows]

def broken(rows):
    return [1.0]

def too_high(rows):
    return [2.0 for row in rows]

def fails(rows):
    return [row["missing"] for row in rows]
"""


def test_a_function_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "own_metrics.py").write_text(OWN, encoding="utf-8")

    def metric(spec: Any) -> Any:
        return task_metrics(replace(tone_task(metrics=[spec]), folders=(str(tmp_path),)))[0]

    rhymes = metric({"metric": "own_metrics:rhymes", "name": "rhyme", "letters": 2})
    assert rhymes.name == "rhyme"
    assert rhymes.values is not None
    rows = [
        row(i, tone("dark", note="a door"), tone("dark", note=end)) for i, end in enumerate(("floor", "x"))
    ]
    rows += [row(2, tone("dark", note="a door"), None), row(3, None, tone("dark"))]
    assert list(rhymes.values(rows)) == [1.0, 0.0, 0.0, None]  # an invalid answer is wrong
    assert rhymes.figure(rows, 0.95)["value"] == pytest.approx(1 / 3)
    better = [{**one, "answer": tone("dark", note="a door")} for one in rows[:3]]
    comparison = compare_by(rhymes, better, rows[:3])
    assert comparison is not None
    assert (comparison["first_only"], comparison["difference"]["value"]) == (2, pytest.approx(2 / 3))
    for name, error in (("broken", "1 values for"), ("too_high", "2.0 for row '0'"), ("fails", "KeyError")):
        with pytest.raises(DataError, match=error):
            metric(f"own_metrics:{name}").figure(rows, 0.95)
    with pytest.raises(ConfigError, match="own_metrics has no function 'rhyme'"):
        metric("own_metrics:rhyme")


def test_a_comparison_by_a_metric_takes_clusters() -> None:
    rows = [
        row(i, tone("dark"), tone("dark" if i % 3 else "light"), fields={"artist": i // 4}) for i in range(40)
    ]
    other = [{**one, "answer": tone("light"), "label": "light"} for one in rows]
    accuracy = metric_named(tone_task(), "accuracy")
    plain, clustered = compare_by(accuracy, rows, other), compare_by(accuracy, rows, other, cluster="artist")
    assert plain is not None and clustered is not None
    assert (plain["clusters"], clustered["clusters"], clustered["few_clusters"]) == (None, 10, True)
    assert plain["difference"]["value"] == clustered["difference"]["value"]


def test_compare_finds_the_metrics_that_a_task_names() -> None:
    own = tone_task(
        metrics=[{"metric": "list_f1", "field": "themes", "average": "samples", "name": "theme_f1"}]
    )
    metric = find_metric(own, "theme_f1")
    assert [metric.value(one) for one in ROWS] == [0.5, 1.0, 1.0, 0.0]
    assert (metric.binary, metric.unit, metric.higher_is_better) == (False, "rate", True)
    assert find_metric(tone_task(metrics=["score_mae"]), "score_mae").higher_is_better is False
    with pytest.raises(ConfigError, match="theme_f1"):
        find_metric(tone_task(), "theme_f1")
