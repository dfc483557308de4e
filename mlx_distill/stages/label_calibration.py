"""Labels scored in a run: for the temperature that the stages which write a student fit, and by evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.stages.context import Context, Facts, read_rows

if TYPE_CHECKING:
    from mlx_distill.infer.label_temperature import LabelTemperature
    from mlx_distill.records import Prediction
    from mlx_distill.tasks.task import Task

MAX_ROWS = 2000
"""More validation rows than these would make the temperature no better than it needs to be."""


def calibrate_labels(context: Context, folder: Path, name: str, model: Any, tokenizer: Any) -> Facts:
    """Fit the temperature of a model's label probabilities on the validation rows, and keep it in its folder.

    Nothing is written for a task whose labels cannot be scored.

    Args:
        context: Of the run.
        folder: Of the model, with its weights.
        name: Of the stage, for the user.
        model: The model.
        tokenizer: Its tokenizer.

    Returns:
        A fact for the manifest.
    """
    from mlx_distill.infer.label_temperature import fit_label_temperature, write_label_temperature

    rows = labelled_valid_rows(context)
    title = f"{name}: calibrate labels"
    scored = score_labels(context, title, model, tokenizer, context.task, rows, "valid row")
    if scored is None:
        return {}
    fitted = fit_label_temperature(
        [prediction.label_probs for prediction in scored],
        [row["answer"][context.task.label] for row in rows],
        context.task,
        folder,
    )
    write_label_temperature(folder, fitted)
    context.progress.note(f"{name}: {_described(fitted)}")
    return {"label_temperature": fitted.temperature}


def labelled_valid_rows(context: Context) -> list[dict[str, Any]]:
    """The first validation rows that have a true label."""
    labelled = (row for row in read_rows(context, "valid") if (row["answer"] or {}).get(context.task.label))
    return list(islice(labelled, MAX_ROWS))


def score_labels(
    context: Context,
    title: str,
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    where: str,
) -> list[Prediction] | None:
    """The distribution over a task's labels behind each row's prompt; None where its labels cannot be scored.

    Args:
        context: Of the run.
        title: Of the progress bar.
        model: The model.
        tokenizer: Its tokenizer.
        task: Its labels, in the order of the answer.
        rows: Prepared rows.
        where: What a row is called in an error.
    """
    from mlx_distill.infer.label_scorer import LabelScorer
    from mlx_distill.infer.long_items import CutItem
    from mlx_distill.infer.predict import context_length, item_prompt, to_item, unread

    try:
        scorer = LabelScorer(model, tokenizer, task)
    except (ConfigError, ModelError):
        return None
    limit = context_length(model)

    def to_prompt(row: Any, where: str, task: Any) -> Any:
        item = to_item(row, task, where)
        prompt = item_prompt(tokenizer, item)
        too_long = limit is not None and len(prompt) > limit
        return unread(item, len(prompt), limit) if too_long else CutItem(item, prompt, {})

    model.eval()
    with context.progress.task(title, total=len(rows), unit="row") as bar:
        numbered = [(f"{where} {number}", row) for number, row in enumerate(rows, 1)]
        return scorer.label_rows(numbered, to_prompt, bar.update)


def _described(fitted: LabelTemperature) -> str:
    if fitted.temperature is None or fitted.before is None or fitted.after is None:
        return f"the label probabilities are not calibrated: {fitted.reason}"
    return (
        f"the label probabilities are calibrated at temperature {fitted.temperature:.3g}: on {fitted.rows} "
        f"validation rows the negative log-likelihood went from {fitted.before.nll:.3f} to "
        f"{fitted.after.nll:.3f} nats, the calibration error from {fitted.before.ece:.1%} to "
        f"{fitted.after.ece:.1%}"
    )
