"""The convert stage: a Hugging Face checkpoint becomes an MLX folder."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts


def convert(context: Context, folder: Path, source: str, name: str) -> Facts:
    """Convert the Hugging Face checkpoint ``source`` to the run's model ``name``, numerically the same."""
    from mlx_distill.models.convert import convert_into

    settings = context.recipe.convert
    report = convert_into(
        source,
        folder,
        quantize=settings.quantize,
        dtype=settings.dtype,
        revision=settings.revision,
        progress=context.progress,
        name=f"convert {name}",
    )
    return {"source": source, **report.facts()}
