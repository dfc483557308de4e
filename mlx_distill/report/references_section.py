"""The section of claims that were checked: invalid ones by field and model."""

from __future__ import annotations

from typing import Any

from mlx_distill.report.tables import Report


def references(report: Report) -> dict[str, Any] | None:
    """The figures of each model, and by field those of each model's claims and of their support; None for a
    task without checkers.
    """
    models = {name: figures for name, figures in report["metrics"].items() if figures.get("references")}
    if not models:
        return None
    fields: dict[str, dict[str, Any]] = {}
    for name, figures in models.items():
        for field, entry in figures["references"].items():
            shown = fields.setdefault(
                field, {"checker": None, "versification": None, "checked": {}, "support": {}}
            )
            if "per_claim" in entry:
                shown |= {key: entry[key] for key in ("checker", "versification")}
                shown["checked"][name] = entry
            if "support" in entry:
                shown["support"][name] = entry["support"]
    return {"models": models, "fields": fields}
