"""Python values as JSON values: what pyarrow, datasets, pandas, SQLite and CSV files give."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

Row = Mapping[str, Any]
NOT_JSON = object()  # stands for a value without a form as text: bytes, an image, an object


def json_row(row: Row) -> tuple[dict[str, Any], dict[str, str]]:
    """A row as JSON values, and the columns that have none, each with the name of its type.

    Dates and times become ISO 8601 text, NaN and NaT null, decimals and numpy's numbers numbers, arrays and
    tuples lists, bytes that are UTF-8 text. Other bytes, images and objects are left out.

    >>> json_row({"day": datetime.date(2024, 5, 1), "gap": float("nan"), "cover": b"\\xff\\xd8"})
    ({'day': '2024-05-01', 'gap': None}, {'cover': 'bytes'})
    """
    out, left_out = {}, {}
    for key, value in row.items():
        plain = json_value(value)
        if plain is NOT_JSON:
            left_out[str(key)] = type(value).__name__
        else:
            out[str(key)] = plain
    return out, left_out


def json_value(value: Any) -> Any:
    """The value as a JSON value, or ``NOT_JSON``; see :func:`json_row`."""
    if value is None or isinstance(value, (str, bool)) or type(value) is int:
        return value
    if isinstance(value, Mapping):
        items = {str(key): json_value(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not NOT_JSON}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [None if (plain := json_value(item)) is NOT_JSON else plain for item in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if type(value).__name__ in ("NaTType", "NAType"):  # of pandas, which are equal to nothing
        return None
    if isinstance(value, decimal.Decimal):
        whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if whole else _scalar(float(value))
    if isinstance(value, float):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, uuid.UUID)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        with suppress(UnicodeDecodeError):
            return bytes(value).decode()
        return NOT_JSON
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # an array or a number of numpy
        plain = value.tolist()
        return NOT_JSON if plain is value else json_value(plain)
    return NOT_JSON


def class_decoder(feature: Any) -> Callable[[Any], Any] | None:
    """A function that replaces the numbers of classes in a column by their names; None where it has none.

    Args:
        feature: The column's type as ``datasets`` writes it in ``dataset_info.json`` and into Parquet files:
            the entry of ``Features.to_dict()``.

    >>> class_decoder({"names": ["ham", "spam"], "_type": "ClassLabel"})(1)
    'spam'
    """
    if isinstance(feature, list):
        feature = {"_type": "List", "feature": feature[0] if feature else None}
    if not isinstance(feature, Mapping):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        names = feature.get("names") or []
        # -1 is a row without a class, as in the test splits of GLUE.
        return lambda value: _class_name(value, names)
    if isinstance(kind, str):
        inner = class_decoder(feature.get("feature"))
        if inner is None:
            return None
        return lambda value: [inner(item) for item in value] if isinstance(value, list) else inner(value)
    decoders = {key: decoder for key, item in feature.items() if (decoder := class_decoder(item))}
    if not decoders:
        return None
    return lambda value: _decode_fields(value, decoders)


def _class_name(value: Any, names: Any) -> Any:
    if isinstance(value, list):  # a list of structs is stored as a struct of lists
        return [_class_name(item, names) for item in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _decode_fields(value: Any, decoders: Mapping[str, Callable[[Any], Any]]) -> Any:
    if isinstance(value, list):
        return [_decode_fields(item, decoders) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {key: decoders[key](item) if key in decoders else item for key, item in value.items()}


def typed_text(text: str, schema: Any, *, required: bool = True) -> Any:
    """A cell of a CSV file or a database as the value that the schema of its field has room for.

    A cell stays text where the schema takes text. Else it is read as a number, a truth value, or a list or an
    object in JSON. An empty cell is null, except of a required text. What cannot be read stays text, so that
    the error about the answer shows it.

    >>> typed_text("0.95", {"type": "number"}), typed_text("TRUE", {"type": "boolean"}), typed_text("7", {})
    (0.95, True, '7')
    """
    kinds = json_types(schema)
    if not text.strip():
        return text if "string" in kinds and required else None
    if "string" in kinds:
        return text
    return _parsed_cell(text.strip(), kinds, text)


def typed_number(value: Any, schema: Any) -> Any:
    """0 and 1 as false and true where a database has no truth values and the schema has nothing else."""
    if json_types(schema) <= {"boolean", "null"} and value in (0, 1):
        return bool(value)
    return value


def _parsed_cell(text: str, kinds: set[str], otherwise: Any) -> Any:
    if kinds & {"integer", "number"}:
        with suppress(ValueError):
            return int(text) if "_" not in text else otherwise
        with suppress(ValueError):
            number = float(text)
            return number if math.isfinite(number) and "_" not in text else otherwise
    if "boolean" in kinds and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if kinds & {"array", "object"} and text[0] in "[{":
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    if "null" in kinds and text.lower() in ("null", "none"):
        return None
    return otherwise


_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def json_types(schema: Any) -> set[str]:
    """The JSON types that a field's schema has room for; text where it does not say."""
    if not isinstance(schema, Mapping):
        return {"string"}
    if "type" in schema:
        return {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    types = {_NAMES.get(type(value), "null") for value in values}
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key, []):
            types |= json_types(part)
    return types or {"string"}


def takes_text(schema: Any) -> bool:
    """Whether a field's schema has room for text, or for lists or objects that may hold it."""
    return bool(json_types(schema) & {"string", "array", "object"})


def cell_equals(cell: Any, wanted: Any) -> bool:
    """Whether a row's value is the one that ``where`` asks for; a cell of text may be that of a number.

    >>> cell_equals("5", 5), cell_equals("5.0", 5), cell_equals("05", "5")
    (True, True, False)
    """
    if isinstance(cell, str) and isinstance(wanted, (int, float)):
        kinds = {"boolean"} if isinstance(wanted, bool) else {"number"}
        cell = _parsed_cell(cell.strip() or "-", kinds, cell)
    return bool(cell == wanted)
