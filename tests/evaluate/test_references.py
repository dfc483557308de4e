"""Checkers of answers' fields, and the rates of invalid claims."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.references import answer_values, reference_metrics
from mlx_distill.tasks.task import Task, load_task, parse_task

SCHEMA = {
    "type": "object",
    "properties": {
        "verses": {"type": "array", "items": {"type": "string"}},
        "themes": {"type": "array", "items": {"type": "string", "enum": ["hope", "grief"]}},
        "note": {"type": "string"},
    },
}


def task(**references: Any) -> Task:
    raw = {"name": "t", "system": "", "user": "{lyrics}", "schema": SCHEMA, "references": references}
    return parse_task(raw, "t")


def row(number: int, answer: Mapping[str, Any] | None, text: str = "", **fields: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "set": "test",
        "title": f"Song {number}",
        "answer": answer,
        "text": text or json.dumps(answer),
        "fields": fields,
        "input": "So he ran to meet him, as in Luke 15:20.",
    }


def test_claims_and_answers_have_their_own_rates() -> None:
    rows = [
        row(0, {"verses": ["Romans 8:28"]}),
        row(1, {"verses": ["Romans 655:908", "Luke 15:20"]}),
        row(2, {"verses": []}),
        row(3, {"verses": ["the prodigal son"]}),
        row(4, None, "no JSON"),
        row(5, None, '{"verses": ["Jude 2:1"], "more": 1}'),  # does not fit a schema, and can be read
    ]
    figures = reference_metrics(rows, task(verses={"kind": "scripture"}))
    assert figures["unreadable_answers"] == 1
    field = figures["references"]["verses"]
    assert (field["claims"], field["valid"], field["invalid"], field["not_checkable"]) == (5, 2, 2, 1)
    assert (field["answers"], field["answers_with_claims"]) == (5, 4)
    assert figures["hallucination_rate"] == field["per_claim"]
    assert (field["per_claim"]["value"], field["per_claim"]["n"]) == (0.5, 4)
    assert (figures["hallucinated_answers"]["value"], figures["hallucinated_answers"]["n"]) == (0.4, 5)
    assert [entry["id"] for entry in field["rows"]] == ["r1", "r5"]
    (claim,) = field["rows"][0]["claims"]
    assert claim["text"] == "Romans 655:908" and claim["reason"] == "Romans has 16 chapters"
    json.dumps(figures)


def test_exactly_the_seven_planted_references_are_found() -> None:
    planted = {3: "Romans 17:1", 11: "Hezekiah 2:4", 19: "John 3:18-16", 23: "Psalm 152", 31: "Jude 27"}
    planted |= {47: "2 Opinions 1:1", 59: "Mark 0:3"}
    rows = [row(i, {"verses": ["Psalm 23:1", planted.get(i, "1 John 4:8")]}) for i in range(60)]
    field = reference_metrics(rows, task(verses={"kind": "scripture"}))["references"]["verses"]
    assert [entry["id"] for entry in field["rows"]] == [f"r{i}" for i in planted]
    assert field["invalid"] == 7 and field["per_claim"]["n"] == 120


def test_none_of_n_has_an_upper_limit() -> None:
    rows = [row(i, {"verses": ["Psalm 23:1", "Psalm 23:2"]}) for i in range(50)]
    figures = reference_metrics(rows, task(verses={"kind": "scripture"}))
    # 50 answers tell as much as 50 claims, not as 100: what one answer claims is not independent.
    assert figures["hallucination_rate"]["value"] == 0
    assert figures["hallucination_rate"]["high"] == pytest.approx(3.8415 / (50 + 3.8415), abs=1e-4)
    nothing = reference_metrics([row(0, {"verses": []})], task(verses={"kind": "scripture"}))
    assert nothing["hallucination_rate"]["value"] is None


def test_a_vocabulary_is_the_enum_or_a_list() -> None:
    rows = [row(0, None, '{"themes": ["hope", "grieve", "faith"]}')]
    for references in (
        {"kind": "vocabulary"},
        "vocabulary",
        {"kind": "vocabulary", "list": ["hope", "grief"]},
    ):
        field = reference_metrics(rows, task(themes=references))["references"]["themes"]
        reasons = [claim["reason"] for claim in field["rows"][0]["claims"]]
        assert reasons == ["not in the list; did you mean 'grief'?", "not in the list"]
        assert field["valid"] == 1


def test_the_enum_of_an_open_field_is_still_its_vocabulary() -> None:
    music = load_task({"name": "music", "open": ["themes"]})
    answer = {"themes": ["faith", "unicorns"], "scripture_references": ["Romans 655:908"]}
    figures = reference_metrics([row(0, answer)], music)
    assert figures["references"]["themes"]["invalid"] == 1
    assert figures["references"]["scripture_references"]["invalid"] == 1
    assert (figures["hallucination_rate"]["value"], figures["hallucination_rate"]["n"]) == (2 / 3, 3)


def test_support_is_reported_apart() -> None:
    rows = [row(0, {"verses": ["Luke 15:20", "Lk 15:20", "Psalm 23", "ran to MEET him!"]}, mood="sad")]
    figures = reference_metrics(rows, task(verses=[{"kind": "scripture"}, {"kind": "support"}]))
    support = figures["references"]["verses"]["support"]
    assert (support["supported"]["value"], support["supported"]["n"]) == (0.75, 4)
    assert [claim["text"] for claim in support["rows"][0]["claims"]] == ["Psalm 23"]
    assert figures["hallucination_rate"]["value"] == 0  # unsupported is not invalid
    alone = reference_metrics(rows, task(verses={"kind": "support", "in": ["mood", "lyrics"]}))
    assert "hallucination_rate" not in alone
    assert alone["references"]["verses"]["support"]["supported"]["value"] == 0.75
    assert (
        reference_metrics(rows, task(verses={"kind": "support", "in": "mood"}))["references"]["verses"][
            "support"
        ]["supported"]["value"]
        == 0
    )
    with pytest.raises(ConfigError, match="no such field") as caught:
        reference_metrics(rows, task(verses={"kind": "support", "in": ["moode"]}))
    assert "did you mean 'mood'?" in (caught.value.fix or "")


def test_references_in_running_text() -> None:
    rows = [
        row(0, {"note": "It leans on John 3:16 and on Romans 77:1, at 10:30."}),
        row(1, {"note": "Jude 99"}),
    ]
    field = reference_metrics(rows, task(note={"kind": "scripture"}))["references"]["note"]
    assert (field["claims"], field["valid"], field["invalid"]) == (3, 1, 2)
    (claim,) = field["rows"][0]["claims"]
    assert rows[0]["answer"]["note"][claim["start"] : claim["end"]] == "Romans 77:1"


def test_an_own_function_judges(tmp_path: Path) -> None:
    (tmp_path / "own_checks.py").write_text(
        "def short(value, row):\n"
        "    return [{'text': v, 'verdict': 'valid' if len(v) < 4 else 'invalid', 'reason': row['id']}"
        " for v in value]\n"
        "def broken(value, row):\n    return [{'text': 'x', 'verdict': 'maybe'}]\n"
        "def failing(value, row):\n    return 1 / 0\n"
    )
    raw = {"name": "t", "system": "", "user": "{lyrics}", "schema": SCHEMA}
    for function, message in (("broken", "is no claim"), ("failing", "row 'r0'"), ("shirt", "no function")):
        (tmp_path / "task.yaml").write_text(
            json.dumps({**raw, "references": {"verses": f"own_checks:{function}"}})
        )
        with pytest.raises((ConfigError, DataError), match=message):
            reference_metrics([row(0, {"verses": ["a"]})], load_task("task.yaml", tmp_path))
    (tmp_path / "task.yaml").write_text(json.dumps({**raw, "references": {"verses": "own_checks:short"}}))
    figures = reference_metrics([row(0, {"verses": ["abc", "abcd"]})], load_task("task.yaml", tmp_path))
    assert figures["references"]["verses"]["invalid"] == 1
    assert figures["references"]["verses"]["reasons"] == [{"reason": "r0", "count": 1}]
    with pytest.raises(ConfigError, match="'nowhere_at_all' cannot be imported"):
        reference_metrics([row(0, {"verses": []})], task(verses="nowhere_at_all:f"))


def test_the_rate_is_corrected_by_a_sample_that_people_checked(tmp_path: Path) -> None:
    sample = [{"id": "r0", "claim": "Romans 655:908", "verdict": "invalid"}] * 9
    sample += [{"id": "r0", "claim": "Luke 15:20", "verdict": "invalid"}]  # exists, and is not meant
    sample += [{"id": "r0", "claim": "Luke 15:20", "verdict": "valid"}] * 40
    sample += [{"id": "r0", "claim": "the prodigal son", "verdict": "valid"}]  # the checker says nothing
    (tmp_path / "checked.jsonl").write_text("\n".join(map(json.dumps, sample)))
    references = {"verses": {"kind": "scripture", "checked": "checked.jsonl"}}
    raw = {"name": "t", "system": "", "user": "{lyrics}", "schema": SCHEMA, "references": references}
    (tmp_path / "task.yaml").write_text(json.dumps(raw))
    own = load_task("task.yaml", tmp_path)
    rows = [row(i, {"verses": ["Romans 99:1" if i < 18 else "Luke 15:20"]}) for i in range(100)]
    corrected = reference_metrics(rows, own)["references"]["verses"]["corrected"]
    assert corrected["value"] == pytest.approx(0.18 / 0.9)  # (q + sp - 1) / (se + sp - 1), se .9, sp 1
    assert corrected["low"] < 0.18 < corrected["high"] and corrected["checked"] == 50
    assert corrected["sensitivity"]["value"] == 0.9 and corrected["specificity"]["value"] == 1
    (tmp_path / "checked.jsonl").write_text(json.dumps(sample[-2]))
    one_sided = reference_metrics(rows, own)["references"]["verses"]["corrected"]
    assert (
        one_sided["value"] is None and "no answer of the hand-checked sample is wrong" in one_sided["reason"]
    )
    (tmp_path / "checked.jsonl").write_text('{"id": "r0", "claim": "Luke 15:20", "verdict": "yes"}')
    with pytest.raises(DataError, match=r"checked\.jsonl:1: no hand-checked claim"):
        reference_metrics(rows, own)


def test_a_task_without_checkers_has_no_such_figures() -> None:
    assert reference_metrics([row(0, {"verses": ["Romans 655:908"]})], task()) == {}


def test_what_cannot_be_read_claims_nothing() -> None:
    assert answer_values(row(0, None, "[" * 100_000)) is None
    assert answer_values(row(0, None, "[1]")) is None
    rows = [row(0, None, '{"verses": 7}'), row(1, None, '{"verses": [1, {"a": 2}, null, "Jude 5"]}')]
    assert reference_metrics(rows, task(verses="scripture"))["references"]["verses"]["claims"] == 1
