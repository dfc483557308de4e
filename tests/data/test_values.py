"""Values of answers as people's files have them, made those of the task by a source's ``values``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_distill.config import from_mapping, keyed
from mlx_distill.data.prepare import prepare
from mlx_distill.data.rows import to_example
from mlx_distill.data.values import apply_values, check_values
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import SourceConfig, ValueConfig, load_recipe
from mlx_distill.tasks.answer import check_answer
from mlx_distill.tasks.task import Task, parse_task

RECIPE = """
name: mine
task: {name: music, open: [themes, emotion]}
teacher: asset:models/tiny-qwen3
student: asset:models/tiny-gpt-oss
data:
  near_duplicates: 0
  sources:
    - path: songs.jsonl
      values:
        score: {scale: 100, round: true}
        safety: {map: {safe: [], explicit: [language], adult: [sensuality, substances]}}
"""


def song(number: int) -> dict[str, Any]:
    """A chat with an answer such as language models write: a share as score, one word for safety."""
    answer = {
        "verdict": ["RECOMMENDED", "ACCEPTABLE", "CONCERNING", "NOT_RECOMMENDED"][number % 4],
        "score": round(0.95 - 0.03 * number, 2),
        "themes": [["grace", "salvation"], ["mercy"], ["faith", "hope", "rest"]][number % 3],
        "sentiment": ["positive", "mixed", "negative"][number % 3],
        "safety": ["safe", "explicit", "adult"][number % 3],
        "emotion": ["hope", "joy", "awe"][number % 3],
        "scripture_references": ["Ephesians 2:8-9"][: number % 2],
    }
    turns = [{"role": "user", "content": f"Song {number}: " + "la " * (number + 3)}]
    if number % 2:
        turns.insert(0, {"role": "system", "content": "Judge the song."})
    return {"messages": [*turns, {"role": "assistant", "content": json.dumps(answer)}]}


def test_the_answers_of_a_language_model_become_rows_of_the_packaged_task(tmp_path: Path) -> None:
    (tmp_path / "songs.jsonl").write_text("\n".join(json.dumps(song(i)) for i in range(30)), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(tmp_path / "mine.yaml")
    task, folder = recipe.load_task(), tmp_path / "data"
    folder.mkdir()
    statistics = prepare(recipe.data, task, recipe.base, folder)
    assert sum(statistics["rows"].values()) == 30 and not statistics["dropped"]
    rows = [
        json.loads(line) for split in ("train", "valid", "test") for line in open(folder / f"{split}.jsonl")
    ]
    answers = {row["messages"][-2]["content"].split(":")[0]: row["answer"] for row in rows}
    assert all(check_answer(answer, task.schema) is None for answer in answers.values())
    assert answers["Song 0"] == {
        "verdict": "RECOMMENDED",
        "score": 95,
        "themes": ["grace", "salvation"],
        "sentiment": "positive",
        "safety": [],
        "emotion": "hope",
        "scripture_references": [],
    }
    assert [answers[f"Song {i}"]["score"] for i in (1, 22, 29)] == [92, 29, 8]
    assert answers["Song 2"]["safety"] == ["sensuality", "substances"]


def task(**properties: Any) -> Task:
    properties = {"kind": {"type": "string", "enum": ["ham", "spam"]}, **properties}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    raw = {"name": "mail", "system": "", "user": "{text}", "label": "kind"}
    return parse_task({**raw, "schema": {**schema, "additionalProperties": False}}, "task.yaml")


def values(text: str) -> dict[str, ValueConfig]:
    return dict(from_mapping(SourceConfig, {"values": yaml.safe_load(text)}, "recipe.yaml").values)


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("s: {scale: 100, round: true}", {"s": 0.945}, {"s": 95}),  # a half is rounded up
        ("s: {scale: 100}", {"s": 0.07}, {"s": 7}),  # 7.000000000000001 in floating point
        ("s: {scale: 100}", {"s": "0.955"}, {"s": 95.5}),
        ("s: {scale: 1}", {"s": " 75 "}, {"s": 75}),
        ("s: {round: true}", {"s": -2.5}, {"s": -3}),
        ("s: {scale: 10}", {"s": [0.1, 0.2]}, {"s": [1, 2]}),
        ("k: {map: {0: ham, 1: spam}}", {"k": 1}, {"k": "spam"}),
        ("k: {map: {0: ham, 1: spam}}", {"k": "0"}, {"k": "ham"}),
        ("k: {map: {0: ham, 1: spam}}", {"k": 1.0}, {"k": "spam"}),
        (
            "k: {map: {no: ham, yes: spam}}",
            {"k": "Yes"},
            {"k": "spam"},
        ),  # YAML reads truth values
        ("k: {map: {false: ham, true: spam}}", {"k": False}, {"k": "ham"}),
        ("k: {map: {'01': ham, '1': spam}}", {"k": "01"}, {"k": "ham"}),
        ("k: {map: {null: ham}}", {"k": None}, {"k": "ham"}),
        ("k: {map: {null: ham}}", {}, {"k": "ham"}),
        ("k: {map: {a: b}, others: keep}", {"k": ["a", "c"]}, {"k": ["b", "c"]}),
        ("k: {map: {safe: []}, wrap: true}", {"k": "safe"}, {"k": []}),
        ("k: {split: ','}", {"k": "a, b,,c "}, {"k": ["a", "b", "c"]}),
        ("k: {split: ','}", {"k": ["a, b"]}, {"k": ["a, b"]}),
        ("k: {split: ',', map: {a: [x, y]}, others: keep}", {"k": "a,b"}, {"k": ["x", "y", "b"]}),
        ("k: {split: ','}", {"k": ""}, {"k": []}),
        ("k: {wrap: true}", {"k": "a, b"}, {"k": ["a, b"]}),
        ("k: {wrap: true}", {"k": ["a"]}, {"k": ["a"]}),
        ("k: {field: class}", {"class": 1, "more": 2}, {"more": 2, "k": 1}),
        ("{a: {field: b}, b: {field: a}}", {"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ("k: {default: []}", {}, {"k": []}),
        ("k: {default: 0, scale: 100}", {"k": None}, {"k": 0}),
        ("k: {scale: 100}", {}, {}),
        ("k: {scale: 100}", {"k": None}, {"k": None}),
        ("k: {drop: true}", {"k": 1, "l": 2}, {"l": 2}),
    ],
)
def test_values_are_changed_as_the_source_says(
    text: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = json.dumps(given)
    assert apply_values(given, values(text)) == expected
    assert json.dumps(given) == before
    changed = apply_values(given, values(text)).get("s")
    assert type(changed) is type(expected.get("s"))  # 95, not 95.0


@pytest.mark.parametrize(
    ("text", "given", "words", "fix"),
    [
        (
            "k: {map: {ham: a, spam: b}}",
            {"k": "eggs"},
            "k: 'eggs' is not in the map of its values, which has",
            "keep",
        ),
        ("k: {map: {ham: a, spam: b}}", {"k": ["ham", "eggs"]}, "ham, spam", "values.k.map"),
        ("k: {map: {1: a}}", {"k": {"x": 1}}, "{'x': 1} is not in the map", "values.k.map"),
        ("s: {scale: 100}", {"s": "many"}, "s: 'many' is not a number that can be scaled", "correct the row"),
        ("s: {scale: 100}", {"s": True}, "s: True is not a number", "correct the row"),
        ("s: {scale: 100}", {"s": float("nan")}, "s: nan is not a number", "correct the row"),
        ("s: {round: true}", {"s": {"a": 1}}, "is not a number", "correct the row"),
    ],
)
def test_a_value_that_cannot_be_changed_is_refused(text: str, given: Any, words: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        apply_values(given, values(text))
    assert words in caught.value.message and fix in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "knd: {map: {a: b}}",
            r"sources\[0\].values: 'knd' is not a field of the answer .*'kind'",
        ),
        ("kind: {drop: true, scale: 1}", "values.kind: drop beside other keys"),
        ("kind: {others: keep}", "values.kind: others without map"),
        ("kind: {split: ''}", "values.kind: split at nothing"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_any_row(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_values(values(text), task(), "data.sources[0].values")
    check_values(values("confidence: {drop: true}"), task(), "data.sources[0].values")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: {mapp: {}}", "values.kind: unknown key 'mapp' .did you mean 'map'"),
        ("kind: ham", "values.kind: a mapping is needed"),
        ("kind: {others: drop}", "others: 'drop' is not one of error, keep"),
    ],
)
def test_misspelled_keys_of_values_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        values(text)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Hello", "answer": {"class": 1, "tags": "a, b"}},
        {"text": "Hello", "class": "1", "tags": "a,b"},
        {"text": "Hello", "class": 1, "tags": ["a", "b"], "kind": "unused"},
        {"instruction": "Hello", "output": '{"class": 1, "tags": ["a", "b"]}'},
        {"prompt": "Hello", "completion": '{"class": 1, "tags": "a,b", "confidence": 1}'},
        {
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": '{"class": 1, "tags": "a,b"}'},
            ]
        },
    ],
)
def test_values_apply_to_every_layout(row: dict[str, Any]) -> None:
    mail = task(tags={"type": "array", "items": {"type": "string"}})
    mapping = values(
        "{kind: {field: class, map: {0: ham, 1: spam}}, tags: {split: ','}, confidence: {drop: true}}"
    )
    example = to_example(row, mail, "f:1", values=mapping)
    assert example.answer == {"kind": "spam", "tags": ["a", "b"]}


def test_a_label_alone_is_renamed_and_its_other_fields_get_their_defaults() -> None:
    mapping = values("{kind: {map: {Werbung: spam}}, sure: {default: 50}}")
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Werbung"}]}
    mail = task(sure={"type": "integer"})
    example = to_example(row, mail, "f:1", values=mapping)
    assert example.answer == {"kind": "spam", "sure": 50}
    with pytest.raises(DataError, match=r"^f:1: kind: 'Post' is not in the map"):
        to_example(
            {"text": "Hello", "kind": "Post", "sure": 1},
            task(sure={"type": "integer"}),
            "f:1",
            None,
            "auto",
            mapping,
        )


def test_an_answer_that_does_not_fit_names_values_as_a_fix() -> None:
    with pytest.raises(DataError, match="'eggs' is not one of") as caught:
        to_example({"text": "Hello", "kind": "eggs"}, task(), "f:1")
    assert "map it by values:" in (caught.value.fix or "")


def test_a_source_without_values_keeps_its_key() -> None:
    assert "values" not in keyed(SourceConfig(path="rows.jsonl"))
    one, two = (SourceConfig(values={"k": ValueConfig(map={"0": name})}) for name in ("ham", "spam"))
    assert keyed(one) != keyed(two) and json.dumps(keyed(one), sort_keys=True)


def test_a_closed_vocabulary_names_both_ways_out() -> None:
    task = load_recipe("tiny").load_task()
    answer: dict[str, Any] = {"verdict": "RECOMMENDED", "score": 95, "themes": ["grace?"], "safety": []}
    answer |= {"sentiment": "positive", "emotion": "joy", "scripture_references": []}
    row = {"title": "t", "lyrics": "l"}
    with pytest.raises(DataError, match=r"themes\[0\]: 'grace\?' is not one of") as caught:
        to_example({**row, "answer": answer}, task, "songs.jsonl:1")
    assert "values:" in str(caught.value.fix) and "open: [themes] in the task" in str(caught.value.fix)
    with pytest.raises(DataError, match="verdict: 'GOOD'") as caught:
        to_example({**row, "answer": {**answer, "themes": ["hope"], "verdict": "GOOD"}}, task, "f:1")
    assert "open:" not in str(caught.value.fix)  # the label is closed
