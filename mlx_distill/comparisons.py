"""Compare two models, runs or files of predictions, and write the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.answer_rows import model_side
from mlx_distill.evaluate.compare import ModelComparison, compare_sides, parse_margin
from mlx_distill.evaluate.comparison_export import (
    check_out,
    write_comparison_csv,
    write_comparison_json,
    write_promptfoo,
)
from mlx_distill.evaluate.comparison_inputs import Reference, Side, read_reference, read_side
from mlx_distill.evaluate.comparison_people import add_extras, read_extras
from mlx_distill.evaluate.token_view import token_view
from mlx_distill.models.trained_on import is_model, read_trained_on
from mlx_distill.progress import Progress, make_progress
from mlx_distill.storage import os_errors, write_text
from mlx_distill.tasks.answer import dump_answer
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
    answers: str | Path = "comparisons",
    batch_size: int = 16,
    out: str | Path | Sequence[str | Path] = (),
    with_rows: bool = False,
    tokens: Sequence[str] = (),
    costs: str | Path | None = None,
    ratings: str | Path | None = None,
    judge: str | Path | None = None,
    judgements: str | Path | None = None,
    names: Sequence[str | None] = (None, None),
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
        constrained: Compare answers under the grammar of the task: those of runs that have them, and models
            write only what fits it.
        confidence: Level of the intervals.
        answers: The folder in which the answers of models are kept: the second time they need not answer.
        batch_size: Rows that a model answers together.
        out: Files to write, see :func:`write_comparison`.
        with_rows: Write titles, inputs and whole answers into them too.
        tokens: Ids of rows of which both models score A's answer, token by token.
        costs: A YAML file of prices (docs/costs.md): what a call of both costs, and what errors cost.
        ratings: A table of people's ratings: ``id``, ``model`` (``a``, ``b``, or as the comparison names
            them), ``rating`` from 1 to 5, ``rater``, ``gold_star``.
        judge: A model that says which answer is better, asked with both orders of the answers.
        judgements: A table of people's judgements of a random sample of the rows, ``id`` and ``better``
            (``a``, ``b``, ``tie``), by which the judge's are corrected: without it there is no judge.
        names: What the two are called, where the files are not to say it.
        progress: Where progress is shown.

    Returns:
        The comparison; its ``verdict`` is the first that holds of ``better``, ``non_inferior`` (needs a
        margin), ``worse`` and ``inconclusive``, by the paired interval.

    Raises:
        DataError: the two do not have the same rows with the same true answers, an id occurs twice, or a file
            cannot be read.
        ConfigError: a task, margin or metric that is none, or one that is needed and not given.
    """
    progress = progress or make_progress()
    files = [Path(path) for path in ([out] if isinstance(out, str | Path) else out)]
    for path in files:
        check_out(path)
    extras = read_extras(costs, ratings, judge, judgements)
    limit = parse_margin(margin) if margin is not None else None
    known = load_task(str(task)) if task is not None and not isinstance(task, Task) else task
    reference = None
    if rows is not None:
        known = known or next((t for t in map(_trained_task, (a, b)) if t is not None), None)
        if known is None:
            raise ConfigError(f"--rows {rows}: which task are they of?", fix="add --task TASK")
        reference = read_reference(rows, known)
    sides = [read_side(spec, known, reference, constrained=constrained) for spec in (a, b)]
    if None in sides:
        file, reference = _rows_for_models((a, b), sides, rows, reference, known)
        settings = {"keep": Path(answers), "constrained": constrained, "batch_size": batch_size}
        sides = [
            side or model_side(spec, file, known, **settings, progress=progress)  # type: ignore[arg-type]
            for spec, side in zip((a, b), sides, strict=True)
        ]
    sides = [_named(side, name) for side, name in zip(sides, names, strict=True)]
    result = compare_sides(
        *sides,  # type: ignore[arg-type]
        task=known,
        reference=reference,
        metric=metric,
        margin=limit,
        set_name=set_name,
        confidence=confidence,
    )
    if tokens:
        result = replace(result, tokens=_tokens(result, sides, rows, tokens, progress))  # type: ignore[arg-type]
    result = add_extras(result, extras, batch_size=batch_size, progress=progress)
    for path in files:
        write_comparison(result, path, with_rows=with_rows)
    return result


def _named(side: Side | None, name: str | None) -> Side | None:
    return replace(side, name=name, source=name) if side is not None and name else side


def _tokens(
    result: ModelComparison,
    sides: Sequence[Side],
    rows: str | Path | None,
    ids: Sequence[str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """What both models give to each piece of A's answers to chosen rows."""
    models = [side.version for side in sides]
    if not all(map(is_model, models)):
        side = next(side for side in sides if not is_model(side.version))
        raise ConfigError(
            f"--tokens: {side.source} has answers and no model", fix="compare two models, or models of runs"
        )
    run = next((side.run for side in sides if side.run is not None), None)
    if rows is None and run is None:
        raise ConfigError("--tokens: the rows are not known", fix="add --rows ROWS")
    file = run / "data" / "test.jsonl" if rows is None and run is not None else Path(resolve_asset(str(rows)))
    answers = {case["id"]: case["a"] for case in result.cases}
    unknown = [id for id in ids if id not in answers]
    if unknown:
        raise ConfigError(f"--tokens {unknown[0]}: no such row", fix="name ids of compared rows")
    texts = {
        id: answers[id]["text"]
        if answers[id]["answer"] is None
        else dump_answer(answers[id]["answer"], result.task.schema)
        for id in ids
    }
    tasks = tuple(side.task or result.task for side in sides)
    return token_view(tuple(models), file, tasks, texts, progress)  # type: ignore[arg-type]


def write_comparison(result: ModelComparison, path: str | Path, *, with_rows: bool = False) -> None:
    """Write a comparison as the kind of file that the name says: a page (``.html``), JSON, CSV, or a
    configuration of promptfoo (``.yaml``, with the test cases beside it, which always have the rows).

    Args:
        result: The comparison.
        path: The file.
        with_rows: Write titles, inputs and whole answers too, not only ids and labels.

    Raises:
        ConfigError: the name says no such kind.
    """
    path = Path(path)
    check_out(path)
    kind, facts, cases = path.suffix.lower(), result.facts, result.cases
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".json":
        write_comparison_json(path, facts, cases, with_rows=with_rows)
    elif kind == ".csv":
        write_comparison_csv(path, cases, with_rows=with_rows)
    elif kind == ".yaml":
        write_promptfoo(path, facts, cases, result.task.schema, result.task.label)
    else:
        from mlx_distill.report.comparison_page import render_comparison

        write_text(path, render_comparison(facts, cases, with_rows=with_rows, tokens=result.tokens))


def _trained_task(spec: str | Path) -> Task | None:
    """The task that the model in a folder was trained on, if that is one."""
    path = Path(spec).expanduser()
    trained_on = read_trained_on(path) if path.is_dir() else None
    return trained_on.task if trained_on is not None else None


def _rows_for_models(
    specs: tuple[str | Path, str | Path],
    sides: Sequence[Side | None],
    rows: str | Path | None,
    reference: Reference | None,
    task: Task | None,
) -> tuple[Path, Reference | None]:
    """The file with the rows that models answer, and their true answers: those of ``--rows``, else the
    held-out rows of the run on the other side.
    """
    if rows is not None:
        return Path(resolve_asset(str(rows))), reference
    run = next((side for side in sides if side is not None and side.run is not None), None)
    if run is None or run.run is None:
        model = next(spec for spec, side in zip(specs, sides, strict=True) if side is None)
        raise ConfigError(
            f"{model}: a model, and no rows that it could answer",
            fix="add --rows ROWS, where each row has id, the task's fields and answer; or give a run",
        )
    file = run.run / "data" / "test.jsonl"
    whole = read_reference(file, task or run.task)  # type: ignore[arg-type]
    asked = {row["id"] for row in run.rows}
    if len(asked) < len(whole.rows):
        raise ConfigError(
            f"{run.source}: only {len(asked):,} of its {len(whole.rows):,} held-out rows were evaluated",
            fix="evaluate all of them (evaluate.max_rows: 0), or give the rows: --rows",
        )
    return file, whole
