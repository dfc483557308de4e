"""Figures, metrics and models as people read them: on a run's page, in the terminal, on a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
_THIN = "\u202f"  # narrow no-break space, between a number and its unit
_MINUS = "\u2212"

MODELS = {
    "teacher": "Teacher",
    "teacher_before": "Teacher before",
    "student_before": "Student before",
    "student": "Student",
    "quantized": "Quantized",
}
_CONTROLS = {"labels": "trained on the rows’ own answers alone", "text": "trained on the teacher’s text alone"}


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
    if name in MODELS:
        return MODELS[name]
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
    if name in MODELS:
        return "the " + MODELS[name].lower()
    return f"the control student ({_control(name)})"


def _control(name: str) -> str:
    return words(name.removeprefix("student_").removeprefix("control_"))


def control_note(name: str) -> str:
    """How a control was trained, where the name tells."""
    return _CONTROLS.get(_control(name), "")


def metric_heads(task: Mapping[str, Any]) -> dict[str, str]:
    """What heads the column of each metric.

    Args:
        task: A report's ``task_details``; may be empty.

    >>> metric_heads({"label": "tone"})["verdict_agreement"]
    'Same tone as teacher'
    """
    label, score = words(task.get("label") or "label"), words(task.get("score") or "score")
    tolerance = task.get("score_tolerance")
    return {
        "accuracy": "Right",
        "verdict_agreement": f"Same {label} as teacher",
        "agreement": f"…and {score} within {tolerance:g}" if tolerance is not None else f"…and near {score}",
        "json_valid": "Valid JSON",
        "macro_f1": "Macro F1",
        "score_gap": f"{score.capitalize()} apart from teacher",
        "precision": "Precision",
        "recall": "Recall",
        "f1": "F1",
        "false_positive_rate": "False positives",
        "false_negative_rate": "False negatives",
        "latency_s": "Median a row",
        "latency_p95_s": "95th percentile",
        "items_per_minute": "Rows a minute",
        "tokens_per_second": "Tokens a second",
        "peak_memory_gb": "Peak memory",
    }


def packing_note(evaluations: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why speeds and memory of a run's models do not compare; None where all computed alike.

    Args:
        evaluations: The settings of each model's evaluation; ``unpack`` says whether its packed weights were unpacked first.

    >>> packing_note({"teacher": {"unpack": True}, "quantized": {"unpack": False}})
    'The quantized student computed with packed weights, the teacher with unpacked ones: times, paces and peaks of the two do not compare.'
    >>> packing_note({"teacher": {"unpack": True}, "student": {"unpack": True}})
    """
    packed, unpacked = ([the_model(name) for name, entry in evaluations.items() if entry.get("unpack") is kind] for kind in (False, True))
    if not packed or not unpacked:
        return None
    first, rest = listed(packed), listed(unpacked)
    if len(unpacked) > 1 and len(packed) + len(unpacked) == len(evaluations):
        rest = "all others"
    return (
        f"{first[0].upper()}{first[1:]} computed with packed weights, {rest} with unpacked ones: "
        "times, paces and peaks of the two do not compare."
    )


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
