"""The values of an answer, renamed, scaled and put into lists, as the task's schema has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any

from mlx_distill.data.layouts import listed
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import ValueConfig
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")  # what YAML reads as a truth value


def check_values(values: Mapping[str, ValueConfig], task: Task, where: str) -> None:
    """Refuse a mapping of values for a field that the answer cannot have, or that asks for two things.

    Args:
        values: Field of the answer to what is done with it.
        task: The task.
        where: The place in the recipe, such as ``data.sources[0].values``.

    Raises:
        ConfigError: with the field and the fix.
    """
    properties = task.schema["properties"] if values else {}
    for name, value in values.items():
        if value.drop:
            if value != ValueConfig(drop=True):
                raise ConfigError(f"{where}.{name}: drop beside other keys", fix="remove drop or the others")
        elif name not in properties and task.schema.get("additionalProperties", True) is False:
            raise ConfigError(
                f"{where}: {name!r} is not a field of the answer",
                fix=known_names(name, properties, "its fields are"),
            )
        if value.split == "":
            raise ConfigError(f"{where}.{name}: split at nothing", fix="write split: ',', or wrap: true")
        if value.others == "keep" and value.map is None:
            raise ConfigError(f"{where}.{name}: others without map", fix="add map, or remove others")


def apply_values(answer: Mapping[str, Any], values: Mapping[str, ValueConfig]) -> dict[str, Any]:
    """The answer with the values that the task has.

    Args:
        answer: The answer as a row has it.
        values: Field of the answer to what is done with it; see :class:`~mlx_distill.recipe.ValueConfig`.

    Raises:
        DataError: a value that the map does not have, or that is no number where it is scaled.

    >>> values = {
    ...     "kind": ValueConfig(field="class", map={"0": "ham", "1": "spam"}),
    ...     "score": ValueConfig(scale=100, round=True),
    ...     "tags": ValueConfig(split=",", default=[]),
    ... }
    >>> apply_values({"class": 1, "score": "0.945", "tags": "a, b"}, values)
    {'kind': 'spam', 'score': 95, 'tags': ['a', 'b']}
    """
    taken = {value.field or name for name, value in values.items()}
    out = {name: given for name, given in answer.items() if name not in taken}
    for name, value in values.items():
        source = value.field if value.field is not None and value.field in answer else name
        given = answer.get(source)
        if value.drop:
            continue
        if given is not None or _has(value.map, None):
            out[name] = _apply(name, given, value)
        elif value.default is not None:
            out[name] = value.default
        elif source in answer:
            out[name] = None
    return out


def _apply(name: str, given: Any, value: ValueConfig) -> Any:
    if value.split is not None and isinstance(given, str):
        given = [part.strip() for part in given.split(value.split) if part.strip()]
    elif (value.split is not None or value.wrap) and not isinstance(given, list):
        given = [given]
    if value.map is not None:
        given = _each(given, lambda item: _renamed(name, item, value))
    if value.scale is not None or value.round:
        given = _each(given, lambda item: _scaled(name, item, value))
    return given


def _each(given: Any, change: Callable[[Any], Any]) -> Any:
    """The value changed, or each item of a list; an item that becomes a list adds its items."""
    if not isinstance(given, list):
        return change(given)
    out: list[Any] = []
    for item in given:
        changed = change(item)
        out += changed if isinstance(changed, list) else [changed]
    return out


def _has(names: Mapping[str, Any] | None, value: Any) -> bool:
    return names is not None and _key(names, value) is not _MISSING


_MISSING = object()


def _key(names: Mapping[str, Any], value: Any) -> Any:
    """The key of a map that a row's value means: the same text, or the same number (``1.0``) or truth value
    (``yes``, which YAML reads as true) in another spelling; else ``_MISSING``.
    """
    if isinstance(value, (list, Mapping)):
        return _MISSING
    if isinstance(value, str) and value in names:
        return value
    spelling = _spelling(value)
    return next((key for key in names if _spelling(key) == spelling), _MISSING)


def _spelling(value: Any) -> str:
    text = "null" if value is None else str(value).strip()
    if text.lower() in (*_TRUE, *_FALSE):
        return "true" if text.lower() in _TRUE else "false"
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return str(number.normalize()) if number.is_finite() else text


def _renamed(name: str, given: Any, value: ValueConfig) -> Any:
    names = value.map or {}
    key = _key(names, given)
    if key is not _MISSING:
        return names[key]
    if value.others == "keep":
        return given
    raise DataError(
        f"{name}: {_show(given)} is not in the map of its values, which has {listed(names)}",
        fix=f"add it under values.{name}.map in the source, or write others: keep there",
    )


def _scaled(name: str, given: Any, value: ValueConfig) -> Any:
    try:
        # Decimal, since 0.07 * 100 is 7.000000000000001 in floating point.
        number = Decimal(str(given).strip()) if isinstance(given, (str, int, float)) else Decimal("NaN")
        if isinstance(given, bool) or not number.is_finite():
            raise InvalidOperation
        number *= Decimal(str(1 if value.scale is None else value.scale))
        if value.round:
            number = number.quantize(Decimal(1), rounding=ROUND_HALF_UP)
    except InvalidOperation as error:
        raise DataError(
            f"{name}: {_show(given)} is not a number that can be scaled",
            fix="correct the row, or leave such rows out with --set data.drop_invalid=true",
        ) from error
    return int(number) if number == number.to_integral_value() else float(number)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
