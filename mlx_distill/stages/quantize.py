"""The quantize stage: the student's weights are quantized."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_distill.stages.context import Context, Facts, load_model
from mlx_distill.stages.label_calibration import calibrate_labels


def quantize(context: Context, folder: Path) -> Facts:
    """Quantize the student's weights, except those that are MXFP4 already."""
    from mlx_distill.models.quantize import quantize_into
    from mlx_distill.models.trained_on import TRAINED_ON

    settings, student = context.recipe.quantize, context.run / "student"
    if (student / TRAINED_ON).is_file():
        shutil.copyfile(student / TRAINED_ON, folder / TRAINED_ON)
    facts = quantize_into(
        student,
        folder,
        settings.mode,
        group_size=settings.group_size,
        adapter=settings.adapter,
        keep=settings.keep,
        progress=context.progress,
    ).facts()
    model, tokenizer = load_model(context, "quantized", folder)
    return facts | calibrate_labels(context, folder, "quantize", model, tokenizer)
