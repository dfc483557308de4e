"""Section of the report: how much of the teacher's distributions has a place in the student's tokens, and
settings that are known to harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.tables import Report
from mlx_distill.text import percent

_COLUMNS = {
    "Tokens": "tokens",
    "One token of the student": "one_to_one",
    "Mass that maps": "mapped",
    "Outside of top k": "tail",
    "Lost": "lost",
    "Several in one": "many_to_one",
}


def distillation(report: Report) -> dict[str, Any] | None:
    """The table by kind of text, and the warnings; None for a run that has not measured it."""
    facts = (report.get("distillation") or {}).get("preflight")
    if not facts:
        return None
    vocabulary = facts["vocabulary"]
    smaller = min(vocabulary["student"], vocabulary["teacher"])
    return {
        "facts": facts,
        "shared": None if vocabulary["same"] else percent(vocabulary["shared"] / smaller),
        "columns": list(_COLUMNS),
        "rows": {kind: _row(rates) for kind, rates in facts["kinds"].items()},
    }


def _row(rates: Mapping[str, Any]) -> dict[str, str]:
    rates = {"many_to_one": rates.get("packed"), **rates}  # its name in format 1
    return {
        title: f"{rates[key]:,}" if key == "tokens" else percent(rates[key])
        for title, key in _COLUMNS.items()
    }
