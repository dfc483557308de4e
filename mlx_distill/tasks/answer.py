"""The answer schema: an answer to its one canonical text, and any text back to a validated answer or the
reason why not.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from mlx_distill.errors import ConfigError, DataError

_LONGEST_ERROR = 200


def dump_answer(answer: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The canonical JSON text of an answer: one text for one answer, so that a model has one thing to learn.

    Keys stand in the order of the schema's ``properties`` (others behind them, as they come), separated by
    ``", "`` and ``": "``; characters stand for themselves; a whole number is written without a point where
    the schema says ``integer``.

    Args:
        answer: The answer, of plain JSON values.
        schema: The JSON schema of the answer.

    Raises:
        DataError: a value that JSON does not know (NaN, infinity, half a surrogate pair, a date).

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
    """Read an answer strictly: the whole text, without white space at its ends, is one JSON object that fits
    the schema.

    Nothing is searched for, mended or guessed; a key that stands twice, NaN, infinity and half surrogate
    pairs are refused.

    Args:
        text: What a model wrote.
        schema: The JSON schema of the answer.

    Returns:
        The answer and None, or None and one short line that says what is wrong.

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
            text.strip(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
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
    """None where the answer fits the schema, else one short line with the place and the reason.

    >>> check_answer({"score": 101}, {"type": "object", "properties": {"score": {"maximum": 100}}})
    'score: 101 is greater than the maximum of 100'
    >>> check_answer({"score": 1}, {"type": "object", "required": ["colour", "score"]})
    "'colour' is a required property; needed are colour, score"
    """
    if not isinstance(answer, Mapping):
        return f"a JSON {_kind(answer)}, not an object"
    try:
        errors = sorted(
            _validator(json.dumps(schema)).iter_errors(answer),
            key=lambda e: [str(part) for part in e.absolute_path],
        )
    except RecursionError:
        return "nested too deeply"
    if not errors:
        return None
    place = ""
    for part in errors[0].absolute_path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    reason = errors[0].message
    if errors[0].validator == "required":  # jsonschema names one of those that are missing
        reason += f"; needed are {', '.join(errors[0].validator_value)}"
    return _short(f"{place}: {reason}" if place else reason)


def label_prefix(schema: Mapping[str, Any], label: str, answer: Mapping[str, Any] | None = None) -> str:
    """The canonical text up to where the label's value starts, the opening quote included: what label scoring
    puts before a class.

    Args:
        schema: The JSON schema of the answer.
        label: The name of the label field, a string.
        answer: Needed only for what stands before the label; of no use where the label is the first property.

    Raises:
        DataError: properties stand before the label and the answer lacks them.

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
    given = answer or {}
    missing = [key for key in before if key in schema.get("required", before) and key not in given]
    if missing:
        raise DataError(
            f"{label!r} comes after {missing[0]!r} in the schema, and the answer has none",
            fix=f"make {label!r} the schema's first property",
        )
    head = dump_answer({key: given[key] for key in before if key in given}, schema)[:-1]
    return f'{head}{", " if len(head) > 1 else ""}{json.dumps(label, ensure_ascii=False)}: "'


@functools.lru_cache(maxsize=64)
def _validator(schema_text: str) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    schema = json.loads(schema_text)
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(
            f"the answer schema is not a JSON schema: {_short(error.message)}", fix="mend the task's schema"
        ) from error
    return kind(schema)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return out


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 3] + "..."
