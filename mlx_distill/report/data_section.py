"""Section of the report: the rows that were read, left out, and held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.tables import Report

_MAX_LABELS = 8  # as many have a column each
_SPLITS = {"train": "Training", "valid": "Validation", "test": "Held out"}


def data(report: Report) -> dict[str, Any] | None:
    """The section: rows of each split and label, and why rows were left out; None where the run does not say.

    ``same`` and ``near`` count the rows left out as duplicates and near duplicates, ``leaked`` those of them
    that had a held-out row as their twin.
    """
    facts = report.get("data")
    if not facts:
        return None
    dropped: Mapping[str, Any] = facts["dropped"]
    counts = {reason: entry["count"] for reason, entry in dropped.items()}
    labels = report["task_details"]["labels"]
    return {
        "read": facts["read"],
        "left_out": sum(counts.values()),
        "dropped": dropped,
        "splits": {_SPLITS[split]: split for split in facts["rows"]},
        "rows": facts["rows"],
        "sets": facts["sets"] if len(facts["sets"]) > 1 else {},
        "labels": labels if len(labels) <= _MAX_LABELS else [],
        "of_label": facts["labels"],
        "same": sum(count for reason, count in counts.items() if reason.startswith("duplicate")),
        "near": sum(count for reason, count in counts.items() if reason.startswith("near duplicate")),
        "leaked": sum(count for reason, count in counts.items() if "of a held-out row" in reason),
        "clusters": facts.get("near_duplicates"),
        "similarity": facts.get("similarity"),
    }
