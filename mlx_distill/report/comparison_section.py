"""Section of the report: the final model against the one that it replaces, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.evaluate.compare import gain
from mlx_distill.evaluate.comparison_text import shown_interval, shown_points, shown_value
from mlx_distill.metrics.paired import verdict
from mlx_distill.report.charts import nice_ticks
from mlx_distill.report.tables import Report
from mlx_distill.text import percent

_CLASSES = {"better": "good", "non_inferior": "good", "worse": "bad", "inconclusive": "open"}


def comparison(report: Report) -> dict[str, Any] | None:
    """The section: a forest plot with one row for each metric, and how many rows changed; None where nothing
    was compared.
    """
    facts = report.get("final_comparison")
    if not facts:
        return None
    low, high = report["task_details"]["score_scale"]
    rows = [_row(entry, facts, high - low) for entry in facts["metrics"]]
    ends = [abs(row["gain"][end]) for row in rows for end in ("low", "high") if row["gain"][end] is not None]
    return {"facts": facts, "rows": rows, "limit": nice_ticks(0.0, max([0.05, *ends]))[-1]}


def _row(entry: Mapping[str, Any], facts: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A metric: its difference in words, and as a share of its range, where more is better."""
    unit, better = entry["unit"], entry["higher_is_better"]
    share = 1.0 if unit == "rate" else scale
    towards = gain(entry["difference"], better)
    ends = {"value": towards["value"], "low": towards["low"], "high": towards["high"]}
    shares = {key: None if end is None else end / share for key, end in ends.items()}
    is_main = entry["metric"] == facts["metric"]
    shown = facts["verdict"] if is_main else verdict(towards)
    return {
        "title": entry["title"] + ("" if better else " (lower is better)"),
        "gain": shares | {"n": entry["n"]},
        "text": shown_points(entry["difference"]["value"], unit),
        "ends": "" if towards["low"] is None else shown_interval(entry["difference"], unit),
        **{side: _value(entry[side]["value"], unit) for side in "ab"},
        "margin": facts["margin"] if is_main else None,
        "class": _CLASSES[shown],
        "verdict": shown,
    }


def _value(value: float | None, unit: str) -> str:
    return percent(value) if unit == "rate" else shown_value(value, unit)
