"""The quantize stage: the student's weights are quantized."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts


def quantize(context: Context, folder: Path) -> Facts:
    """Quantize the student's weights, except those that are MXFP4 already."""
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
