"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"
_THIN = "\u202f"  # narrow no-break space, between a number and its unit
_MINUS = "\u2212"

_MODELS = {
    "teacher": "Teacher",
    "teacher_before": "Teacher before",
    "student_before": "Student before",
    "student": "Student",
    "quantized": "Quantized",
}
_CONTROLS = {"labels": "trained on the rows’ own answers alone", "text": "trained on the teacher’s text alone"}
_SERIES = {"loss": "loss", "valid_loss": "validation"}


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


def size(value: float | None) -> str:
    """Bytes in decimal units.

    >>> size(2_140_000).replace("\u202f", " ")
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
    """GB as :func:`size` writes bytes."""
    return NONE if value is None else size(value * 1e9)


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


def model_name(name: str) -> str:
    """A model's name in tables.

    >>> model_name("quantized"), model_name("student_labels")
    ('Quantized', 'Control: labels')
    """
    if name in _MODELS:
        return _MODELS[name]
    return f"Control: {_control(name)}"


def the_model(name: str) -> str:
    """A model in the middle of a sentence.

    >>> the_model("student_before"), the_model("student_text")
    ('the student before distillation', 'the control student (text)')
    """
    if name == "student_before":
        return "the student before distillation"
    if name == "quantized":
        return "the quantized student"
    if name == "teacher_before":
        return "the teacher before tuning"
    if name in _MODELS:
        return "the " + _MODELS[name].lower()
    return f"the control student ({_control(name)})"


def _control(name: str) -> str:
    return words(name.removeprefix("student_").removeprefix("control_"))


def control_note(name: str) -> str:
    """How a control was trained, where the name tells."""
    return _CONTROLS.get(_control(name), "")


def model_class(name: str) -> str:
    """The CSS class with a model's colour."""
    return f"m-{name.replace('_', '-')}" if name in _MODELS else "m-control"


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
