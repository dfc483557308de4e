"""Numbers, sizes, durations, plurals and lists as text for people.

Text for the terminal has plain spaces. Text for a page (the report, a model card) has a narrow no-break space
between a number and its unit, so that no line breaks there: rates always, sizes and durations with
``page=True``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"
"""Shown where nothing was measured."""
NARROW_SPACE = "\u202f"
MINUS = "\u2212"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def not_an_object(value: Any) -> str:
    """What a JSON value is that should be an object.

    >>> not_an_object("a"), not_an_object(None)
    ('a JSON string, not an object', 'a JSON null, not an object')
    """
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return f"a JSON {names.get(type(value), type(value).__name__)}, not an object"


def percent(value: float | None, digits: int = 1) -> str:
    """A rate as a percentage, for a page.

    >>> percent(0.913)
    '91.3\u202f%'
    """
    return NONE if value is None else f"{_percentage(value, digits)}{NARROW_SPACE}%"


def _percentage(value: float, digits: int) -> str:
    # 0 and 1 are exact, so they are shown without decimals.
    return f"{100 * value:.0f}" if value in (0.0, 1.0) else f"{100 * value:.{digits}f}"


def interval(estimate: Mapping[str, Any] | None, digits: int = 1) -> str:
    """The interval of a rate in percent.

    >>> interval({"value": 0.9, "low": 0.876, "high": 0.94, "n": 300})
    '87.6–94.0'
    """
    if not estimate or estimate.get("low") is None:
        return ""
    return f"{_percentage(estimate['low'], digits)}–{_percentage(estimate['high'], digits)}"


def signed_points(value: float | None, digits: int = 1) -> str:
    """A difference of two rates in percentage points, with its sign.

    >>> signed_points(-0.027)
    '\u22122.7'
    """
    if value is None:
        return NONE
    text = f"{abs(100 * value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def signed_interval(estimate: Mapping[str, Any] | None, digits: int = 1) -> str:
    """The interval of a difference of two rates in percentage points; empty where it has none.

    >>> signed_interval({"value": -0.004, "low": -0.024, "high": 0.006, "n": 300})
    '\u22122.4 to +0.6'
    """
    if not estimate or estimate.get("low") is None or estimate.get("high") is None:
        return ""
    return f"{signed_points(estimate['low'], digits)} to {signed_points(estimate['high'], digits)}"


def p_value(value: float | None) -> str:
    """A p-value with two or three decimals.

    >>> p_value(0.00004), p_value(0.0312), p_value(0.4)
    ('p < 0.001', 'p = 0.031', 'p = 0.40')
    """
    if value is None:
        return ""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def duration(seconds: float | None, *, page: bool = False) -> str:
    """A duration: in whole seconds for the terminal, with up to three significant digits for a page.

    >>> duration(7.4), duration(83), duration(3 * 3600 + 125)
    ('7 s', '1 min 23 s', '3 h 02 min')
    >>> [duration(x, page=True).replace("\u202f", " ") for x in (0.00042, 0.0341, 2.41, 75, 7300)]
    ['0.42 ms', '34 ms', '2.41 s', '1 min 15 s', '2 h 1 min']
    """
    if seconds is None:
        return NONE
    if page and seconds < 0.9995:
        return f"{significant(1000 * seconds, 2)}{NARROW_SPACE}ms"
    if page and seconds < 59.95:
        return f"{significant(seconds, 3)}{NARROW_SPACE}s"
    whole, space = round(seconds), NARROW_SPACE if page else " "
    if whole < 60:
        return f"{whole}{space}s"
    if whole < 3600:
        larger, smaller, units = whole // 60, whole % 60, ("min", "s")
    else:
        larger, smaller, units = whole // 3600, whole % 3600 // 60, ("h", "min")
    # Two digits keep the width of a progress line.
    second = str(smaller) if page else f"{smaller:02d}"
    return f"{larger}{space}{units[0]} {second}{space}{units[1]}"


def size(count: float | None, *, page: bool = False) -> str:
    """A number of bytes in decimal units: with one decimal, or with three significant digits for a page.

    >>> size(1), size(999), size(12_345), size(3.2e6), size(16e9)
    ('1 byte', '999 bytes', '12.3 kB', '3.2 MB', '16.0 GB')
    >>> size(2_140_000, page=True).replace("\u202f", " ")
    '2.14 MB'
    """
    if count is None:
        return NONE
    if page:
        value, unit = _scaled(count, 999.5, ("B", "kB", "MB", "GB"))
        return f"{significant(value, 3)}{NARROW_SPACE}{unit}"
    if count < 1000:
        return counted(count, "byte")
    value, unit = _scaled(count / 1000, 999.95, ("kB", "MB", "GB", "TB"))
    return f"{value:.1f} {unit}"


def _scaled(value: float, limit: float, units: Sequence[str]) -> tuple[float, str]:
    """The value in the first unit in which it is below ``limit``, else in the last one."""
    for unit in units[:-1]:
        if value < limit:
            return value, unit
        value /= 1000
    return value, units[-1]


def gigabytes(value: float | None) -> str:
    """A size given in GB, for a page."""
    return NONE if value is None else size(value * 1e9, page=True)


def significant(value: float, digits: int) -> str:
    """A number rounded to significant digits, with thousands separators and without an exponent.

    >>> significant(0.042042, 2), significant(1234.5, 3), significant(9.996, 3)
    ('0.042', '1,234', '10.0')
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = int(f"{abs(rounded):e}".split("e")[1])
    places = max(0, digits - 1 - magnitude)
    return f"{value:,.{places}f}"


def signed_number(value: float, digits: int = 3) -> str:
    """A number rounded to significant digits, with its sign.

    >>> signed_number(-12.345), signed_number(0.5), signed_number(0.0)
    ('−12.3', '+0.500', '0')
    """
    text = significant(abs(value), digits)
    return text if value == 0 else f"{MINUS if value < 0 else '+'}{text}"


def integer(value: float | None) -> str:
    """A number rounded to an integer, with thousands separators."""
    return NONE if value is None else f"{value:,.0f}"


def counted(number: float | None, unit: str) -> str:
    """A number of things.

    >>> counted(1, "file"), counted(1200, "row"), counted(3, "MB")
    ('1 file', '1,200 rows', '3 MB')
    """
    if number is None:
        return ""
    if not unit:
        return f"{number:g}"
    return f"{number:,.0f} {unit if number == 1 else plural(unit)}"


def plural(noun: str) -> str:
    """The plural of a noun or a unit.

    >>> plural("row"), plural("matrix"), plural("MB")
    ('rows', 'matrices', 'MB')
    """
    if not noun or noun.isupper():
        return noun
    return noun.removesuffix("ix") + "ices" if noun.endswith("matrix") else f"{noun}s"


def words(name: str) -> str:
    """An identifier as words.

    >>> words("grad_norm")
    'grad norm'
    """
    return name.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """Names as a list inside a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The question that follows a misspelled name, or an empty text where no name is near.

    >>> did_you_mean("anlyze", ["analyze", "run"]), did_you_mean("x", ["analyze"])
    ("did you mean 'analyze'?", '')
    """
    import difflib

    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def known_names(name: str, names: Iterable[str], kind: str) -> str:
    """The fix for a name that does not exist: the nearest one, and all of them.

    >>> known_names("teech", ["teach", "run"], "stages")
    "did you mean 'teach'? stages: teach, run"
    """
    names = list(names)
    return f"{did_you_mean(name, names)} {kind}: {', '.join(names)}".strip()


def value_text(value: Any) -> str:
    """A JSON value as text: a field of an answer, a setting.

    >>> value_text(["a", "b"]), value_text(None), value_text(True), value_text([])
    ('a, b', '–', 'true', 'none')
    """
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {value_text(item)}" for key, item in value.items()) or "none"
    return str(value)


def visible(text: str) -> str:
    """A text with its control characters as escapes; line breaks and tabs stay.

    >>> visible("a\\x0eb\\n")
    'a\\\\u000eb\\n'
    """
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def shortened(text: str, limit: int = 90) -> str:
    """The first words of a text, on one line of at most ``limit`` characters and an ellipsis.

    >>> shortened("One line,\\nand another one.", 20), shortened("short"), shortened("x" * 12, 10)
    ('One line, and…', 'short', 'xxxxxxxxxx…')
    """
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    start = line[: limit + 1]
    return (start.rsplit(" ", 1)[0] if " " in start else start[:limit]) + "…"
