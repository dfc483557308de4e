"""Figures, metrics and models as people read them: on a run's page, in the terminal, on a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
_THIN = "\u202f"  # narrow no-break space, between a number and its unit
_MINUS = "\u2212"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.913)
    '91.3\u202f%'
    """
    return NONE if value is None else f"{_hundredths(value, digits)}{_THIN}%"


def _hundredths(value: float, digits: int) -> str:
    # Nought and all are exact: they get no decimals.
    return f"{100 * value:.0f}" if value in (0.0, 1.0) else f"{100 * value:.{digits}f}"


def interval(estimate: Mapping[str, Any] | None, digits: int = 1) -> str:
    """The ends of a rate's interval.

    >>> interval({"value": 0.9, "low": 0.876, "high": 0.94, "n": 300})
    '87.6–94.0'
    """
    if not estimate or estimate.get("low") is None:
        return ""
    return f"{_hundredths(estimate['low'], digits)}–{_hundredths(estimate['high'], digits)}"


def signed_points(value: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> signed_points(-0.027)
    '\u22122.7'
    """
    if value is None:
        return NONE
    text = f"{abs(100 * value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else _MINUS) + text


def p_value(value: float | None) -> str:
    """A p-value with as many digits as mean something.

    >>> p_value(0.00004), p_value(0.0312), p_value(0.4)
    ('p < 0.001', 'p = 0.031', 'p = 0.40')
    """
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def seconds(value: float | None) -> str:
    """A duration.

    >>> [seconds(x).replace("\u202f", " ") for x in (0.00042, 0.0341, 2.41, 75, 7300)]
    ['0.42 ms', '34 ms', '2.41 s', '1 min 15 s', '2 h 1 min']
    """
    if value is None:
        return NONE
    if value < 0.9995:
        return f"{significant(1000 * value, 2)}{_THIN}ms"
    if value < 59.95:
        return f"{significant(value, 3)}{_THIN}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{_THIN}min {whole % 60}{_THIN}s"
    return f"{whole // 3600}{_THIN}h {whole % 3600 // 60}{_THIN}min"


def report_size(value: float | None) -> str:
    """Bytes in decimal units.

    >>> report_size(2_140_000).replace("\u202f", " ")
    '2.14 MB'
    """
    if value is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{significant(value, 3)}{_THIN}{unit}"


def gigabytes(value: float | None) -> str:
    """GB as :func:`report_size` writes bytes."""
    return NONE if value is None else report_size(value * 1e9)


def significant(value: float, digits: int) -> str:
    """A number with that many significant digits, thousands set apart, without an exponent.

    >>> significant(0.042042, 2), significant(1234.5, 3), significant(9.996, 3)
    ('0.042', '1,234', '10.0')
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = int(f"{abs(rounded):e}".split("e")[1])
    places = max(0, digits - 1 - magnitude)
    return f"{value:,.{places}f}"


def count(value: float | None) -> str:
    """A count with thousands set apart."""
    return NONE if value is None else f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def words(name: str) -> str:
    """An identifier as words.

    >>> words("grad_norm")
    'grad norm'
    """
    return name.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


_SERIES = {"loss": "loss", "valid_loss": "validation"}


def series_name(name: str) -> str:
    """A curve's name in a legend."""
    return _SERIES.get(name, words(name))


def text_of(value: Any) -> str:
    """A field of an answer in a table cell.

    >>> text_of(["a", "b"]), text_of(None), text_of(True), text_of([])
    ('a, b', '–', 'true', 'none')
    """
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value)) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {text_of(item)}" for key, item in value.items()) or "none"
    return str(value)


def beginning(text: str, most: int = 90) -> str:
    """The first words of a text, on one line.

    >>> beginning("One line,\\nand another one.", 20), beginning("short"), beginning("x" * 12, 10)
    ('One line, and…', 'short', 'xxxxxxxxxx…')
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    cut = line[: most + 1]
    return (cut.rsplit(" ", 1)[0] if " " in cut else cut[:most]) + "…"


def duration(seconds: float) -> str:
    """A span of time for people.

    >>> duration(7.4), duration(83), duration(3 * 3600 + 125)
    ('7 s', '1 min 23 s', '3 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> size(1), size(999), size(12_345), size(3.2e6), size(16e9)
    ('1 byte', '999 bytes', '12.3 kB', '3.2 MB', '16.0 GB')
    """
    if count < 1000:
        return counted(count, "byte")
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def counted(number: float | None, unit: str) -> str:
    """A number of things for people.

    >>> counted(1, "file"), counted(1200, "row"), counted(3, "MB")
    ('1 file', '1,200 rows', '3 MB')
    """
    if number is None:
        return ""
    if not unit:
        return f"{number:g}"
    return f"{number:,.0f} {unit if number == 1 else _plural(unit)}"


def _plural(unit: str) -> str:
    return unit if not unit or unit.isupper() else f"{unit}s"
