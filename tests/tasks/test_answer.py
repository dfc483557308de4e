from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.tasks.answer import check_answer, dump_answer, label_prefix, parse_answer
from mlx_distill.tasks.task import load_task

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["verdict", "score"],
    "properties": {
        "verdict": {"type": "string", "enum": ["yes", "no"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "themes": {
            "type": "array",
            "items": {"type": "object", "properties": {"a": {}, "b": {"type": "integer"}}},
        },
    },
}


def random_answer(rng: random.Random) -> dict[str, Any]:
    alphabet = 'aé漢"\\\n\t \u2028👩'
    themes = [
        {"b": rng.randrange(9), "a": "".join(rng.choices(alphabet, k=4))} for _ in range(rng.randrange(3))
    ]
    answer = {"themes": themes, "score": rng.randrange(101), "verdict": rng.choice(["yes", "no"])}
    keys = rng.sample(list(answer), 3)
    return {key: answer[key] for key in keys}


def test_one_answer_has_one_text_and_comes_back() -> None:
    rng = random.Random(0)
    for _ in range(100):
        answer = random_answer(rng)
        text = dump_answer(answer, SCHEMA)
        assert list(json.loads(text)) == ["verdict", "score", "themes"]
        assert parse_answer(text, SCHEMA) == (answer, None)
        assert dump_answer(dict(reversed(answer.items())), SCHEMA) == text
        prefix = label_prefix(SCHEMA, "verdict", answer)
        assert text.startswith(f'{prefix}{answer["verdict"]}"')


def test_the_canonical_text_is_exact() -> None:
    text = dump_answer(
        {"themes": [{"b": 2.0, "a": "é"}], "score": 7.0, "verdict": "yes", "extra": None}, SCHEMA
    )
    assert text == '{"verdict": "yes", "score": 7, "themes": [{"a": "é", "b": 2}], "extra": null}'


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "\ud800", {1, 2}, b"x"])
def test_values_that_json_cannot_hold_are_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="not JSON"):
        dump_answer({"verdict": bad}, SCHEMA)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ('{"verdict": "yes", "score": 1', "not JSON"),
        ('{"verdict', "not JSON: Unterminated string starting at character 2"),
        ('{"verdict": "yes", "score": 1} ok', "not JSON"),
        ('```json\n{"verdict": "yes", "score": 1}\n```', "not JSON"),
        ('{"verdict": "yes", "verdict": "no", "score": 1}', "'verdict' occurs twice"),
        ('{"verdict": "yes", "score": 1, "themes": [{"a": 1, "a": 2}]}', "'a' occurs twice"),
        ('{"verdict": "yes", "score": NaN}', "NaN"),
        ('{"verdict": "yes", "score": -Infinity}', "-Infinity"),
        ('{"verdict": "yes", "score": 1e999}', "too large"),
        ('{"verdict": "\\ud800", "score": 1}', "surrogate"),
        ('{"verdict": "yes", "score": 101}', "score: 101 is greater than the maximum of 100"),
        ('{"verdict": "MAYBE", "score": 1}', "verdict: 'MAYBE' is not one of ['yes', 'no']"),
        ('{"verdict": "yes", "score": "1"}', "score: '1' is not of type 'integer'"),
        ('{"verdict": "yes", "score": true}', "score: True is not of type 'integer'"),
        ('{"verdict": "yes"}', "'score' is a required property; needed are verdict, score"),
        ('{"verdict": "yes", "score": 1, "x": 1}', "'x' was unexpected"),
        (
            '{"verdict": "yes", "score": 1, "themes": [{}, {"b": "q"}]}',
            "themes[1].b: 'q' is not of type 'integer'",
        ),
        ("[]", "a JSON list, not an object"),
        ("null", "a JSON null, not an object"),
        ("[" * 200_000, "nested too deeply"),
        ('{"verdict": "yes", "score": ' + "9" * 5000 + "}", "not JSON"),
        ('{"verdict": "' + "x" * 5000 + '", "score": 1}', "verdict: 'xxx"),
    ],
)
def test_a_bad_answer_is_refused_in_one_short_line(text: str, reason: str) -> None:
    answer, error = parse_answer(text, SCHEMA)
    assert answer is None and error is not None
    assert reason in error and "\n" not in error and len(error) <= 200


def test_space_at_the_ends_is_allowed() -> None:
    assert parse_answer(' \n{"score": 1, "verdict": "no"}\n', SCHEMA) == ({"score": 1, "verdict": "no"}, None)


def test_a_label_behind_other_properties_needs_them() -> None:
    schema = {"properties": {"score": {}, "note": {}, "verdict": {}}, "required": ["score", "verdict"]}
    assert label_prefix(schema, "verdict", {"score": 1}) == '{"score": 1, "verdict": "'
    assert (
        label_prefix(schema, "verdict", {"note": "n", "score": 1}) == '{"score": 1, "note": "n", "verdict": "'
    )
    with pytest.raises(DataError, match="'score'"):
        label_prefix(schema, "verdict")
    with pytest.raises(ConfigError, match="no property 'label'"):
        label_prefix(schema, "label")


def test_an_invalid_schema_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not a JSON schema"):
        check_answer({}, {"type": "objekt"})


@pytest.mark.parametrize("name", ["music", "moderation"])
def test_the_packaged_tasks_begin_with_their_label(name: str) -> None:
    task = load_task(name)
    assert label_prefix(task.schema, task.label) == '{"' + task.label + '": "'


VALUES = [0, 1, 3.0, -1, 200, True, None, "x", "long" * 80, "joy", [], ["a"], ["a", "b", "c"], [1], {"a": 1}]
VALUES += [math.nan]
SCHEMAS: list[dict[str, Any]] = [
    {"properties": {"a": {"type": "integer", "maximum": 100}, "b": {"enum": ["joy", 1]}}, "required": ["a"]},
    {"properties": {"a": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}, "b": {}}},
    {"properties": {"a": {"type": ["number", "null"]}}, "additionalProperties": False},
    {"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "string"}},
    {"properties": {"a": {"type": "string"}}, "minProperties": 2},
    {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "string"}}},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_check_field_by_field_is_that_of_the_whole_schema(schema: dict[str, Any]) -> None:
    import jsonschema

    schema = {"type": "object", **schema}
    whole = jsonschema.validators.validator_for(schema)(schema)
    for a, b in itertools.product(VALUES, VALUES):
        for answer in ({"a": a, "b": b}, {"a": a}, {"b": b, "c": a}):
            assert (check_answer(answer, schema) is None) == whole.is_valid(answer), answer


def test_a_schema_that_was_changed_is_read_again() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 5}}}
    assert check_answer({"n": 7}, schema) is not None
    schema["properties"]["n"]["maximum"] = 9
    assert check_answer({"n": 7}, schema) is None
    assert check_answer({"n": True}, schema) is not None
    assert check_answer({"n": 1}, schema) is None
