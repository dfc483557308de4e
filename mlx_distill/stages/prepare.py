"""The prepare stage: rows become chats that are validated, deduplicated and split."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts


def prepare(context: Context, folder: Path) -> Facts:
    """Read the rows of all sources, write the train, valid and test chats, and count their tokens."""
    from mlx_distill.data import prepare as splits
    from mlx_distill.stages.token_lengths import check_token_lengths

    statistics = splits.prepare(
        context.recipe.data, context.task, context.recipe.base, folder, context.progress
    )
    left_out = sum(entry["count"] for entry in statistics["dropped"].values())
    tokens, warnings = check_token_lengths(context, folder)
    for text in warnings:
        context.progress.note(f"prepare: warning: {text}")
    return {
        "rows": statistics["rows"],
        "left_out": left_out,
        "tokens": tokens,
        "warnings": [*statistics["warnings"], *warnings],
    }
