"""The prepare stage: rows to chats, checked, deduplicated and split."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context as Context
from mlx_distill.stages.context import Facts
from mlx_distill.stages.training import check_training as check_training


def prepare(context: Context, folder: Path) -> Facts:
    """Rows from everywhere to train, valid and test chats."""
    from mlx_distill.data import prepare as splits

    statistics = splits.prepare(
        context.recipe.data, context.task, context.recipe.base, folder, context.progress
    )
    return {"rows": statistics["rows"]} if "rows" in statistics else {}
