"""What a run's folder tells besides predictions: sizes, training curves, memory, manifests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError
from mlx_distill.storage import Manifest, os_errors, read_json, read_jsonl, read_manifest

# Where the pipeline leaves each model.
_FOLDERS = {"teacher": "teacher", "teacher_before": "teacher_base", "student_before": "student_base"}
# Columns of metrics.jsonl that are no losses.
_BOOKKEEPING = {"step", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds", "peak_memory_bytes"}
_POINTS = 400
_WEIGHTS = (".safetensors", ".npz", ".gguf")


def model_folders(run: Path, names: Sequence[str], given: Mapping[str, str | Path]) -> dict[str, Path]:
    """The folder of each model that has one."""
    folders = {name: Path(given.get(name, run / _FOLDERS.get(name, name))) for name in names}
    return {name: path for name, path in folders.items() if path.is_dir()}


def sizes(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Bytes of weights on disk of each model; an adapter's folder is counted with the base that it needs.

    Returns:
        ``{model: {"weights_bytes", "base_bytes", "total_bytes", "folder"}}``; ``base_bytes`` is 0 for a whole model.
    """
    out = {}
    for name, folder in folders.items():
        own, base = _weights(folder), _base(folder)
        beneath = _weights(base) if base else 0
        out[name] = {"weights_bytes": own, "base_bytes": beneath, "total_bytes": own + beneath, "folder": folder.name}
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
    """The losses of each training: ``{stage: {series: {"step": [...], "value": [...]}}}``, thinned to some hundred points."""
    out = {}
    for path in _logs(run):
        rows = [row for _, row in read_jsonl(path)]
        names = dict.fromkeys(key for row in rows for key, value in row.items() if key not in _BOOKKEEPING and _number(value))
        series = {name: _thin([(row["step"], row[name]) for row in rows if "step" in row and _number(row.get(name))]) for name in names}
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
    return {"step": [part[-1][0] for part in parts], "value": [sum(v for _, v in part) / len(part) for part in parts]} if points else {}


def peak_memory_gb(header: Mapping[str, Any], predictions: Path) -> float | None:
    """Peak memory of an evaluation in GB (1e9 bytes): from the header of its predictions, ``timing.json`` beside them, or the manifest."""
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
    """Where the figures come from: machine, versions, seeds, the stages' keys and times, the settings of each evaluation, the recipe."""
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
    """In what an evaluation computed: ``compute_dtype``, and under ``unpack`` whether packed weights were unpacked first."""
    manifest = _manifest(folder)
    return {key: manifest.config[key] for key in ("compute_dtype", "unpack") if key in manifest.config} if manifest else {}


def _first(recorded: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    return next((entry[key] for entry in recorded if isinstance(entry.get(key), Mapping) and entry[key]), None)


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
