"""The JSON schema of a task's answer: whether it is one, and the measured fields in it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.text import known_names

# Keywords whose value is a schema, a list of schemas, or a mapping of names to schemas.
_ONE = frozenset(
    "items additionalProperties not if then else contains propertyNames additionalItems unevaluatedItems "
    "unevaluatedProperties".split()
)
_LIST = frozenset("allOf anyOf oneOf prefixItems items".split())
_NAMED = frozenset("properties patternProperties $defs definitions dependentSchemas".split())
# Keywords that say nothing about the answer; those of OpenAPI are common too.
_NOTES = frozenset(
    "$schema $id id $anchor $comment $vocabulary $recursiveAnchor $dynamicAnchor title description default "
    "example examples format deprecated readOnly writeOnly contentMediaType contentEncoding contentSchema "
    "nullable discriminator".split()
)


def validator_of(schema: Mapping[str, Any], where: str = "the answer schema") -> Any:
    """The jsonschema validator of a schema.

    Args:
        schema: A JSON schema.
        where: Begins every error message.

    Raises:
        ConfigError: it is not a JSON schema, or nothing can fit it; with the path of the part that is wrong.

    >>> validator_of({"properties": {"score": {"type": "intger"}}}, "task.yaml: schema")
    Traceback (most recent call last):
    mlx_distill.errors.ConfigError: task.yaml: schema.properties.score.type: not a JSON schema: 'intger'
    is not a type (one of array, boolean, integer, null, number, object, string)
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} cannot be written as JSON: {error}",
            fix="put dates in quotes; use finite numbers and whole characters",
        ) from error
    for path, part in _parts(schema, ()):
        _check_names(part, f"{where}{_dotted(path)}")
    if not isinstance(schema.get("$schema", ""), str):
        raise ConfigError(f"{where}.$schema: not text", fix="leave it out")
    kind = validator_for(schema)
    try:
        kind.check_schema(dict(schema))
    except SchemaError as error:
        raise _schema_error(error, where) from error
    for path, part in _parts(schema, ()):
        _check_part(part, schema, kind, f"{where}{_dotted(path)}")
    return kind(dict(schema))


def _schema_error(error: Any, where: str) -> ConfigError:
    place = f"{where}{_dotted(error.absolute_path)}"
    if error.absolute_path and error.absolute_path[-1] == "type":
        types = "array, boolean, integer, null, number, object, string"
        return ConfigError(
            f"{place}: not a JSON schema: {error.instance!r} is not a type", fix=f"one of {types}"
        )
    reason = " ".join(error.message.split())[:200]
    return ConfigError(f"{place}: not a JSON schema: {reason}", fix="correct the task's schema")


def _parts(schema: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    """Every schema inside a schema, itself first, with its path."""
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for key, value in schema.items():
        if key in _ONE and isinstance(value, Mapping):
            yield from _parts(value, (*path, key))
        elif key in _LIST and isinstance(value, list):
            for index, item in enumerate(value):
                yield from _parts(item, (*path, key, index))
        elif key in _NAMED and isinstance(value, Mapping):
            for name, item in value.items():
                yield from _parts(item, (*path, key, name))


def _check_names(part: Mapping[Any, Any], where: str) -> None:
    """Names of properties are text: YAML reads ``yes:`` as true and ``1:`` as a number."""
    named = [part[key] for key in _NAMED if isinstance(part.get(key), Mapping)]
    for names in (part, *named):
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"{where}: the name {name!r} is not text", fix="put it in quotes")


def _check_part(part: Mapping[str, Any], root: Mapping[str, Any], kind: Any, where: str) -> None:
    """What jsonschema accepts and ignores, or finds out only when it meets an answer."""
    known = {*kind.VALIDATORS, *_NOTES, *_NAMED, "then", "else", "minContains", "maxContains"}
    for key in part:
        if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.8)):
            raise ConfigError(
                f"{where}: unknown keyword {key!r}, which JSON schema ignores",
                fix=f"did you mean {near[0]!r}?",
            )
    properties = part.get("properties")
    if part.get("additionalProperties") is False and "patternProperties" not in part:
        for name in part.get("required", ()):
            if name not in (properties or {}):
                raise ConfigError(
                    f"{where}.required: {name!r} is not one of the properties, and others are not allowed",
                    fix=known_names(name, properties or {}, "the properties are"),
                )
    if "$ref" in part and not _refers(str(part["$ref"]), root):
        raise ConfigError(
            f"{where}.$ref: {part['$ref']!r} is not a part of this schema",
            fix="write it out, or point to a part such as #/$defs/name",
        )


def _refers(reference: str, root: Any) -> bool:
    if not reference.startswith("#"):
        return False
    for step in reference.lstrip("#").strip("/").split("/") if reference.strip("#/") else ():
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and name.isdigit() and int(name) < len(root):
            root = root[int(name)]
        elif isinstance(root, Mapping) and name in root:
            root = root[name]
        else:
            return False
    return isinstance(root, (Mapping, bool))


def field_options(part: Any) -> list[Any]:
    """The values that a field's schema lists: those of its enum, or of the items of a list; none without.

    >>> field_options({"enum": ["a", "b"]}), field_options({"items": {"enum": ["c"]}}), field_options({})
    (['a', 'b'], ['c'], [])
    """
    if not isinstance(part, Mapping):
        return []
    if isinstance(part.get("enum"), list):
        return list(part["enum"])
    return field_options(part.get("items"))


def open_fields(schema: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """The schema without the enum of some properties, or of the items of such lists: any text fits there.

    Raises:
        ConfigError: no such property, or one without an enum of strings.

    >>> schema = {"properties": {"mood": {"enum": ["joy"]}, "tags": {"items": {"enum": ["a"]}}}}
    >>> open_fields(schema, ["mood", "tags"], "task.yaml")["properties"]
    {'mood': {'type': 'string'}, 'tags': {'items': {'type': 'string'}}}
    """
    properties = dict(schema["properties"])
    for name in names:
        if name not in properties:
            raise ConfigError(
                f"{where}: open: no property {name!r} in the schema",
                fix=known_names(name, properties, "the properties are"),
            )
        part = properties[name]
        items = part.get("items") if isinstance(part, Mapping) else None
        if isinstance(items, Mapping) and "enum" in items:
            properties[name] = {**part, "items": _without_enum(items, f"{where}: open: {name}")}
        elif isinstance(part, Mapping) and "enum" in part:
            properties[name] = _without_enum(part, f"{where}: open: {name}")
        else:
            raise ConfigError(
                f"{where}: open: {name!r} has no enum in the schema", fix="leave it out: it is open already"
            )
    return {**schema, "properties": properties}


def _without_enum(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not all(isinstance(value, str) for value in part["enum"]):
        raise ConfigError(f"{where}: its enum has other values than text", fix="leave it out")
    return {"type": "string", **{key: value for key, value in part.items() if key != "enum"}}


def check_score(schema: Mapping[str, Any], score: str, scale: tuple[float, float], where: str) -> None:
    """Refuse a score field that is not a number, or whose limits are not those of ``score_scale``.

    Raises:
        ConfigError: it is so.
    """
    properties = schema["properties"]
    if score not in properties:
        raise ConfigError(
            f"{where}: score field {score!r} is not in the schema",
            fix=known_names(score, properties, "the properties are"),
        )
    part = properties[score] if isinstance(properties[score], Mapping) else {}
    types = part.get("type", [])
    types = [types] if isinstance(types, str) else types
    values = part.get("enum", [])
    if (types and not {"number", "integer"} & set(types)) or any(isinstance(v, (str, bool)) for v in values):
        kind = " or ".join(types) or "text"
        raise ConfigError(
            f"{where}: score field {score!r} is of the type {kind}, not a number",
            fix="name a property of the type number or integer, or leave score out",
        )
    low, high = scale
    if low >= high:
        raise ConfigError(f"{where}: score_scale: {low:g} is not below {high:g}", fix="write [low, high]")
    limits = (part.get("minimum", low), part.get("maximum", high))
    if limits != (low, high):
        raise ConfigError(
            f"{where}: score_scale is [{low:g}, {high:g}], and the schema has {limits[0]:g} to {limits[1]:g} "
            f"for {score!r}",
            fix=f"write score_scale: [{limits[0]:g}, {limits[1]:g}], or correct the schema",
        )


def _dotted(path: Sequence[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
