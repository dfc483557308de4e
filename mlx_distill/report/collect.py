"""From predictions on disk to the report's dict. Every figure comes from ``predictions.jsonl`` by a function of the metrics room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.classification import Row
from mlx_distill.report import facts
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task

FORMAT = 1
MAIN_SET = "test"
TEACHER = "teacher"
_NEEDED = ("id", "set", "truth", "answer", "label", "score")
_DERIVED = ("teacher", "teacher_before", "student_before", "student", "quantized")


def build_report(
    run: str | Path,
    recipe: Mapping[str, Any],
    task: Task,
    evaluations: Mapping[str, str | Path],
    *,
    confidence: float = 0.95,
    models: Mapping[str, str | Path] | None = None,
    goals: Sequence[Mapping[str, Any]] = (),
    machine: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    created: str | None = None,
    rows_shown: int = 40,
) -> dict[str, Any]:
    """Measure every model of a run and gather what is known about it.

    Args:
        run: The run's folder: sizes, training curves and manifests are read from its stages.
        recipe: The recipe as a plain mapping (``config.to_mapping(recipe)``).
        task: The task of the run.
        evaluations: Model name to its ``predictions.jsonl`` (or the folder that holds it), in the order of the tables. ``teacher`` is
            the reference of every agreement; names besides teacher, student_before, student and quantized are controls.
        confidence: Level of the intervals.
        models: Model name to its folder, where that is not ``run/<stage>``.
        goals: ``{"model", "metric", "at_least" or "at_most"}``: floors and ceilings to show as met or missed.
        machine, versions: What measured; by default what the manifests of the evaluations recorded, else this machine.
        created: Time in ISO form; by default now.
        rows_shown: Disagreements that are written out for each model.

    Returns:
        The report as plain JSON values: ``metrics`` (of the set ``test``), ``by_set``, ``comparisons``, ``disagreements``, ``sizes``,
        ``curves``, ``provenance``. A rate is ``{"value", "low", "high", "n"}``; what was not measured is None.

    Raises:
        DataError: predictions that are empty, of another format, or lack a field, with file and line.
        ConfigError: no evaluations.
    """
    if not evaluations:
        raise ConfigError("a report needs the predictions of at least one model", fix="run: mlx-distill evaluate RECIPE")
    run = Path(run)
    headers, rows = {}, {}
    for name, path in evaluations.items():
        headers[name], rows[name] = read_predictions(path)
    sets = _sets(rows.values())
    main = MAIN_SET if MAIN_SET in sets else next(iter(sets))
    by_set = {name: _set_metrics(rows, name, task, confidence) for name in sets}
    for model, figures in by_set[main].items():
        figures["peak_memory_gb"] = facts.peak_memory_gb(headers[model], Path(evaluations[model]))
    folders = facts.model_folders(run, list(evaluations), models or {})
    return {
        "format": FORMAT,
        "name": str(recipe.get("name") or run.resolve().name),
        "description": str(recipe.get("description") or ""),
        "task": task.name,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "confidence": confidence,
        "main_set": main,
        "sets": sets,
        "task_details": _task_details(task),
        "models": list(evaluations),
        "controls": [name for name in evaluations if name not in _DERIVED],
        "metrics": by_set[main],
        "by_set": by_set,
        "comparisons": _comparisons(rows, main, task, confidence),
        "goals": [_judge(goal, by_set[main]) for goal in goals],
        "disagreements": {
            name: _disagreements(part, rows[TEACHER], task, rows_shown)
            for name, part in rows.items()
            if TEACHER in rows and name in ("student", "quantized")
        },
        "sizes": facts.sizes(folders),
        "curves": facts.curves(run),
        "training": facts.training(run),
        "provenance": facts.provenance(run, recipe, headers, [Path(p) for p in evaluations.values()], machine, versions),
    }


def read_predictions(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a ``predictions.jsonl``, or of the folder that holds it.

    Raises:
        DataError: empty, another format, or a row without a field that the figures need.
    """
    path = Path(path)
    path = path / "predictions.jsonl" if path.is_dir() else path
    again = "run the evaluate stage again"
    lines = read_jsonl(path)
    _, header = next(lines, (0, {}))
    if header.get("format") != FORMAT:
        raise DataError(f"{path}: not predictions of format {FORMAT}", fix=again)
    rows = []
    for number, row in lines:
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            raise DataError(f"{path}:{number}: no field {missing[0]!r}", fix=again)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no predictions", fix="give the recipe held-out rows, then " + again)
    return header, rows


def _sets(tables: Any) -> dict[str, int]:
    """Items of each set, the main one first, then in the order of their first row."""
    counts: dict[str, int] = {}
    for rows in tables:
        for name in {row["set"]: None for row in rows}:
            counts[name] = max(counts.get(name, 0), sum(row["set"] == name for row in rows))
    return dict(sorted(counts.items(), key=lambda item: item[0] != MAIN_SET))


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["set"] == name]


def _set_metrics(tables: Mapping[str, Sequence[Row]], name: str, task: Task, confidence: float) -> dict[str, Any]:
    teacher = _of(tables[TEACHER], name) if TEACHER in tables else None
    parts = {model: _of(rows, name) for model, rows in tables.items()}
    return {
        model: model_metrics(rows, None if model == TEACHER else teacher, task, confidence=confidence)
        for model, rows in parts.items()
        if rows
    }


def model_metrics(rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, *, confidence: float = 0.95) -> dict[str, Any]:
    """All figures of one model on one set.

    Args:
        rows: Its predictions.
        teacher: The teacher's predictions on the same items; None (the model is the teacher, or there is none) leaves the figures
            against it out as None.
        task: Names the label, its classes and sides, the score, slices and group.
        confidence: Level of the intervals.
    """
    label, labels, level = task.label, task.labels, {"confidence": confidence}
    mae = m.score_mae(rows, task.score, **level)
    out: dict[str, Any] = {
        "n": len(rows),
        "accuracy": m.accuracy(rows, label, **level),
        "verdict_agreement": None,
        "agreement": None,
        "score_mae": mae["value"],
        "score_mae_interval": mae,
        "score_gap": None,
        "json_valid": m.json_valid(rows, **level),
        **m.latency(rows),
        "peak_memory_gb": None,
        "macro_f1": m.macro_f1(rows, label, labels, confidence),
        **_sides(rows, task, confidence),
        "confusion": m.confusion(rows, label, labels),
        "teacher_confusion": None,
        "label_kl": None,
        "label_kl_interval": None,
        "versus_teacher": None,
        "disagreements": None,
        "by_slice": m.by_slice(rows, teacher, label, task.slices, **level),
    }
    if teacher:
        kl = m.label_kl(rows, teacher, labels, **level)
        out |= {
            "verdict_agreement": m.verdict_agreement(rows, teacher, **level),
            "agreement": m.agreement(rows, teacher, tolerance=task.score_tolerance if task.score else None, **level),
            "score_gap": m.score_gap(rows, teacher, **level) if task.score else None,
            "teacher_confusion": m.teacher_confusion(rows, teacher, label, labels),
            "label_kl": kl["value"],
            "label_kl_interval": kl,
            "versus_teacher": m.versus(rows, teacher, label, **level),
            "disagreements": len(m.disagreements(rows, teacher, labels, ())),
        }
    return out


def _sides(rows: Sequence[Row], task: Task, confidence: float) -> dict[str, Any]:
    if not task.positive:
        return {}
    counts = m.count_sides(rows, task.label, task.positive)
    out: dict[str, Any] = {
        "precision": m.precision(counts, confidence),
        "recall": m.recall(counts, confidence),
        "f1": m.f1(counts, confidence),
        "false_positive_rate": m.false_positive_rate(counts, confidence),
        "false_negative_rate": m.false_negative_rate(counts, confidence),
        "counts": {
            "true_positives": counts.true_positive,
            "false_positives": counts.false_positive,
            "true_negatives": counts.true_negative,
            "false_negatives": counts.false_negative,
        },
    }
    if task.group:
        out["by_group"] = m.by_group(rows, task.label, task.positive, task.group, confidence=confidence)
    return out


def _comparisons(tables: Mapping[str, Sequence[Row]], name: str, task: Task, confidence: float) -> list[dict[str, Any]]:
    """Paired comparisons that answer: did it help, what did the bits cost, was it the distillation."""
    if TEACHER not in tables:
        return []
    teacher = _of(tables[TEACHER], name)
    wanted = [("student", "student_before"), ("quantized", "student")]
    wanted += [("student", control) for control in tables if control not in _DERIVED]
    out = []
    for first, second in wanted:
        if first in tables and second in tables:
            result = m.agreement_gain(_of(tables[first], name), _of(tables[second], name), teacher, confidence=confidence)
            if result:
                out.append({"metric": "verdict_agreement", "first": first, "second": second, **result})
    for first in tables:
        result = None if first == TEACHER else m.versus(_of(tables[first], name), teacher, task.label, confidence=confidence)
        if result:
            out.append({"metric": "accuracy", "first": first, "second": TEACHER, **result})
    return out


def _judge(goal: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The goal with the measured value and whether it is met; not met where nothing was measured."""
    side = "at_least" if "at_least" in goal else "at_most"
    if "model" not in goal or "metric" not in goal or side not in goal:
        raise ConfigError(f"a goal needs model, metric and at_least or at_most, not {sorted(goal)}", fix="mend it in the recipe")
    found = (metrics.get(goal["model"]) or {}).get(goal["metric"])
    value = found.get("value") if isinstance(found, Mapping) else found
    met = value is not None and (value >= goal[side] if side == "at_least" else value <= goal[side])
    return {"model": goal["model"], "metric": goal["metric"], side: goal[side], "measured": found, "met": met}


def _disagreements(rows: Sequence[Row], teacher: Sequence[Row], task: Task, limit: int) -> dict[str, Any]:
    found = m.disagreements(rows, teacher, task.labels, list(task.schema["properties"]))
    return {"count": len(found), "of": len(rows), "rows": found[:limit]}


def _task_details(task: Task) -> dict[str, Any]:
    names = ("description", "label", "labels", "positive", "score", "score_tolerance", "score_scale", "slices", "group", "title")
    details = {name: getattr(task, name) for name in names}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in details.items()} | {"properties": list(task.schema["properties"])}
