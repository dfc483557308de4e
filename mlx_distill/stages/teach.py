"""The teach stage: fine-tuning of the teacher."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.stages.context import Context, Facts, as_teacher, load_model
from mlx_distill.stages.training import check_training, fine_tune


def teach(context: Context, folder: Path) -> Facts:
    """Fine-tune the teacher on the labelled rows."""
    check_training(context, {"teach"})
    context = as_teacher(context)
    model, tokenizer = load_model(context, "teacher_base")
    return fine_tune(context, folder, "teach", model, tokenizer, "teacher_base", context.recipe.teach)
