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
    return {"rows": statistics["rows"]} if "rows" in statistics else {}
