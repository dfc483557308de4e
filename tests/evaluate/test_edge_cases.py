"""Edge cases: what is expected of a model on unusual rows, and whether it does so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import mlx_distill as md
from mlx_distill.config import ASSETS
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.edge_cases import (
    EdgeCase,
    edge_case_file,
    edge_case_metrics,
    judge,
    load_edge_cases,
    run_edge_cases,
)
from mlx_distill.infer import predict
from mlx_distill.records import Prediction
from mlx_distill.tasks.task import Task, load_task, parse_task

SONGS = ASSETS / "music" / "edge_cases.jsonl"
ANSWER = {
    "verdict": "ACCEPTABLE",
    "score": 60,
    "themes": ["nature"],
    "sentiment": "neutral",
    "safety": [],
    "emotion": "peace",
    "scripture_references": [],
}


def test_the_packaged_cases_are_many_of_each_kind() -> None:
    cases = load_edge_cases(SONGS)
    kinds = Counter(case.kind for case in cases)
    assert len(cases) >= 60 and min(kinds.values()) >= 10
    assert {"instrumental", "empty", "very_long", "other_scripts", "mixed_messages"} <= kinds.keys()
    assert SONGS.stat().st_size < 60_000
    assert max(len(str(case.row.get("lyrics"))) for case in cases) > 400_000
    assert all(case.why for case in cases)
    assert edge_case_file(load_task("music")) == SONGS


def test_the_errors_are_those_of_inference() -> None:
    from mlx_distill.evaluate import edge_cases

    assert (edge_cases.BAD_ROW, edge_cases.LONG_PROMPT) == (predict.BAD_ROW, predict.LONG_PROMPT)


def prediction(answer: Any = None, **changes: Any) -> Prediction:
    return Prediction("x", "", answer, None, None, **{"prompt_tokens": 500, **changes})


def case(*expect: Any, least: int = 0) -> EdgeCase:
    return EdgeCase("x", "empty", {"title": "T", "lyrics": "L"}, expect, "", least)


def test_what_is_expected_is_judged() -> None:
    music = load_task("music")
    no_verse = {"answer": {"properties": {"scripture_references": {"maxItems": 0}}}}
    refused = {"error": "bad row"}
    assert judge(case(no_verse), prediction(ANSWER), music)["behaved"]
    assert judge(case(no_verse, refused), prediction(error="empty", error_kind="bad row"), music)["behaved"]
    verse = {**ANSWER, "scripture_references": ["Jude 5"]}
    outcome = judge(case(refused, no_verse), prediction(verse), music)
    assert not outcome["behaved"]
    assert "an answer instead of the error 'bad row'" in outcome["reason"]
    assert "scripture_references" in outcome["reason"]
    # An invented verse is never expected.
    invented = prediction({**ANSWER, "scripture_references": ["Romans 655:908"]})
    assert judge(case({"answer": {}}), invented, music)["reason"].endswith("Romans has 16 chapters")
    too_long = judge(case(refused), prediction(error="long", error_kind="prompt too long"), music)
    assert too_long["reason"] == "the error 'prompt too long' instead of the error 'bad row'"


def test_a_text_that_was_shortened_without_a_word_is_noticed() -> None:
    music, anything = load_task("music"), case({"answer": {}}, least=1000)
    assert "without a word" in judge(anything, prediction(ANSWER), music)["reason"]
    assert judge(anything, prediction(ANSWER, cut={"field": "lyrics"}), music)["behaved"]
    assert judge(anything, prediction(ANSWER, prompt_tokens=4000), music)["behaved"]


def test_kinds_have_their_own_rates() -> None:
    outcomes = [
        {"id": str(i), "kind": "empty" if i % 2 else "long", "behaved": i != 3, "did": "answer", "cut": None}
        for i in range(10)
    ]
    figures = edge_case_metrics(outcomes)
    assert (figures["kinds"]["empty"]["value"], figures["kinds"]["empty"]["n"]) == (0.8, 5)
    assert figures["kinds"]["long"]["value"] == 1 and figures["kinds"]["long"]["low"] < 0.6
    assert figures["behaved"]["value"] == 0.9 and [row["id"] for row in figures["rows"]] == ["3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"kind": "k", "expect": [{"answer": {}}]}, "no id"),
        ({"id": "a", "expect": [{"answer": {}}]}, "no kind"),
        ({"id": "a", "kind": "k"}, "no expect"),
        ({"id": "a", "kind": "k", "expect": [{"error": "bad rows"}]}, "no error 'bad rows'"),
        ({"id": "a", "kind": "k", "expect": ["answer"]}, "expect: 'answer'"),
        ({"id": "a", "kind": "k", "expect": [{"answer": {"propertis": {}}}]}, "unknown keyword 'propertis'"),
        (
            {"id": "a", "kind": "k", "expect": [{"answer": {}}], "x": {"text": 1, "repeat": 2}},
            "text or repeat",
        ),
        ({"id": "b", "kind": "k", "expect": [{"answer": {}}]}, "'b' occurs twice"),
    ],
)
def test_lines_that_are_no_case_are_refused(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    good = {"id": "b", "kind": "k", "expect": [{"answer": {}}]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(line))
    with pytest.raises(DataError, match=message) as caught:
        load_edge_cases(path)
    assert "cases.jsonl:2" in caught.value.message and caught.value.fix


def test_a_task_without_cases_says_so() -> None:
    with pytest.raises(ConfigError, match="no edge_cases"):
        edge_case_file(load_task("moderation"))


ASKED = {
    "refuse": {"instrumental-01", "very-long-02", "very-long-06", "markup-01"}
    | {f"empty-{number:02d}" for number in range(1, 14)},
    "cut": {"instrumental-01", "very-long-06"},
}


def small_task() -> Task:
    schema = {
        "type": "object",
        "properties": {"verdict": {"enum": ["RECOMMENDED", "ACCEPTABLE"]}},
        "required": ["verdict"],
    }
    raw = {"name": "t", "system": "", "user": "{title}\n{lyrics}", "schema": schema, "label": "verdict"}
    return parse_task({**raw, "title": "title"}, "t")


@pytest.mark.slow
@pytest.mark.parametrize("long", ["refuse", "cut"])
def test_a_model_is_asked_by_the_path_of_analyze(long: str) -> None:
    """The packaged cases on a tiny untrained model: bad rows are refused, long ones refused or cut, and both
    said; the rest is answered.
    """
    task, model = small_task(), md.load(ASSETS / "models" / "tiny-qwen3")
    cases = [
        EdgeCase(c.id, c.kind, c.row, tuple(_without_fields(one) for one in c.expect), c.why, c.least_tokens)
        for c in load_edge_cases(SONGS)
        if c.id in ASKED[long]
    ]
    outcomes = run_edge_cases(model, task, cases, max_prompt_tokens=300, max_tokens=32, long=long)
    by_id = {outcome["id"]: outcome for outcome in outcomes}
    assert [o["id"] for o in outcomes if not o["behaved"]] == []
    assert long == "cut" or by_id["empty-09"]["did"] == "bad row"
    assert by_id["instrumental-01"]["did"] == "answer"
    huge = by_id["very-long-06"]
    assert huge["did"] == ("prompt too long" if long == "refuse" else "answer")
    assert (huge["cut"] is not None) == (long == "cut")
    assert edge_case_metrics(outcomes)["kinds"]["very_long"]["value"] == 1


def _without_fields(one: Any) -> Any:
    """What is expected of a task with the verdict alone."""
    return {"answer": {}} if "answer" in one else one
