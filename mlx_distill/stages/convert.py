"""The convert stage: a Hugging Face checkpoint becomes an MLX folder."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts


def convert(context: Context, folder: Path, source: str, name: str) -> Facts:
    """Convert the Hugging Face checkpoint ``source`` to the run's model ``name``, numerically the same. A
    model that was trained before, as an adapter folder of ours, is merged into its base first.
    """
    from mlx_distill.models.convert import convert_into

    settings = context.recipe.convert
    merged = _merged(context, folder, source)
    report = convert_into(
        merged or source,
        folder,
        quantize=settings.quantize,
        dtype=settings.dtype,
        revision=None if merged else settings.revision,
        progress=context.progress,
        name=f"convert {name}",
    )
    return {"source": source, **report.facts()}


def _merged(context: Context, folder: Path, source: str) -> Path | None:
    """The whole model of an adapter folder, in the stage's scratch folder; None for any other source."""
    from mlx_distill.models.config_files import is_adapter
    from mlx_distill.models.export import to_hf
    from mlx_distill.models.hub import find_local
    from mlx_distill.storage import scratch

    local = find_local(source)
    if local is None or not is_adapter(local):
        return None
    merged = scratch(folder) / "merged"
    to_hf(local, merged, progress=context.progress)
    return merged
