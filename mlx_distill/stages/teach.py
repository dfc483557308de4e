"""The teach stage: fine-tuning of the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_distill.recipe import UNTRAINED
from mlx_distill.runtime import rank_and_size
from mlx_distill.stages.context import Context, Facts, as_teacher, load_model, read_rows
from mlx_distill.stages.training import check_training, fine_tune
from mlx_distill.text import counted
from mlx_distill.thinking import write_thinking


def teach(context: Context, folder: Path) -> Facts:
    """Fine-tune the teacher on the labelled rows, or take it as it is."""
    check_training(context, {"teach"})
    context, settings = as_teacher(context), context.recipe.teach
    if settings.method == UNTRAINED:
        return {} if rank_and_size()[0] else _untrained(context, folder)
    model, tokenizer = load_model(context, "teacher_base")
    _note_thinking(context)
    return fine_tune(context, folder, "teach", model, tokenizer, "teacher_base", settings)


def _note_thinking(context: Context) -> None:
    """Say which rows are trained with thinking, and which without."""
    task = context.task
    if task.is_chats:
        return
    rows = [row["messages"][-1] for row in read_rows(replace(context, thinking=True), "train")]
    thinking = sum("reasoning_content" in turn for turn in rows)
    if thinking and not context.thinking:
        context.progress.note(
            f"teach: the thinking of {counted(thinking, 'row')} is not trained (targets.thinking: none)"
        )
    elif context.thinking and thinking < len(rows):
        context.progress.note(
            f"teach: {counted(len(rows) - thinking, 'row')} of {len(rows)} have no thinking before their "
            "answer and are trained without"
        )


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
    write_thinking(folder, context.recipe.teacher_thinking)
    return {"steps": 0, "rows": 0, "tokens": 0, "seconds": 0.0}
