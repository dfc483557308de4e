"""Section of the report: the audit of a run's trainings (:mod:`mlx_distill.evaluate.audit`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.evaluate.audit import SETS
from mlx_distill.report.tables import Report
from mlx_distill.text import MINUS, NONE, counted, percent, signed_number, significant, size

_COLUMNS = {"train": "Training rows", "valid": "Validation rows", "general": "General text"}
_TERMS = ("label", "token", "text")


def audit(report: Report) -> dict[str, Any] | None:
    """The tables and warnings of the audit; None for a run without one."""
    figures = report.get("audit")
    if not figures:
        return None
    text = figures["facts"]["general_text"]
    return {
        "figures": figures,
        "general": f"{size(text['bytes'], page=True)} in {text['paragraphs']} paragraphs of {text['name']}",
        "columns": {name: title for name, title in _COLUMNS.items() if _measured(figures, name)},
        "bits": {model: _bits(figures, model) for model in figures["bits_per_byte"]},
        "terms": _terms(figures["parts"]),
        "kinds": _kinds(figures["parts"]),
        "divergence": {model: _divergence(entry) for model, entry in figures["divergence"].items()},
    }


def _measured(figures: Mapping[str, Any], name: str) -> bool:
    return any(name in sets for sets in figures["bits_per_byte"].values())


def _bits(figures: Mapping[str, Any], model: str) -> dict[str, tuple[str, str]]:
    """Bits a byte of a model on each set, and of a trained one the change."""
    changes = figures["changes"].get(model, {})
    out = {}
    for name in SETS:
        estimate = figures["bits_per_byte"][model].get(name)
        if estimate is not None:
            value = estimate["value"]
            out[name] = NONE if value is None else significant(value, 3), _change(changes.get(name))
    return out


def _change(change: Mapping[str, Any] | None) -> str:
    if change is None or change["relative"] is None:
        return ""
    ends = ""
    if change["low"] is not None:
        ends = f" [{signed_number(change['low'], 2)} to {signed_number(change['high'], 2)}]"
    sign = MINUS if change["relative"] < 0 else "+"
    return f"{signed_number(change['value'], 2)}{ends}, {sign}{percent(abs(change['relative']))}"


def _terms(parts: Mapping[str, Any]) -> dict[str, str]:
    """The terms of the loss with their coefficients, as columns."""
    terms = next(iter(parts.values()))["terms"] if parts else {}
    names = [*(name for name in _TERMS if name in terms), *(name for name in terms if name not in _TERMS)]
    return {name: f"{name.capitalize()} (times {terms[name]['coefficient']:g})" for name in names}


def _kinds(parts: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, str]]]:
    """By kind of token and term the student's mean loss, and what it was before, its events and its share."""
    after, before = parts.get("student"), parts.get("student_before")
    if not after or not before:
        return {}
    kinds = dict.fromkeys(kind for term in after["terms"].values() for kind in term["kinds"])
    out = {
        kind: {
            name: _part(term["kinds"].get(kind), before["terms"][name]["kinds"].get(kind))
            for name, term in after["terms"].items()
        }
        for kind in kinds
    }
    out["all"] = {name: _part(term, before["terms"][name]) for name, term in after["terms"].items()}
    return out


def _part(after: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> tuple[str, str]:
    if after is None or before is None:
        return NONE, ""
    share = f", {percent(after['share'])} of the loss" if after.get("share") is not None else ""
    return _nats(after["mean"]), f"before {_nats(before['mean'])}, {counted(after['events'], 'event')}{share}"


def _nats(value: float) -> str:
    return significant(value, 3) if value >= 0.001 else "below 0.001"


def _divergence(entry: Mapping[str, Any]) -> dict[str, str]:
    worst, kept = entry["worst"], entry["kept"]
    return {
        "Positions": f"{entry['positions']:,}",
        "From the cache": significant(entry["cached"], 4),
        "Exact": significant(entry["exact"], 4),
        "Lost": percent(entry["lost"], 2),
        "Mass in the tail": percent(entry["tail"], 2),
        "Lost where the top k has 99.5 %": (
            f"{percent(kept['lost'], 2)} ({counted(kept['positions'], 'position')})"
            if kept["positions"]
            else NONE
        ),
        "Worst position": (
            f"{significant(worst['cached'], 3)} for {significant(worst['exact'], 3)}, tail "
            f"{percent(worst['tail'], 1)}"
            if worst
            else NONE
        ),
    }
