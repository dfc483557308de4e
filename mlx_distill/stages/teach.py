"""The teach stage: fine-tuning of the teacher."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.recipe import UNTRAINED
from mlx_distill.runtime import rank_and_size
from mlx_distill.stages.context import Context, Facts, as_teacher, load_model, read_rows
from mlx_distill.stages.training import check_training, fine_tune


def teach(context: Context, folder: Path) -> Facts:
    """Fine-tune the teacher on the labelled rows, or take it as it is."""
    check_training(context, {"teach"})
    context, settings = as_teacher(context), context.recipe.teach
    if settings.method == UNTRAINED:
        return {} if rank_and_size()[0] else _untrained(context, folder)
    model, tokenizer = load_model(context, "teacher_base")
    return fine_tune(context, folder, "teach", model, tokenizer, "teacher_base", settings)


def _untrained(context: Context, folder: Path) -> Facts:
    """Write the base as the teacher: beside it an adapter that adds zeros, so that all that reads a teacher
    reads this one.
    """
    from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
    from mlx_distill.models.trained_on import write_trained_on

    model, _ = load_model(context, "teacher_base")
    settings = LoraSettings(1, 1.0, 0.0, context.recipe.teach.target_modules[:1])
    add_lora(model, settings, 0)
    save_adapter(model, folder, settings, context.run / "teacher_base")
    write_trained_on(folder, context.task, read_rows(context, "train"))
    return {"steps": 0, "rows": 0, "tokens": 0, "seconds": 0.0}
