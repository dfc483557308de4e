"""The distill stage: training of the student on the teacher's targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_distill.stages.context import Context as Context
from mlx_distill.stages.context import Facts, load_model
from mlx_distill.stages.pairing import aligned_rows
from mlx_distill.stages.training import check_training as check_training
from mlx_distill.stages.training import fine_tune, train_rows


def distill(context: Context, folder: Path, control: str | None = None) -> Facts:
    """Train the student on the teacher's targets; ``control`` trains on one thing alone: ``labels`` or
    ``text``.
    """
    from mlx_distill.data.chat import pad_id
    from mlx_distill.distill.align import collate_aligned_rows
    from mlx_distill.distill.objective import kd

    settings = context.recipe.distill
    check_training(context, {"distill"})
    model, tokenizer = load_model(context, "student_base")
    if control == "labels":
        return fine_tune(
            context, folder, "distill (labels alone)", model, tokenizer, "student_base", settings
        )
    if control == "text":
        settings = replace(settings, label_weight=0.0, token_weight=0.0, text_weight=1.0)
    train_pairs, valid_pairs, tokenizers = aligned_rows(context, folder, tokenizer, settings)
    pad, classes = pad_id(tokenizer), len(context.task.labels) + 1  # everything else is one too
    return train_rows(
        context,
        folder,
        "distill" if control is None else "distill (text alone)",
        model,
        "student_base",
        settings,
        kd(settings, **tokenizers),
        train_pairs,
        valid_pairs,
        lambda pairs, rows, multiple: collate_aligned_rows(pairs, rows, pad, classes, multiple),
    )
