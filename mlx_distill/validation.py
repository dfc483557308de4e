"""Cross-validation of a recipe: one run a fold, their answers pooled, and a page.

Every fold is an ordinary run in a folder of its own, with ``data.folds`` and ``data.fold`` set, so it is
resumed, inspected and made again as any run. Converted models are made once and linked into the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_distill.config import Overrides, override_texts, to_mapping
from mlx_distill.data.predictions import pool_predictions, read_predictions
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.cross_validation import (
    check_fold,
    check_partition,
    learning_curve,
    pooled_figures,
)
from mlx_distill.evaluate.goals import goal_text, judge_goals
from mlx_distill.evaluate.suite import MAIN_SET, evaluate_models
from mlx_distill.graph import Stage
from mlx_distill.metrics.classification import Row
from mlx_distill.pipeline import run, stop_flag
from mlx_distill.progress import Bar, NullProgress, Progress, events_of, make_progress
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.report.validation_page import ValidationReport, write_validation
from mlx_distill.run_models import RUN_MODELS
from mlx_distill.runtime import StopFlag, machine, versions
from mlx_distill.status import current_key
from mlx_distill.storage import link_stage, lock_folder, read_manifest, recover
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, duration, known_names, listed
from mlx_distill.validation_plan import (
    FoldRun,
    FoldRuns,
    ValidationPlan,
    make_plan,
    row_counts,
    stage_seconds,
)

FORMAT = 1


def validate(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    folds: int = 5,
    models: Sequence[str] = ("teacher",),
    learning_curve: bool | str = False,
    overrides: Overrides = (),
    dry_run: bool = False,
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> ValidationReport | ValidationPlan:
    """Cross-validate a recipe: train and test it once a fold, so that every row is tested once by a model
    that has not seen it.

    Folds are stratified by the label and ``data.stratify``; near duplicates, and rows with the same value of
    the task's ``cluster`` field, are in one fold. Rows that ask for the test split are left alone. The same
    call continues what was interrupted.

    Args:
        recipe: A packaged recipe's name, a YAML file, or a :class:`~mlx_distill.recipe.Recipe`.
        out: The folder for the runs of all folds and the result; ``runs/NAME-validation`` by default.
        folds: How many, 2 or more.
        models: The models that are measured. ``teacher`` trains the teacher alone; ``student`` and
            ``quantized`` need the whole chain in every fold.
        learning_curve: Train the teacher on 25, 50 and 75 % of the training rows too, of one fold (True or
            ``"one"``) or of ``"each"``.
        overrides: Keys of the recipe to set, as for :func:`mlx_distill.pipeline.run`.
        dry_run: Return the :class:`ValidationPlan` and write nothing.
        progress: Where progress is shown.
        stop: Set it from another thread to stop at the next safe point.

    Returns:
        The report, which is in ``validation.json`` and ``validation.html`` too; with ``dry_run`` the plan.

    Raises:
        ConfigError: fewer than two folds, an unknown model, a learning curve without the teacher.
        DataError: a test row among the training rows of its fold, or fewer groups of rows than folds.
        Interrupted: it was stopped; the same call continues it.
    """
    loaded = load_recipe(recipe, overrides)
    out = Path(out) if out is not None else Path("runs") / f"{loaded.name}-validation"
    curve = "one" if learning_curve is True else learning_curve or None
    _check(folds, models, curve)
    validation = FoldRuns(
        recipe,
        loaded,
        loaded.load_task(),
        out,
        folds,
        tuple(dict.fromkeys(models)),
        curve,
        tuple(override_texts(overrides)),
    )
    if dry_run:
        return _dry_plan(validation)
    progress = progress or make_progress()
    with lock_folder(out), stop_flag(stop) as flag:
        for one in validation.runs:
            _prepare(validation, one, flag, progress)
        whole = validation.runs[:folds]
        check_partition([one.folder / "data" for one in whole], validation.task)
        plan = make_plan(validation)
        for line in plan.lines:
            progress.note(line)
        for number, one in enumerate(validation.runs, 1):
            _make(validation, one, number, flag, progress)
        return write_validation(out, _result(validation))


def _check(folds: int, models: Sequence[str], curve: str | None) -> None:
    if folds < 2:
        raise ConfigError(f"{counted(folds, 'fold')}", fix="2 or more, such as --folds 5")
    known = [name for name, model in RUN_MODELS.items() if model.role != "control"]
    for name in models:
        if name not in known:
            raise ConfigError(f"no model {name!r}", fix=known_names(name, known, "models"))
    if not models:
        raise ConfigError("no models", fix=f"name some of {listed(known)}")
    if curve not in (None, "one", "each"):
        raise ConfigError(f"learning_curve is {curve!r}", fix="one or each")
    if curve and "teacher" not in models:
        raise ConfigError(
            "a learning curve is that of the teacher, which is not among the models",
            fix="add teacher to models",
        )


class _Named:
    """Passes progress on under the name of a fold."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name, self.events = progress, name, events_of(progress)

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Bar]:
        with self.progress.task(f"{self.name}: {name}", total, unit, start) as bar:
            yield bar

    def note(self, text: str) -> None:
        self.progress.note(f"{self.name}: {text}")


def _prepare(validation: FoldRuns, one: FoldRun, flag: StopFlag, progress: Progress) -> None:
    """Write the rows of a fold, and check that no test row is among its training rows."""
    named = _Named(progress, one.name)
    run(validation.spec, one.folder, overrides=one.overrides, only="prepare", progress=named, stop=flag)
    check_fold(one.folder / "data", validation.task)
    validation.counts[one.folder] = row_counts(one.folder)


def _make(validation: FoldRuns, one: FoldRun, number: int, flag: StopFlag, progress: Progress) -> None:
    """Make the run of a fold, and say how long the others will take."""
    name = f"{one.name} ({number} of {len(validation.runs)})"
    named = _Named(progress, name)
    stages = validation.stages(one)
    for stage in stages:
        if stage.command == "convert":
            _share(validation, one, stage)
    before = {stage.name: stage_seconds(one.folder, stage) for stage in stages}
    run(
        validation.spec,
        one.folder,
        overrides=one.overrides,
        models=one.models,
        progress=named,
        stop=flag,
    )
    if any(before[stage.name] != stage_seconds(one.folder, stage) for stage in stages):
        plan = make_plan(validation)
        if number < len(validation.runs) and plan.seconds:
            named.note(f"done; about {duration(plan.seconds)} left, as {plan.measured} took")


def _share(validation: FoldRuns, one: FoldRun, stage: Stage) -> None:
    """Link a converted model that another fold has made already."""
    key = current_key(stage, {})
    for other in (one, *(other for other in validation.runs if other != one)):
        recover(other.folder / stage.name)
        manifest = read_manifest(other.folder / stage.name)
        if manifest is not None and manifest.key == key:
            if other != one:
                link_stage(other.folder / stage.name, one.folder / stage.name)
            return


def _dry_plan(validation: FoldRuns) -> ValidationPlan:
    """The plan, with the rows counted in a temporary folder where no fold is prepared."""
    for one in validation.runs:
        if (one.folder / "data").is_dir():
            validation.counts[one.folder] = row_counts(one.folder)
    first = validation.runs[0]
    if first.folder not in validation.counts:
        with TemporaryDirectory(prefix="mlx-distill-") as folder:
            run(
                validation.spec,
                folder,
                overrides=first.overrides,
                only="prepare",
                progress=NullProgress(),
            )
            validation.counts[first.folder] = row_counts(Path(folder))
    return make_plan(validation)


def _result(validation: FoldRuns) -> dict[str, Any]:
    """The content of ``validation.json``; the pooled predictions are written beside it."""
    whole = validation.runs[: validation.folds]
    task, confidence = validation.task, validation.recipe.evaluate.confidence
    pooled = {
        model: pool_predictions(
            [one.folder / "evaluations" / model for one in whole],
            validation.out / "predictions" / f"{model}.jsonl",
        )
        for model in validation.models
    }
    recipe = to_mapping(validation.recipe)
    train_rows = [validation.counts[one.folder]["train"] for one in whole]
    compared = pooled_figures(pooled, task, train_rows, confidence=confidence)
    metric, figures = "accuracy" if task.label else "answer_f1", _metrics(pooled, task, confidence)
    for name, figure in compared["figures"].items():  # over clusters, where the task has some
        figures[name][metric] = figure["estimate"]
    return {
        "format": FORMAT,
        "name": validation.recipe.name,
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "confidence": confidence,
        "metric": metric,
        "cluster": task.cluster,
        "models": list(validation.models),
        "folds": [_fold_facts(validation, one) for one in whole],
        **compared,
        "metrics": figures,
        "goals": [
            goal | {"text": goal_text(goal)}
            for goal in judge_goals(recipe["goals"], {"metrics": figures}, task)
        ],
        "learning_curve": _curve(validation) if validation.curve else None,
        "settings": recipe,
        "versions": versions(),
        "machine": machine(),
    }


def _metrics(models: Mapping[str, Sequence[Row]], task: Task, confidence: float) -> dict[str, Any]:
    """All metrics of each model over the pooled rows of all sets."""
    one_set = {name: [{**row, "set": MAIN_SET} for row in rows] for name, rows in models.items()}
    measured = evaluate_models(one_set, task, confidence=confidence)
    return dict(measured["by_set"][MAIN_SET])


def _fold_facts(validation: FoldRuns, one: FoldRun) -> dict[str, Any]:
    stages = validation.stages(one)
    return {
        "fold": one.fold,
        "folder": one.folder.name,
        "rows": validation.counts[one.folder],
        "seconds": {
            stage.name: stage_seconds(one.folder, stage) for stage in stages if stage.command != "convert"
        },
    }


def _curve(validation: FoldRuns) -> dict[str, Any]:
    """The learning curve of the teacher."""
    points = []
    for share in (*validation.shares, 1.0):
        chosen = [
            one
            for one in validation.runs
            if one.share == share and one.fold in validation.curve_folds and "teacher" in one.models
        ]
        rows = [row for one in chosen for row in read_predictions(one.folder / "evaluations" / "teacher")[1]]
        trained = [validation.counts[one.folder]["train"] for one in chosen]
        points.append((share, round(sum(trained) / len(trained)), rows))
    found = learning_curve(points, validation.task, confidence=validation.recipe.evaluate.confidence)
    return {"folds": len(validation.curve_folds), "steps_fixed": bool(validation.recipe.teach.steps), **found}
