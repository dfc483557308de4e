"""Answers as JSON: an answer to its canonical text, and a text back to a valid answer or the reason why it is
none.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.storage import unique_keys
from mlx_distill.tasks.schema import validator_of
from mlx_distill.text import not_an_object

_LONGEST_ERROR = 200
CUT, NOT_JSON, NOT_VALID, FAILED = "cut", "not JSON", "does not fit the schema", "generation failed"
"""The kinds of reasons why a generated answer is not valid."""
THINKING = "thinking did not end"
"""One more kind: of a model that thinks first, and was cut while it did."""


def dump_answer(answer: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The canonical JSON text of an answer: equal answers have equal texts, so a model learns one form.

    Keys are in the order of the schema's ``properties`` (others behind them, in their own order), separated
    by ``", "`` and ``": "``; characters are not escaped; a whole number is written without a decimal point
    where the schema says ``integer``.

    Args:
        answer: The answer, of plain JSON values.
        schema: The JSON schema of the answer.

    Raises:
        DataError: a value that JSON cannot hold (NaN, infinity, half a surrogate pair, a date).

    >>> schema = {"properties": {"colour": {"type": "string"}, "score": {"type": "integer"}}}
    >>> dump_answer({"score": 80.0, "colour": "déjà"}, schema)
    '{"colour": "déjà", "score": 80}'
    """
    try:
        text = json.dumps(_ordered(answer, schema), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the answer is not JSON: {error}",
            fix="use text, finite numbers, true, false, null, lists and objects",
        ) from error
    return text


def _ordered(value: Any, schema: Any) -> Any:
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, Mapping):
        properties = schema.get("properties") or {}
        keys = [key for key in properties if key in value] + [key for key in value if key not in properties]
        return {key: _ordered(value[key], properties.get(key)) for key in keys}
    if isinstance(value, (list, tuple)):
        return [_ordered(item, schema.get("items")) for item in value]
    if isinstance(value, float) and schema.get("type") == "integer" and value.is_integer():
        return int(value)
    return value


def parse_answer(text: str, schema: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """Parse an answer strictly: the whole text, apart from white space at its ends, must be one JSON object
    that fits the schema.

    Nothing is extracted or repaired; duplicate keys, NaN, infinity and half surrogate pairs are refused.

    Args:
        text: The text that a model generated.
        schema: The JSON schema of the answer.

    Returns:
        The answer and None, or None and one short line with the reason.

    Raises:
        ConfigError: the schema itself is not a JSON schema.

    >>> schema = {"type": "object", "properties": {"colour": {"enum": ["yes", "no"]}}}
    >>> parse_answer('{"colour": "yes"}', schema)
    ({'colour': 'yes'}, None)
    >>> parse_answer('{"colour": "maybe"}', schema)
    (None, "colour: 'maybe' is not one of ['yes', 'no']")
    >>> parse_answer('Sure! {"colour": "yes"}', schema)
    (None, 'not JSON: Expecting value at character 1')
    """
    try:
        value = json.loads(
            text.strip(), object_pairs_hook=unique_keys, parse_constant=_refuse_constant, parse_float=_finite
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except UnicodeEncodeError:
        return None, "not JSON: half a surrogate pair"
    except RecursionError:
        return None, "not JSON: nested too deeply"
    except ValueError as error:
        return None, _short(f"not JSON: {error}")
    error_line = check_answer(value, schema)
    return (None, error_line) if error_line else (value, None)


def check_answer(answer: Any, schema: Mapping[str, Any]) -> str | None:
    """None where the answer fits the schema, else one short line with the field and the reason.

    >>> check_answer({"score": 101}, {"type": "object", "properties": {"score": {"maximum": 100}}})
    'score: 101 is greater than the maximum of 100'
    >>> check_answer({"score": 1}, {"type": "object", "required": ["colour", "score"]})
    "'colour' is a required property; needed are colour, score"
    """
    if not isinstance(answer, Mapping):
        return not_an_object(answer)
    text = _schema_text(schema)
    if _fits_field_by_field(answer, text):
        return None
    try:
        errors = sorted(
            _validator(text).iter_errors(answer),
            key=lambda e: [str(part) for part in e.absolute_path],
        )
    except RecursionError:
        return "nested too deeply"
    if not errors:
        return None
    path = ""
    for part in errors[0].absolute_path:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else str(part)
    reason = errors[0].message
    if errors[0].validator == "required":  # jsonschema names only one of the missing ones
        reason += f"; needed are {', '.join(errors[0].validator_value)}"
    return _short(f"{path}: {reason}" if path else reason)


def label_prefix(schema: Mapping[str, Any], label: str, answer: Mapping[str, Any] | None = None) -> str:
    """The canonical text before the label's value, with its opening quote: label scoring puts it before the
    classes.

    Args:
        schema: The JSON schema of the answer.
        label: The name of the label field, a string.
        answer: The answer, needed where properties precede the label.

    Raises:
        DataError: properties precede the label and the answer lacks them.

    >>> label_prefix({"properties": {"colour": {}, "score": {}}}, "colour")
    '{"colour": "'
    >>> label_prefix({"properties": {"score": {}, "colour": {}}}, "colour", {"score": 3, "colour": "no"})
    '{"score": 3, "colour": "'
    """
    properties = list(schema.get("properties") or {})
    if label not in properties:
        raise ConfigError(
            f"the schema has no property {label!r}", fix=f"its properties: {', '.join(properties)}"
        )
    before = properties[: properties.index(label)]
    values = answer or {}
    missing = [key for key in before if key in schema.get("required", before) and key not in values]
    if missing:
        raise DataError(
            f"{label!r} comes after {missing[0]!r} in the schema, and the answer has none",
            fix=f"make {label!r} the schema's first property",
        )
    start = dump_answer({key: values[key] for key in before if key in values}, schema)[:-1]
    separator = ", " if len(start) > 1 else ""
    return f'{start}{separator}{json.dumps(label, ensure_ascii=False)}: "'


# Keywords of a schema under which an answer fits if each of its fields fits on its own.
_SEPARABLE = frozenset({"type", "properties", "required", "additionalProperties", "title", "description"})
_LONGEST_KEPT = 200  # characters of a value whose check is remembered
_PLAIN = (str, int, float, bool, type(None))


_last_schemas: list[tuple[Any, Any, str]] = []


def _schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as JSON. Thousands of answers are checked against one: a look at whether it is still the last
    one, unchanged, takes a fraction of the time of writing it.
    """
    for last, copy, text in _last_schemas[:1]:
        if last is schema and copy == schema:
            return text
    text = json.dumps(schema)
    _last_schemas[:] = [(schema, json.loads(text), text)]
    return text


@functools.lru_cache(maxsize=64)
def _separable(schema_text: str) -> tuple[frozenset[str], frozenset[str], bool] | None:
    """The fields of a schema, those that are required, and whether others are allowed; None for a schema
    that does not look at each field on its own.
    """
    schema = json.loads(schema_text)
    additional = schema.get("additionalProperties", True)
    if not schema.keys() <= _SEPARABLE or schema.get("type") != "object" or not isinstance(additional, bool):
        return None
    if '"$' in schema_text:  # $ref and its like
        return None
    return frozenset(schema.get("properties", {})), frozenset(schema.get("required", ())), additional


@functools.lru_cache(maxsize=1 << 16)
def _fits_field(schema_text: str, name: str, value_text: str) -> bool:
    return bool(_field_validator(schema_text, name).is_valid(json.loads(value_text)))


@functools.lru_cache(maxsize=1 << 16, typed=True)  # True and 1 are equal, and not both are integers
def _fits_plain(schema_text: str, name: str, value: Any) -> bool:
    return bool(_field_validator(schema_text, name).is_valid(value))


@functools.lru_cache(maxsize=1024)
def _field_validator(schema_text: str, name: str) -> Any:
    return validator_of(json.loads(schema_text)["properties"][name])


def _fits_field_by_field(answer: Mapping[str, Any], schema_text: str) -> bool:
    """Whether an answer surely fits: each field is checked on its own, and equal values once. Of many answers
    most have values that occurred before, so that this is several times as fast as checking each as a whole.
    """
    parts = _separable(schema_text)
    if parts is None:
        return False
    fields, required, additional = parts
    if not required <= answer.keys() or not (additional or answer.keys() <= fields):
        return False
    try:
        for name in fields & answer.keys():
            value = answer[name]
            is_plain = type(value) in _PLAIN
            key = value if is_plain else json.dumps(value)
            if isinstance(key, str) and len(key) > _LONGEST_KEPT:
                if not _field_validator(schema_text, name).is_valid(value):
                    return False
            elif not (_fits_plain if is_plain else _fits_field)(schema_text, name, key):
                return False
    except (TypeError, ValueError, RecursionError):  # no plain JSON: the whole check says what is wrong
        return False
    return True


@functools.lru_cache(maxsize=64)
def _validator(schema_text: str) -> Any:
    return validator_of(json.loads(schema_text))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 3] + "..."


def error_kind(finish: str, error: str) -> str:
    """The kind of reason why a generated answer is not valid: for counts of such answers."""
    if error.endswith(THINKING):
        return THINKING
    kinds = {"length": CUT, "error": FAILED}
    return kinds.get(finish) or (NOT_JSON if error.startswith("not JSON") else NOT_VALID)
