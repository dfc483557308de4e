"""Facts about a run from its folders: sizes, training curves, peak memory, versions, seeds and stages."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import runtime
from mlx_distill.distill.answer_check import FACT
from mlx_distill.distill.preflight import FILE_NAME as PREFLIGHT
from mlx_distill.evaluate.audit import FOLDER as AUDIT
from mlx_distill.evaluate.audit import read_audit
from mlx_distill.report.run_folders import left_out, manifest_of, report_folders
from mlx_distill.run_models import is_dequantized, run_model
from mlx_distill.storage import os_errors, read_json, read_jsonl

# The columns of metrics.jsonl that are not losses.
_NOT_LOSSES = {
    "step",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
}
_MAX_POINTS = 400
_WEIGHT_FILES = (".safetensors", ".npz", ".gguf")


def sizes(run: Path, models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bytes of the weights of each model on disk; an adapter is counted together with its base model.

    Args:
        run: The run's folder.
        models: Names of models; one without weights in the run is left out.

    Returns:
        ``{model: {"weights_bytes", "base_bytes", "total_bytes", "folder"}}``; ``base_bytes`` is 0 for a whole
        model.
    """
    out = {}
    for name in models:
        folder = run / run_model(name).folder
        if not folder.is_dir():
            continue
        weights, base = _weight_bytes(folder), _base_folder(folder)
        base_weights = _weight_bytes(base) if base else 0
        if weights + base_weights:
            out[name] = {
                "weights_bytes": weights,
                "base_bytes": base_weights,
                "total_bytes": weights + base_weights,
                "folder": folder.name,
            }
    return out


def _weight_bytes(folder: Path) -> int:
    with os_errors():
        return sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.suffix in _WEIGHT_FILES)


def _base_folder(folder: Path) -> Path | None:
    """The folder of an adapter's base model, where it exists."""
    path = folder / "adapter_config.json"
    base = read_json(path).get("base") if path.is_file() else None
    base_folder = (folder / base).resolve() if base else None
    return base_folder if base_folder and base_folder.is_dir() else None


def curves(run: Path, folders: Collection[str]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The losses of each training: ``{stage: {series: {"step": [...], "value": [...]}}}``.

    A series of more than 400 points is replaced by the means of groups of neighbouring points.

    Args:
        run: The run's folder.
        folders: Of the trainings in it.
    """
    out = {}
    for stage, rows in _training_logs(run, folders):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for name, value in row.items():
                if "step" in row and name not in _NOT_LOSSES and _is_number(value):
                    series.setdefault(name, []).append((row["step"], value))
        if series:
            out[stage] = {name: _downsample(points) for name, points in series.items()}
    return out


def _downsample(points: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """Means of groups of neighbouring points, each at the step of its last point."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return {
        "step": [group[-1][0] for group in groups],
        "value": [sum(value for _, value in group) / len(group) for group in groups],
    }


def teacher_answers(run: Path, folders: Collection[str]) -> dict[str, Any] | None:
    """How many of the teacher's own answers fitted the task when its targets were made; None where that is
    not recorded, or the targets are not among the folders of the report.
    """
    manifest = manifest_of(run / "targets") if "targets" in folders else None
    return manifest.recorded.get(FACT) if manifest else None


def distillation(run: Path, folders: Collection[str]) -> dict[str, Any] | None:
    """What was measured of the teacher and the student's tokens before the student's training
    (:mod:`mlx_distill.distill.preflight`); None where that is not written, or the student is not among the
    folders of the report.
    """
    path = run / "student" / PREFLIGHT
    return {"preflight": read_json(path)} if "student" in folders and path.is_file() else None


def training(run: Path, folders: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Steps, seconds, tokens and peak memory of each training: of all in a run, or of some folders."""
    out = {}
    for stage, rows in _training_logs(run, folders):
        if rows:
            peaks = [row["peak_memory_bytes"] for row in rows if _is_number(row.get("peak_memory_bytes"))]
            out[stage] = {
                "steps": rows[-1].get("step"),
                "seconds": rows[-1].get("seconds"),
                "tokens": sum(row.get("tokens") or 0 for row in rows),
                "peak_memory_gb": max(peaks) / 1e9 if peaks else None,
            }
    return out


def quantization(run: Path, folders: Collection[str]) -> dict[str, Any] | None:
    """What the quantize stage says of the student's weights: bits a weight, and with rows the candidates, the
    kept one, the curve and the table of sensitivity; None where no quantized student is among the folders of
    the report.
    """
    manifest = manifest_of(run / "quantized") if "quantized" in folders else None
    if manifest is None or "bits_per_weight" not in manifest.recorded:
        return None
    return {
        "mode": manifest.recorded.get("mode"),
        "bits_per_weight": manifest.recorded["bits_per_weight"],
        **manifest.recorded.get("refinement", {}),
    }


def data(run: Path) -> dict[str, Any] | None:
    """What the data stage says of the rows: how many were read, left out and why, duplicates, and the rows of
    each split; None where it says nothing.

    Returns:
        ``read``, ``rows``, ``sets``, ``labels``, ``dropped`` and ``near_duplicates`` as in
        :func:`mlx_distill.data.prepare.prepare`, and ``similarity``, from which on rows count as near
        duplicates (0: they were not looked for).
    """
    path = run / "data" / "statistics.json"
    if not path.is_file():
        return None
    statistics = read_json(path)
    manifest = manifest_of(run / "data")
    keys = ("read", "rows", "sets", "labels", "dropped", "near_duplicates")
    similarity = manifest.config.get("near_duplicates") if manifest else None
    return {key: statistics.get(key) for key in keys} | {"similarity": similarity}


def _training_logs(run: Path, folders: Collection[str] | None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The stage and the rows of each ``metrics.jsonl``: teacher, student, then the others by name."""
    order = {"teacher": 0, "student": 1}
    paths = [path for path in run.glob("*/metrics.jsonl") if folders is None or path.parent.name in folders]
    for path in sorted(paths, key=lambda path: (order.get(path.parent.name, 2), path.parent.name)):
        yield path.parent.name, [row for _, row in read_jsonl(path)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def peak_memory_gb(header: Mapping[str, Any], evaluation: Path) -> float | None:
    """Peak memory of an evaluation in GB (1e9 bytes), from the header of its predictions or its manifest.

    Args:
        header: The first line of ``predictions.jsonl``.
        evaluation: The folder of the evaluation.
    """
    manifest = manifest_of(evaluation)
    for source in (header, header.get("settings") or {}, manifest.recorded if manifest else {}):
        if _is_number(source.get("peak_memory_bytes")):
            return float(source["peak_memory_bytes"]) / 1e9
        if _is_number(source.get("peak_memory_gb")):
            return float(source["peak_memory_gb"])
    return None


SPEED = ("load_s", "model_memory_gb", "first_token_s", "requests_per_second")
"""What :func:`speed` gives."""


def speed(evaluation: Path) -> dict[str, float | None]:
    """What an evaluation's manifest says of loading, the first token and throughput; None where it says
    nothing.
    """
    manifest = manifest_of(evaluation)
    recorded = manifest.recorded if manifest else {}
    facts: dict[str, Any] = {name: recorded.get(name) for name in SPEED}
    if _is_number(recorded.get("model_memory_bytes")):
        facts["model_memory_gb"] = recorded["model_memory_bytes"] / 1e9
    return {name: float(value) if _is_number(value) else None for name, value in facts.items()}


def run_facts(
    run: Path,
    recipe: Mapping[str, Any],
    headers: Mapping[str, Mapping[str, Any]],
    evaluations: Mapping[str, Path],
    confidence: float = 0.95,
) -> dict[str, Any]:
    """What every report says of its run: ``data``, ``sizes``, ``curves``, ``training``, ``quantization``,
    ``teacher_answers``, ``distillation``, ``audit`` and ``provenance``; and under ``left_out`` what is in the
    run's folder and belongs to other models, see :func:`~mlx_distill.report.run_folders.left_out`.

    For the arguments see :func:`provenance`; ``confidence`` is the level of the audit's intervals.
    """
    folders = report_folders(run, evaluations, recipe)
    return {
        "data": data(run),
        "sizes": sizes(run, list(evaluations)),
        "curves": curves(run, folders),
        "training": training(run, folders),
        "quantization": quantization(run, folders),
        "teacher_answers": teacher_answers(run, folders),
        "distillation": distillation(run, folders),
        "audit": read_audit(run / AUDIT, confidence) if AUDIT in folders else None,
        "provenance": provenance(run, recipe, headers, evaluations),
        "left_out": left_out(run, folders, recipe),
    }


def provenance(
    run: Path,
    recipe: Mapping[str, Any],
    headers: Mapping[str, Mapping[str, Any]],
    evaluations: Mapping[str, Path],
) -> dict[str, Any]:
    """Where the figures come from: machine, versions, seeds, stages, settings of the evaluations, recipe.

    Args:
        run: The run's folder.
        recipe: The recipe as a plain mapping.
        headers: Model name to the header of its predictions.
        evaluations: Model name to the folder of its evaluation. Machine and versions are those that the first
            manifest among them recorded, else those of this machine.
    """
    manifests = [manifest_of(folder) for folder in evaluations.values()]
    recorded = [manifest.recorded for manifest in manifests if manifest]
    plain = {key: _plain(value) for key, value in recipe.items() if key != "base"}
    settings = {
        name: {**(header.get("settings") or {}), **_compute_settings(evaluations[name])}
        for name, header in headers.items()
    }
    return {
        "machine": dict(_first(recorded, "machine") or runtime.machine()),
        "versions": dict(_first(recorded, "versions") or runtime.versions()),
        "seeds": dict(_seeds(plain)),
        "stages": _stages(run, report_folders(run, evaluations, recipe)),
        "evaluations": _plain(settings),
        "recipe": plain,
    }


def _compute_settings(evaluation: Path) -> dict[str, Any]:
    """``compute_dtype``, and under ``dequantize`` whether quantized weights were dequantized first."""
    manifest = manifest_of(evaluation)
    if manifest is None:
        return {}
    settings = {key: manifest.config[key] for key in ("compute_dtype",) if key in manifest.config}
    dequantized = is_dequantized(manifest.config)
    return settings if dequantized is None else {**settings, "dequantize": dequantized}


def _first(recorded: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    return next(
        (entry[key] for entry in recorded if isinstance(entry.get(key), Mapping) and entry[key]), None
    )


def _stages(run: Path, folders: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each finished folder of the report, in the order in which they were finished."""
    stages = []
    for folder in folders:
        manifest = manifest_of(run / folder)
        if manifest is None:
            continue
        seconds, finished = (manifest.recorded.get(key) for key in ("seconds", "finished"))
        stages.append(
            {
                "folder": folder,
                "stage": manifest.stage,
                "key": manifest.key,
                "seconds": seconds if _is_number(seconds) else None,
                "finished": finished if _is_number(finished) else None,
                "bytes": sum(file.size for file in manifest.files.values()),
            }
        )
    return sorted(stages, key=lambda entry: (entry["finished"] or 0, entry["folder"]))


def _seeds(value: Any, path: str = "") -> list[tuple[str, int]]:
    """All seeds of a recipe, each with its path of keys."""
    if isinstance(value, Mapping):
        own = [(f"{path}seed", value["seed"])] if isinstance(value.get("seed"), int) else []
        return own + [seed for key, item in value.items() for seed in _seeds(item, f"{path}{key}.")]
    if isinstance(value, list):
        return [seed for i, item in enumerate(value) for seed in _seeds(item, f"{path}{i}.")]
    return []


def _plain(value: Any) -> Any:
    """The value with JSON types only."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
