"""Compare two models, runs or files of predictions, and write the result."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.compare import ModelComparison, compare_sides, parse_margin
from mlx_distill.evaluate.comparison_inputs import Reference, Side, read_reference, read_side
from mlx_distill.progress import Progress
from mlx_distill.tasks.task import Task, load_task


def compare(
    a: str | Path,
    b: str | Path,
    task: str | Path | Task | None = None,
    rows: str | Path | None = None,
    *,
    margin: str | None = None,
    metric: str | None = None,
    set_name: str | None = None,
    constrained: bool = False,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> ModelComparison:
    """Compare two models on the same rows. The difference is B minus A.

    Args:
        a: What is to be replaced: a file of predictions (``predictions.jsonl``, a file of ``analyze``, or any
            tool's JSON lines with ``id`` and ``text``), the folder of a run (its final model), ``RUN:model``,
            or the folder of a model, which answers the rows.
        b: What is to replace it.
        task: A packaged task's name, the path of a YAML file, or a task; needed for files of other tools.
        rows: The rows that were asked, with ``id``, the task's fields and ``answer``; needed for files of
            other tools.
        margin: How much worse B may be and still count as good as A: ``3pt`` or ``5%`` of A's value.
        metric: A metric with one value a row; by default whether the label is right, or of a task without
            one the F1 of the answer.
        set_name: The set of held-out rows of a run that is compared; ``test`` by default.
        constrained: Compare the answers under the grammar of the task, of runs that have both.
        confidence: Level of the intervals.
        progress: Where progress is shown.

    Returns:
        The comparison; its ``verdict`` is the first that holds of ``better``, ``non_inferior`` (needs a
        margin), ``worse`` and ``inconclusive``, by the paired interval.

    Raises:
        DataError: the two do not have the same rows with the same true answers, an id occurs twice, or a file
            cannot be read.
        ConfigError: a task, margin or metric that is none, or one that is needed and not given.
    """
    limit = parse_margin(margin) if margin is not None else None
    known = load_task(str(task)) if task is not None and not isinstance(task, Task) else task
    reference = None
    if rows is not None:
        if known is None:
            raise ConfigError(f"--rows {rows}: which task are they of?", fix="add --task TASK")
        reference = read_reference(rows, known)
    sides = [_side(spec, known, reference, constrained) for spec in (a, b)]
    return compare_sides(
        *sides,
        task=known,
        reference=reference,
        metric=metric,
        margin=limit,
        set_name=set_name,
        confidence=confidence,
    )


def _side(spec: str | Path, task: Task | None, reference: Reference | None, constrained: bool) -> Side:
    side = read_side(spec, task, reference, constrained=constrained)
    if side is None:
        raise ConfigError(f"{spec}: a model", fix="let it answer first: mlx-distill analyze")
    return side
