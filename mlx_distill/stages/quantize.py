"""The quantize stage: the student to few bits."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context as Context
from mlx_distill.stages.context import Facts
from mlx_distill.stages.training import check_training as check_training


def quantize(context: Context, folder: Path) -> Facts:
    """Bring what is not MXFP4 already to few bits."""
    from mlx_distill.models.quantize import quantize_into

    settings = context.recipe.quantize
    return quantize_into(
        context.run / "student",
        folder,
        settings.mode,
        group_size=settings.group_size,
        adapter=settings.adapter,
        keep=settings.keep,
        progress=context.progress,
    ).facts()
