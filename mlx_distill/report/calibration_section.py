"""The sections of the report about label probabilities and about repeated answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mlx_distill.report.tables import Report
from mlx_distill.report.xy_charts import Axis, Series, xy_chart
from mlx_distill.run_models import model_class, model_title


def calibration(report: Report) -> dict[str, Any]:
    """The calibration of each model that was measured, with its charts."""
    metrics = report["metrics"]
    models = {name: entry for name, figures in metrics.items() if (entry := figures.get("calibration"))}
    if not models:
        return {}
    return {
        "models": models,
        "reliability": {
            name: _reliability_chart(name, entry["reliability"])
            for name, entry in models.items()
            if entry.get("reliability")
        },
        "risk": _risk_chart(
            {name: entry["risk_coverage"] for name, entry in models.items() if entry.get("risk_coverage")}
        ),
        "decided": {name: e["auto_decidable"] for name, e in models.items() if e.get("auto_decidable")},
        "transfer": {name: e["transfer"] for name, e in models.items() if e.get("transfer")},
        "orders": {
            name: orders for name, figures in metrics.items() if (orders := figures.get("label_orders"))
        },
    }


def repeats(report: Report) -> dict[str, Any]:
    """The repeated answers of each model that has some: (model, kind, figures), and the number of runs."""
    rows = [
        {"model": name, "kind": kind, "runs": found["runs"], **found[kind]}
        for name, figures in report["metrics"].items()
        if (found := figures.get("repeats"))
        for kind in ("shuffled", "sampled")
        if kind in found
    ]
    return {"rows": rows, "has_score": any(row["score_deviation"] for row in rows)} if rows else {}


def _reliability_chart(name: str, found: Mapping[str, Any]) -> Markup:
    """Accuracy against confidence, with the band in which a calibrated model would lie."""
    bins = found["bins"]
    series = Series(
        model_class(name),
        model_title(name),
        [(one["confidence"], one["accuracy"]["value"]) for one in bins],
        [(one["accuracy"]["low"], one["accuracy"]["high"]) for one in bins],
        joined=False,
    )
    band = [(one["confidence"], one["null_low"], one["null_high"]) for one in bins]
    lowest = min([one["confidence"] for one in bins])
    x = Axis(min(0.9, int(10 * lowest) / 10), 1.0, "confidence, %")
    label = f"{model_title(name)}: accuracy against confidence, {len(bins)} bins"
    return xy_chart([series], x, Axis(0.0, 1.0, "accuracy, %"), label, band=band, diagonal=True)


def _risk_chart(curves: Mapping[str, Any]) -> Markup | None:
    """Error among the rows that a model decides itself, against their share."""
    if not curves:
        return None
    highest = max(risk for points in curves.values() for _, risk in points)
    series = [
        Series(model_class(name), model_title(name), points, marked=False) for name, points in curves.items()
    ]
    top = min(1.0, max(0.1, int(10 * highest + 0.999) / 10))
    return xy_chart(
        series,
        Axis(0.0, 1.0, "rows decided, %"),
        Axis(0.0, top, "error, %"),
        f"Error of the most confident rows of {', '.join(map(model_title, curves))}, line at 5 %",
        level=0.05,
    )
