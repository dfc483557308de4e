"""From predictions on disk to the report's dict. Every figure comes from ``predictions.jsonl`` by a function
of the metrics room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.errors import ConfigError, DataError, DistillError
from mlx_distill.metrics.classification import Row
from mlx_distill.run_models import RESULTS, is_dequantized, run_model
from mlx_distill.storage import Manifest, os_errors, read_json, read_jsonl, read_manifest
from mlx_distill.tasks.task import Task

FORMAT = 1
MAIN_SET = "test"
TEACHER = "teacher"
_NEEDED = ("id", "set", "truth", "answer", "label", "score")


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
        evaluations: Model name to its ``predictions.jsonl`` (or the folder that holds it), in the order of
            the tables. ``teacher`` is the reference of every agreement; :mod:`mlx_distill.run_models` says which of the others
            are controls.
        confidence: Level of the intervals.
        models: Model name to its folder, where that is not ``run/<stage>``.
        goals: ``{"model", "metric", "at_least" or "at_most"}``: floors and ceilings to show as met or missed.
        machine, versions: What measured; by default what the manifests of the evaluations recorded, else this
            machine.
        created: Time in ISO form; by default now.
        rows_shown: Disagreements that are written out for each model.

    Returns:
        The report as plain JSON values: ``metrics`` (of the set ``test``), ``by_set``, ``comparisons``,
        ``disagreements``, ``sizes``, ``curves``, ``provenance``. A rate is ``{"value", "low", "high", "n"}``;
        what was not measured is None.

    Raises:
        DataError: predictions that are empty, of another format, or lack a field, with file and line.
        ConfigError: no evaluations.
    """
    if not evaluations:
        raise ConfigError(
            "a report needs the predictions of at least one model", fix="run: mlx-distill evaluate RECIPE"
        )
    run = Path(run)
    headers, rows = {}, {}
    for name, path in evaluations.items():
        headers[name], rows[name] = read_predictions(path)
    sets = _sets(rows.values())
    main = MAIN_SET if MAIN_SET in sets else next(iter(sets))
    by_set = {name: _set_metrics(rows, name, task, confidence) for name in sets}
    for model, figures in by_set[main].items():
        figures["peak_memory_gb"] = peak_memory_gb(headers[model], Path(evaluations[model]))
    folders = model_folders(run, list(evaluations), models or {})
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
        "controls": [name for name in evaluations if run_model(name).role == "control"],
        "metrics": by_set[main],
        "by_set": by_set,
        "comparisons": _comparisons(rows, main, task, confidence),
        "goals": [_judge(goal, by_set[main]) for goal in goals],
        "disagreements": {
            name: _disagreements(part, rows[TEACHER], task, rows_shown)
            for name, part in rows.items()
            if TEACHER in rows and name in RESULTS
        },
        "sizes": sizes(folders),
        "curves": curves(run),
        "training": training(run),
        "provenance": provenance(
            run, recipe, headers, [Path(p) for p in evaluations.values()], machine, versions
        ),
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


def _set_metrics(
    tables: Mapping[str, Sequence[Row]], name: str, task: Task, confidence: float
) -> dict[str, Any]:
    teacher = _of(tables[TEACHER], name) if TEACHER in tables else None
    parts = {model: _of(rows, name) for model, rows in tables.items()}
    return {
        model: model_metrics(rows, None if model == TEACHER else teacher, task, confidence=confidence)
        for model, rows in parts.items()
        if rows
    }


def model_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, *, confidence: float = 0.95
) -> dict[str, Any]:
    """All figures of one model on one set.

    Args:
        rows: Its predictions.
        teacher: The teacher's predictions on the same items; None (the model is the teacher, or there is
            none) leaves the figures against it out as None.
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
        **_binary_figures(rows, task, confidence),
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
            "agreement": m.agreement(
                rows, teacher, tolerance=task.score_tolerance if task.score else None, **level
            ),
            "score_gap": m.score_gap(rows, teacher, **level) if task.score else None,
            "teacher_confusion": m.teacher_confusion(rows, teacher, label, labels),
            "label_kl": kl["value"],
            "label_kl_interval": kl,
            "versus_teacher": m.accuracy_gain(rows, teacher, label, **level),
            "disagreements": len(m.disagreements(rows, teacher, labels, ())),
        }
    return out


def _binary_figures(rows: Sequence[Row], task: Task, confidence: float) -> dict[str, Any]:
    if not task.positive:
        return {}
    counts = m.confusion_counts(rows, task.label, task.positive)
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


def _comparisons(
    tables: Mapping[str, Sequence[Row]], name: str, task: Task, confidence: float
) -> list[dict[str, Any]]:
    """Paired comparisons that answer: did it help, what did the bits cost, was it the distillation."""
    if TEACHER not in tables:
        return []
    teacher = _of(tables[TEACHER], name)
    wanted = [("student", "student_before"), ("quantized", "student")]
    wanted += [("student", control) for control in tables if run_model(control).role == "control"]
    out = []
    for first, second in wanted:
        if first in tables and second in tables:
            result = m.agreement_gain(
                _of(tables[first], name), _of(tables[second], name), teacher, confidence=confidence
            )
            if result:
                out.append({"metric": "verdict_agreement", "first": first, "second": second, **result})
    for first in tables:
        result = (
            None
            if first == TEACHER
            else m.accuracy_gain(_of(tables[first], name), teacher, task.label, confidence=confidence)
        )
        if result:
            out.append({"metric": "accuracy", "first": first, "second": TEACHER, **result})
    return out


def _judge(goal: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The goal with the measured value and whether it is met; not met where nothing was measured."""
    side = "at_least" if "at_least" in goal else "at_most"
    if "model" not in goal or "metric" not in goal or side not in goal:
        raise ConfigError(
            f"a goal needs model, metric and at_least or at_most, not {sorted(goal)}",
            fix="mend it in the recipe",
        )
    found = (metrics.get(goal["model"]) or {}).get(goal["metric"])
    value = found.get("value") if isinstance(found, Mapping) else found
    met = value is not None and (value >= goal[side] if side == "at_least" else value <= goal[side])
    return {"model": goal["model"], "metric": goal["metric"], side: goal[side], "measured": found, "met": met}


def _disagreements(rows: Sequence[Row], teacher: Sequence[Row], task: Task, limit: int) -> dict[str, Any]:
    found = m.disagreements(rows, teacher, task.labels, list(task.schema["properties"]))
    return {"count": len(found), "of": len(rows), "rows": found[:limit]}


def _task_details(task: Task) -> dict[str, Any]:
    names = (
        "description",
        "label",
        "labels",
        "positive",
        "score",
        "score_tolerance",
        "score_scale",
        "slices",
        "group",
        "title",
    )
    details = {name: getattr(task, name) for name in names}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in details.items()} | {
        "properties": list(task.schema["properties"])
    }


# Columns of metrics.jsonl that are no losses.
_BOOKKEEPING = {
    "step",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
}
_POINTS = 400
_WEIGHTS = (".safetensors", ".npz", ".gguf")


def model_folders(run: Path, names: Sequence[str], given: Mapping[str, str | Path]) -> dict[str, Path]:
    """The folder of each model that has one."""
    folders = {name: Path(given.get(name, run / run_model(name).folder)) for name in names}
    return {name: path for name, path in folders.items() if path.is_dir()}


def sizes(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Bytes of weights on disk of each model; an adapter's folder is counted with the base that it needs.

    Returns:
        ``{model: {"weights_bytes", "base_bytes", "total_bytes", "folder"}}``; ``base_bytes`` is 0 for a whole
        model.
    """
    out = {}
    for name, folder in folders.items():
        own, base = _weights(folder), _base(folder)
        beneath = _weights(base) if base else 0
        out[name] = {
            "weights_bytes": own,
            "base_bytes": beneath,
            "total_bytes": own + beneath,
            "folder": folder.name,
        }
    return {name: entry for name, entry in out.items() if entry["total_bytes"]}


def _weights(folder: Path) -> int:
    with os_errors():
        return sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.suffix in _WEIGHTS)


def _base(folder: Path) -> Path | None:
    path = folder / "adapter_config.json"
    base = read_json(path).get("base") if path.is_file() else None
    found = (folder / base).resolve() if base else None
    return found if found and found.is_dir() else None


def curves(run: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The losses of each training: ``{stage: {series: {"step": [...], "value": [...]}}}``, thinned to some
    hundred points.
    """
    out = {}
    for path in _logs(run):
        rows = [row for _, row in read_jsonl(path)]
        names = dict.fromkeys(
            key for row in rows for key, value in row.items() if key not in _BOOKKEEPING and _number(value)
        )
        series = {
            name: _thin(
                [(row["step"], row[name]) for row in rows if "step" in row and _number(row.get(name))]
            )
            for name in names
        }
        if any(series.values()):
            out[path.parent.name] = {name: found for name, found in series.items() if found}
    return out


def training(run: Path) -> dict[str, dict[str, Any]]:
    """Steps, seconds, trained tokens and peak memory of each training, from the last lines of its log."""
    out = {}
    for path in _logs(run):
        rows = [row for _, row in read_jsonl(path)]
        if rows:
            peaks = [row["peak_memory_bytes"] for row in rows if _number(row.get("peak_memory_bytes"))]
            out[path.parent.name] = {
                "steps": rows[-1].get("step"),
                "seconds": rows[-1].get("seconds"),
                "tokens": sum(row.get("tokens") or 0 for row in rows),
                "peak_memory_gb": max(peaks) / 1e9 if peaks else None,
            }
    return out


def _logs(run: Path) -> list[Path]:
    order = {"teacher": 0, "student": 1}
    return sorted(run.glob("*/metrics.jsonl"), key=lambda p: (order.get(p.parent.name, 2), p.parent.name))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thin(points: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """Means of runs of neighbours where there are too many points; the last of each run says the step."""
    stride = max(1, math.ceil(len(points) / _POINTS))
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return (
        {
            "step": [part[-1][0] for part in parts],
            "value": [sum(v for _, v in part) / len(part) for part in parts],
        }
        if points
        else {}
    )


def peak_memory_gb(header: Mapping[str, Any], predictions: Path) -> float | None:
    """Peak memory of an evaluation in GB (1e9 bytes): from the header of its predictions, ``timing.json``
    beside them, or the manifest.
    """
    folder = predictions if predictions.is_dir() else predictions.parent
    timing = read_json(folder / "timing.json") if (folder / "timing.json").is_file() else {}
    manifest = _manifest(folder)
    for source in (header, header.get("settings") or {}, timing, manifest.recorded if manifest else {}):
        if _number(source.get("peak_memory_bytes")):
            return float(source["peak_memory_bytes"]) / 1e9
        if _number(source.get("peak_memory_gb")):
            return float(source["peak_memory_gb"])
    return None


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except DistillError:  # a damaged one is the pipeline's to report; the figures stand without it
        return None


def provenance(
    run: Path,
    recipe: Mapping[str, Any],
    headers: Mapping[str, Mapping[str, Any]],
    evaluations: Sequence[Path],
    machine: Mapping[str, Any] | None,
    versions: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Where the figures come from: machine, versions, seeds, the stages' keys and times, the settings of each
    evaluation, the recipe.
    """
    from mlx_distill import runtime

    folders = [path if path.is_dir() else path.parent for path in evaluations]
    recorded = [manifest.recorded for manifest in map(_manifest, folders) if manifest]
    plain = {key: _plain(value) for key, value in recipe.items() if key != "base"}
    return {
        "machine": dict(machine or _first(recorded, "machine") or runtime.machine()),
        "versions": dict(versions or _first(recorded, "versions") or runtime.versions()),
        "seeds": dict(_seeds(plain)),
        "stages": _stages(run),
        "evaluations": {
            name: _plain({**(header.get("settings") or {}), **_computed(folder)})
            for (name, header), folder in zip(headers.items(), folders, strict=True)
        },
        "recipe": plain,
    }


def _computed(folder: Path) -> dict[str, Any]:
    """How an evaluation computed: ``compute_dtype``, and under ``dequantize`` whether quantized weights were
    dequantized first.
    """
    manifest = _manifest(folder)
    if manifest is None:
        return {}
    computed = {key: manifest.config[key] for key in ("compute_dtype",) if key in manifest.config}
    dequantized = is_dequantized(manifest.config)
    return computed if dequantized is None else {**computed, "dequantize": dequantized}


def _first(recorded: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    return next(
        (entry[key] for entry in recorded if isinstance(entry.get(key), Mapping) and entry[key]), None
    )


def _stages(run: Path) -> list[dict[str, Any]]:
    """One entry a finished folder of the run, in the order of their finishing."""
    found = []
    for path in [*run.glob("*/manifest.json"), *run.glob("*/*/manifest.json")]:
        folder = path.parent.relative_to(run)
        manifest = None if any(part.startswith(".") for part in folder.parts) else _manifest(path.parent)
        if manifest:
            recorded = manifest.recorded
            found.append(
                {
                    "folder": folder.as_posix(),
                    "stage": manifest.stage,
                    "key": manifest.key,
                    "seconds": recorded.get("seconds") if _number(recorded.get("seconds")) else None,
                    "finished": recorded.get("finished") if _number(recorded.get("finished")) else None,
                    "bytes": sum(entry.size for entry in manifest.files.values()),
                }
            )
    return sorted(found, key=lambda entry: (entry["finished"] or 0, entry["folder"]))


def _seeds(value: Any, path: str = "") -> list[tuple[str, int]]:
    if isinstance(value, Mapping):
        here = [(f"{path}seed", value["seed"])] if isinstance(value.get("seed"), int) else []
        return here + [pair for key, item in value.items() for pair in _seeds(item, f"{path}{key}.")]
    if isinstance(value, list):
        return [pair for i, item in enumerate(value) for pair in _seeds(item, f"{path}{i}.")]
    return []


def _plain(value: Any) -> Any:
    """JSON values only."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
