"""The prepare stage: rows become chats that are validated, deduplicated and split."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts


def prepare(context: Context, folder: Path) -> Facts:
    """Read the rows of all sources and write the train, valid and test chats."""
    from mlx_distill.data import prepare as splits

    statistics = splits.prepare(
        context.recipe.data, context.task, context.recipe.base, folder, context.progress
    )
    left_out = sum(entry["count"] for entry in statistics["dropped"].values())
    return {"rows": statistics["rows"], "left_out": left_out, "warnings": statistics["warnings"]}
