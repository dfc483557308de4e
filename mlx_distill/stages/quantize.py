"""The quantize stage: the student's weights are quantized, with the student's rows where there are some."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts, load_model
from mlx_distill.stages.label_calibration import calibrate_labels


def quantize(context: Context, folder: Path) -> Facts:
    """Quantize the student's weights, except those that are MXFP4 already."""
    from mlx_distill.models.quantize import quantize_into
    from mlx_distill.stages.refinement import refine_student

    settings, student = context.recipe.quantize, context.run / "student"
    refinement = refine_student(context, folder)
    report = quantize_into(
        student,
        folder,
        settings.mode,
        group_size=settings.group_size,
        adapter=settings.adapter,
        keep=settings.keep,
        chosen=refinement.quantizations,
        refined=refinement.refined,
        progress=context.progress,
    )
    model, tokenizer = load_model(context, "quantized", folder)
    labels = calibrate_labels(context, folder, "quantize", model, tokenizer)
    return {**report.facts(), **refinement.facts, **labels}
