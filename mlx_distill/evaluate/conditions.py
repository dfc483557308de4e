"""The conditions of a task's error categories: a small language in YAML, without code.

A condition is a mapping, and holds where all its parts hold; a list of mappings holds where one of them
does. ``answer`` and ``truth`` have tests of fields of one answer, every other key is a field of the answer
with tests of the difference between the two. docs/evaluation.md lists the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.metrics.answers import list_items
from mlx_distill.metrics.classification import Row
from mlx_distill.text import known_names

Test = Callable[[Row], bool]
ValueTest = Callable[[Any], bool]

INVALID = "invalid"
_NUMBERS: Mapping[str, Callable[[float, float], bool]] = {
    "at_least": lambda value, limit: value >= limit,
    "at_most": lambda value, limit: value <= limit,
    "above": lambda value, limit: value > limit,
    "below": lambda value, limit: value < limit,
}
VALUE_TESTS = (*_NUMBERS, "one_of", "none_of", "contains", "lacks", "empty")
_SHIFTS: Mapping[str, Callable[[float, float], bool]] = {
    "over_by": lambda difference, limit: difference > limit,
    "under_by": lambda difference, limit: -difference > limit,
    "off_by": lambda difference, limit: abs(difference) > limit,
}
_LISTS = ("missing", "extra")
DIFFERENCES = (*_SHIFTS, *_LISTS, "differs")


class Condition:
    """A parsed condition.

    Args:
        raw: A mapping, or a list of mappings of which one has to hold.
        properties: The schemas of the answer's fields.
        where: Begins every error message.

    Raises:
        ConfigError: a key, a field or a value that the language does not have, with its place.

    >>> properties = {"score": {"type": "integer"}}
    >>> raw = {"answer": {"score": {"at_least": 95}}, "truth": {"score": {"below": 80}}}
    >>> condition = Condition(raw, properties, "false_positive")
    >>> condition.holds({"answer": {"score": 97}, "truth": {"score": 60}})
    True
    >>> Condition({"score": {"over_by": 20}}, properties, "x").holds({"answer": None, "truth": {"score": 5}})
    False
    """

    def __init__(self, raw: Any, properties: Mapping[str, Any], where: str) -> None:
        alternatives = raw if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]
        self._parts: list[tuple[list[Test], list[Test]]] = []
        for number, part in enumerate(alternatives):
            place = f"{where}[{number}]" if len(alternatives) > 1 else where
            if not isinstance(part, Mapping) or not part:
                raise ConfigError(
                    f"{place}: {part!r} is no condition",
                    fix="write {answer: {FIELD: TEST}, truth: {FIELD: TEST}, FIELD: DIFFERENCE}",
                )
            self._parts.append(_parse_part(part, properties, place))
        if not self._parts:
            raise ConfigError(f"{where}: no condition", fix="write at least one")

    def holds(self, row: Row) -> bool:
        """Whether a row is such an error."""
        return any(all(test(row) for test in (*truth, *others)) for truth, others in self._parts)

    def applies(self, row: Row) -> bool:
        """Whether the tests of the true answer hold, so that a wrong answer would be such an error."""
        return any(all(test(row) for test in truth) for truth, _ in self._parts)

    @property
    def has_truth(self) -> bool:
        """Whether every alternative tests the true answer."""
        return all(truth for truth, _ in self._parts)


def _parse_part(
    part: Mapping[str, Any], properties: Mapping[str, Any], where: str
) -> tuple[list[Test], list[Test]]:
    """The tests of the true answer, and the other ones."""
    truth: list[Test] = []
    others: list[Test] = []
    for key, value in part.items():
        place = f"{where}.{key}"
        if key == "truth":
            truth += _side_tests("truth", value, properties, place)
        elif key == "answer" and value == INVALID:
            others.append(lambda row: row.get("answer") is None)
        elif key == "answer":
            others += _side_tests("answer", value, properties, place)
        else:
            _check_field(str(key), properties, place, "answer, truth, or a field of the answer")
            others.append(_difference(str(key), value, properties[key], place))
    return truth, others


def _check_field(name: str, properties: Mapping[str, Any], where: str, kind: str) -> None:
    if name not in properties:
        raise ConfigError(
            f"{where}: the answer has no field {name!r}", fix=known_names(name, list(properties), kind)
        )


def _side_tests(side: str, tests: Any, properties: Mapping[str, Any], where: str) -> list[Test]:
    if not isinstance(tests, Mapping) or not tests:
        alternative = f", or {side}: {INVALID}" if side == "answer" else ""
        raise ConfigError(
            f"{where}: {tests!r} is no test of a field", fix=f"write {side}: {{FIELD: TEST}}{alternative}"
        )
    out: list[Test] = []
    for name, test in tests.items():
        _check_field(str(name), properties, f"{where}.{name}", "fields of the answer")
        of_value = _value_test(test, properties[name], f"{where}.{name}")

        def holds(row: Row, name: str = str(name), of_value: ValueTest = of_value) -> bool:
            answer = row.get(side)
            return answer is not None and of_value(answer.get(name))

        out.append(holds)
    return out


def _value_test(test: Any, schema: Any, where: str) -> ValueTest:
    """A test of one value: a value, a list of values of which one fits, or a mapping of tests."""
    if not isinstance(test, Mapping):
        return _one_of(test, schema, where)
    tests = [_named_test(str(key), value, schema, where) for key, value in test.items()]
    if not tests:
        raise ConfigError(f"{where}: no test", fix=f"tests of a value: {', '.join(VALUE_TESTS)}")
    return lambda value: all(one(value) for one in tests)


def _named_test(key: str, limit: Any, schema: Any, where: str) -> ValueTest:
    if key in _NUMBERS:
        compare, number = _NUMBERS[key], _number(limit, f"{where}.{key}")
        return lambda value: _is_number(value) and compare(value, number)
    if key in ("one_of", "contains"):
        return _one_of(limit, schema, f"{where}.{key}", part=key == "contains")
    if key in ("none_of", "lacks"):
        has = _one_of(limit, schema, f"{where}.{key}", part=key == "lacks")
        return lambda value: not has(value)
    if key == "empty":
        if not isinstance(limit, bool):
            raise ConfigError(f"{where}.empty: {limit!r}", fix="true or false")
        return lambda value: (value is None or value in ("", [], {})) is limit
    raise ConfigError(f"{where}: unknown test {key!r}", fix=known_names(key, VALUE_TESTS, "tests of a value"))


def _one_of(wanted: Any, schema: Any, where: str, part: bool = False) -> ValueTest:
    """Whether a value is one of those; of a list whether it has one of them, of a text with ``part`` whether
    it contains one.
    """
    values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    if not values or any(isinstance(value, Mapping) for value in values):
        raise ConfigError(f"{where}: {wanted!r}", fix="give a value, or a list of values")
    known = _enum_of(schema)
    for value in values:
        if known is not None and value not in known:
            raise ConfigError(
                f"{where}: {value!r} is no value of the field",
                fix=known_names(str(value), [str(name) for name in known], "its values"),
            )
    texts = [str(value).lower() for value in values]

    def holds(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return bool(set(list_items(value)) & set(list_items(values)))
        if part:
            return isinstance(value, str) and any(text in value.lower() for text in texts)
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)

    return holds


def _enum_of(schema: Any) -> Sequence[Any] | None:
    """The values that a field, or the items of a list field, can have; None where any is possible."""
    if not isinstance(schema, Mapping):
        return None
    items = schema.get("items")
    enum = schema.get("enum") or (items.get("enum") if isinstance(items, Mapping) else None)
    return enum if isinstance(enum, Sequence) else None


def _difference(field: str, raw: Any, schema: Any, where: str) -> Test:
    """A test of the answer's field against the true one; it does not hold for an invalid answer."""
    if isinstance(raw, str) and raw in (*_LISTS, "differs"):
        raw = {raw: True}
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(
            f"{where}: {raw!r} is no difference",
            fix=f"one of {', '.join(DIFFERENCES)}, such as {{over_by: 20}}; a test of the answer alone is "
            f"answer: {{{field}: ...}}",
        )
    tests = [_named_difference(str(key), value, schema, where) for key, value in raw.items()]

    def holds(row: Row) -> bool:
        answer, truth = row.get("answer"), row.get("truth")
        if answer is None or truth is None or field not in truth:
            return False
        return all(test(answer.get(field), truth[field]) for test in tests)

    return holds


def _named_difference(key: str, limit: Any, schema: Any, where: str) -> Callable[[Any, Any], bool]:
    if key in _SHIFTS:
        shift, number = _SHIFTS[key], _number(limit, f"{where}.{key}")
        return lambda a, b: _is_number(a) and _is_number(b) and shift(a - b, number)
    if key == "differs" and limit is True:
        return _differs
    if key in _LISTS:
        only = None if limit is True else _one_of(limit, schema, f"{where}.{key}")
        if limit is False:
            raise ConfigError(f"{where}.{key}: false", fix="true for any value, or a list of values")

        def test(answer: Any, truth: Any) -> bool:
            have, wanted = set(list_items(answer)), set(list_items(truth))
            gone = sorted(wanted - have if key == "missing" else have - wanted)
            return bool(gone) and (only is None or only(gone))

        return test
    raise ConfigError(
        f"{where}: unknown difference {key!r}", fix=known_names(key, DIFFERENCES, "differences")
    )


def _differs(answer: Any, truth: Any) -> bool:
    if isinstance(truth, (list, tuple)):
        return sorted(list_items(answer)) != sorted(list_items(truth))
    return bool(answer != truth)


def _number(value: Any, where: str) -> float:
    if not _is_number(value):
        raise ConfigError(f"{where}: {value!r}", fix="give a number")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
