"""The figures of a version: what was measured of it, each with its unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.text import NONE, interval, percent, significant, words

SHARE = "share"
UNITS: Mapping[str, str] = {
    "accuracy": SHARE,
    "answer_f1": SHARE,
    "verdict_agreement": SHARE,
    "agreement": SHARE,
    "macro_f1": SHARE,
    "false_positive_rate": SHARE,
    "false_negative_rate": SHARE,
    "score_mae": "points",
    "json_valid": SHARE,
    "json_valid_constrained": SHARE,
    "accuracy_constrained": SHARE,
    "loss": "nats/token",
    "perplexity": "1",
    "token_accuracy": SHARE,
    "latency_s": "s",
    "latency_p95_s": "s",
    "first_token_s": "s",
    "items_per_minute": "rows/min",
    "peak_memory_gb": "GB",
}
"""The figures of a report that a version is described by, and their units: ``share`` is from 0 to 1,
``points`` are those of the task's score. The first one that was measured stands for the version in lists.
"""
_SHOWN = {SHARE: "", "1": "", "nats/token": " nats a token", "rows/min": ""}


def make_figure(name: str, value: Any) -> dict[str, Any]:
    """A figure of a report as ``version_info.json`` has it: ``value``, ``low`` and ``high`` (the ends of its
    interval, None of a figure without one), ``n`` (what it was measured on) and ``unit``.

    >>> make_figure("latency_s", 0.25)
    {'value': 0.25, 'low': None, 'high': None, 'n': None, 'unit': 's'}
    """
    parts = value if isinstance(value, Mapping) else {"value": value}
    return {key: parts.get(key) for key in ("value", "low", "high", "n")} | {"unit": UNITS.get(name)}


def figures_of(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures that were measured of a version, by name, also of one that was added before figures had
    units.

    Args:
        info: Its ``info``, see ``version_info.json``.
    """
    made = {name: make_figure(name, value) for name, value in (info.get("metrics") or {}).items()}
    known = [*(name for name in UNITS if name in made), *(name for name in made if name not in UNITS)]
    return {name: made[name] for name in known if made[name]["value"] is not None}


def figure_text(figure: Mapping[str, Any]) -> str:
    """A figure with its interval and unit, for people.

    >>> figure_text({"value": 0.931, "low": 0.9, "high": 0.951, "n": 320, "unit": "share"})
    '93.1\u202f% (90.0–95.1)'
    >>> figure_text(make_figure("loss", 2.0)), figure_text(make_figure("latency_s", {"value": 0.12345}))
    ('2.00 nats a token', '0.123 s')
    """
    value, low, high, unit = figure["value"], figure.get("low"), figure.get("high"), figure.get("unit")
    if value is None:
        return NONE
    if unit == SHARE:
        return f"{percent(value)} ({interval(figure)})" if low is not None else percent(value)
    ends = "" if low is None or high is None else f" ({significant(low, 3)}–{significant(high, 3)})"
    return f"{significant(value, 3)}{ends}{_SHOWN.get(unit or '1', f' {unit}')}"


def figure_title(name: str) -> str:
    """The name of a figure for people; its unit stands behind the value.

    >>> figure_title("latency_p95_s"), figure_title("peak_memory_gb"), figure_title("macro_f1")
    ('latency p95', 'peak memory', 'macro f1')
    """
    return words(name.removesuffix("_s").removesuffix("_gb"))


def main_figure(info: Mapping[str, Any]) -> str:
    """The figure that stands for a version in lists, such as ``accuracy 93.1 %``.

    >>> main_figure({"metrics": {"loss": {"value": 2.0}}}), main_figure({})
    ('loss 2.00 nats a token', 'not measured')
    """
    for name, figure in figures_of(info).items():
        return f"{figure_title(name)} {figure_text({**figure, 'low': None})}"
    return "not measured"
