"""The report of a run as a dict: metrics of each model, comparisons, disagreements, provenance.

All metrics are computed from ``predictions.jsonl`` by :mod:`mlx_distill.evaluate.suite`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.data.evaluation_files import LABEL_ORDERS, REPEATS, read_lines
from mlx_distill.data.predictions import read_predictions
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.artifact import read_checks
from mlx_distill.evaluate.attribution import attribute
from mlx_distill.evaluate.calibration import calibration_figures
from mlx_distill.evaluate.costs import Prices, run_costs
from mlx_distill.evaluate.edge_cases import FILE_NAME as EDGE_CASES
from mlx_distill.evaluate.edge_cases import edge_case_metrics
from mlx_distill.evaluate.figures import compared_fields
from mlx_distill.evaluate.goals import judge_goals
from mlx_distill.evaluate.registry import task_metrics
from mlx_distill.evaluate.repeats import order_figures, repeat_figures
from mlx_distill.evaluate.suite import TEACHER, evaluate_models, in_set, majority
from mlx_distill.metrics.classification import Row
from mlx_distill.report import provenance
from mlx_distill.report.answer import answer, compare_final, final_pair
from mlx_distill.report.diagnosis import Finding, diagnose, finding
from mlx_distill.run_models import RESULTS, run_model
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task

FORMAT = 1
MAX_DISAGREEMENTS = 40
"""The number of disagreements that are listed for each model."""


def build_report(
    run: str | Path,
    recipe: Mapping[str, Any],
    task: Task,
    evaluations: Mapping[str, str | Path],
    *,
    confidence: float = 0.95,
    margin: str | None = None,
    goals: Sequence[Mapping[str, Any]] = (),
    prices: Prices | None = None,
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """Measure every model of a run and collect the facts about it.

    Args:
        run: The run's folder: sizes, training curves and manifests are read from its stages.
        recipe: The recipe as a plain mapping (``config.to_mapping(recipe)``).
        task: The task of the run.
        evaluations: Model name to its ``predictions.jsonl`` (or the folder that holds it), in the order of
            the tables. ``teacher`` is the reference of every agreement; :mod:`mlx_distill.run_models` says
            which of the others are controls.
        confidence: Level of the intervals.
        margin: How much worse than the teacher is still as good, such as ``3pt``; None for none.
        goals: ``{"model", "metric", "at_least" or "at_most"}``, see :mod:`mlx_distill.evaluate.goals`.
        prices: Of :func:`mlx_distill.evaluate.costs.read_prices`; None: no costs.
        findings: What is known to be wrong with the run's stages; the diagnosis begins with it.

    Returns:
        The report as plain JSON values: ``answer`` (is the final model as good as the one that it replaces),
        ``metrics`` (of the set ``test``), ``by_set``, ``comparisons``,
        ``disagreements``, ``sizes``, ``curves``, ``provenance``, ``diagnosis`` (what is wrong with the
        result). A rate is ``{"value", "low", "high", "n"}``; what was not measured is None, and what the task
        does not have is absent.

    Raises:
        DataError: predictions that are empty, of another format, or lack a field, with file and line.
        ConfigError: no evaluations.
    """
    if not evaluations:
        raise ConfigError(
            "a report needs the predictions of at least one model", fix="run: mlx-distill evaluate RECIPE"
        )
    run = Path(run)
    headers, rows, folders = {}, {}, {}
    for name, path in evaluations.items():
        path = Path(path)
        headers[name], rows[name] = read_predictions(path)
        folders[name] = path if path.is_dir() else path.parent
    measured = _measure(run, task, headers, rows, folders, confidence)
    by_set, main = measured["by_set"], measured["main_set"]
    own = {name: in_set(predictions, main) for name, predictions in rows.items()}
    comparison, failed = _final_comparison(rows, task, main, margin, confidence)
    report: dict[str, Any] = {
        **heading(run, recipe, task, confidence, main, measured["sets"]),
        "task_details": _task_details(task),
        "models": list(evaluations),
        "controls": [name for name in evaluations if run_model(name).role == "control"],
        "answer": answer(comparison),
        "final_comparison": comparison,
        "metrics": by_set[main],
        "by_set": by_set,
        "comparisons": measured["comparisons"],
        "group_changes": measured["group_changes"],
        "attribution": attribute(own, task, confidence=confidence),
        "disagreements": _disagreements(rows, task),
        **provenance.run_facts(run, recipe, headers, folders, confidence),
        "majority": majority(by_set[main]),
        "artifact": {"checks": read_checks(run)},
    }
    if prices is not None:
        own = {name: predictions for name, predictions in own.items() if predictions}
        report["costs"] = run_costs(prices, report, own, task, final_pair(list(own)))
    report["goals"] = judge_goals(goals, report, task)
    return report | {"diagnosis": [*findings, *failed, *diagnose(report)]}


def heading(
    run: Path,
    recipe: Mapping[str, Any],
    task: Task,
    confidence: float,
    main: str,
    sets: Mapping[str, int],
) -> dict[str, Any]:
    """The first keys of every report: of what, when, and on which sets of rows."""
    return {
        "format": FORMAT,
        "name": str(recipe.get("name") or run.resolve().name),
        "description": str(recipe.get("description") or ""),
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "confidence": confidence,
        "main_set": main,
        "sets": dict(sets),
    }


def _final_comparison(
    models: Mapping[str, Sequence[Row]], task: Task, main: str, margin: str | None, confidence: float
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The final comparison, or why there is none: the other figures stand without it."""
    try:
        return compare_final(models, task, main, margin, confidence), []
    except DataError as error:
        fix = error.fix or "compare with another margin, or on other rows"
        return None, [finding("the final model is not compared", error.message, fix)]


def _measure(
    run: Path,
    task: Task,
    headers: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Sequence[Row]],
    folders: Mapping[str, Path],
    confidence: float,
) -> dict[str, Any]:
    """The figures of the predictions, and on the main set what the evaluations recorded of speed, memory and
    the models' label temperatures.
    """
    constrained = {name for name, header in headers.items() if header["constrained"]}
    measured = evaluate_models(rows, task, constrained=constrained, confidence=confidence)
    main = measured["main_set"]
    for models in measured["by_set"].values():
        for model, figures in models.items():
            models[model] = {**figures, "peak_memory_gb": None, **dict.fromkeys(provenance.SPEED)}
    for model, figures in measured["by_set"][main].items():
        figures["peak_memory_gb"] = provenance.peak_memory_gb(headers[model], folders[model])
        figures |= provenance.speed(folders[model])
        figures |= _edge_cases(folders[model], confidence)
        figures |= _variation(folders[model], in_set(rows[model], main), task, confidence)
    if task.label:
        calibrated = calibration_figures(
            {model: in_set(rows[model], main) for model in measured["by_set"][main]},
            folders,
            {model: run / run_model(model).folder for model in rows},
            task,
            confidence=confidence,
        )
        for model, entry in calibrated.items():
            measured["by_set"][main][model]["calibration"] = entry
    return measured


def _variation(folder: Path, rows: Sequence[Row], task: Task, confidence: float) -> dict[str, Any]:
    """What an evaluation kept of repeated answers, and of other orders of the labels."""
    out: dict[str, Any] = {}
    if repeats := read_lines(folder / REPEATS):
        out["repeats"] = repeat_figures(*repeats, rows, task, confidence=confidence)
    if orders := read_lines(folder / LABEL_ORDERS):
        out["label_orders"] = order_figures(*orders, rows, confidence=confidence)
    return out


def _edge_cases(folder: Path, confidence: float) -> dict[str, Any]:
    """How a model handled the edge cases; empty where it was not asked."""
    path = folder / EDGE_CASES
    if not path.is_file():
        return {}
    return {"edge_cases": edge_case_metrics([line for _, line in read_jsonl(path)], confidence=confidence)}


def _disagreements(models: Mapping[str, Sequence[Row]], task: Task) -> dict[str, Any]:
    """The rows on which each model that the run is made for differs from the teacher."""
    teacher = models.get(TEACHER)
    if teacher is None:
        return {}
    return {name: _differing(models[name], teacher, task) for name in models if name in RESULTS}


def _differing(rows: Sequence[Row], teacher: Sequence[Row], task: Task) -> dict[str, Any]:
    if task.label is None:
        items = m.differing_answers(rows, teacher, *compared_fields(task))
    else:
        items = m.disagreements(rows, teacher, task.labels, list(task.schema["properties"]))
    return {"count": len(items), "of": len(rows), "rows": items[:MAX_DISAGREEMENTS]}


def _task_details(task: Task) -> dict[str, Any]:
    """The part of a task that the report shows."""
    return {
        "description": task.description,
        "label": task.label,
        "labels": list(task.labels),
        "positive": list(task.positive),
        "score": task.score,
        "score_tolerance": task.score_tolerance,
        "score_scale": list(task.score_scale),
        "slices": list(task.slices),
        "group": task.group,
        "cluster": task.cluster,
        "title": task.title,
        "properties": list(task.schema["properties"]),
        "metrics": [
            {"name": metric.name, "title": metric.title, "unit": metric.unit, "better": metric.better}
            for metric in task_metrics(task)
        ],
        "score_threshold": task.score_threshold,
        "error_categories": list(task.error_categories),
    }
