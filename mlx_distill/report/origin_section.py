"""Section of the report: machine, versions, seeds, stages and recipe."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from mlx_distill.report.run_folders import left_out_text
from mlx_distill.report.tables import Report
from mlx_distill.run_models import is_dequantized, model_phrase, model_title
from mlx_distill.text import NONE, counted, listed, percent, size, words


def origin(report: Report) -> dict[str, Any]:
    """The section on where the figures come from."""
    provenance = report["provenance"]
    return {
        "measured_on": measured_on(provenance),
        "method": _method(report),
        "lists": {
            "Machine": _machine(provenance["machine"]),
            "Versions": {name: value for name, value in provenance["versions"].items() if value != "missing"},
            "Seeds": provenance["seeds"],
        },
        "stages": [stage | {"finished_at": _time(stage["finished"])} for stage in provenance["stages"]],
        "left_out": [left_out_text(entry) for entry in report.get("left_out", ())],
        "settings": _settings(provenance["evaluations"]),
        "recipe": yaml.safe_dump(dict(provenance["recipe"]), sort_keys=False, allow_unicode=True),
    }


def _method(report: Report) -> dict[str, str]:
    """The intervals and tests, and hashes of the compared rows and models."""
    level = percent(report["confidence"], 0)
    out = {
        "Intervals of rates": f"Wilson, {level}",
        "Intervals of means": "bootstrap or t, at the same level",
    }
    cluster, valid = report["task_details"].get("cluster"), _any_figures(report).get("json_valid") or {}
    if cluster and "clusters" in valid:
        rows = f"clustered by {words(cluster)}, {counted(valid['clusters'], 'cluster')}"
        few = "; fewer than 20, so they may be too narrow" if valid["few_clusters"] else ""
        out |= {
            "Intervals of rates": f"Wilson at the effective number of rows, {level}, {rows}{few}",
            "Intervals of means": "t with clustered errors, at the same level",
        }
    if prompts := _prompts(report["provenance"]["evaluations"]):
        out["System prompts"] = prompts
    if thinking := _thinking(report["provenance"]["evaluations"]):
        left_out = (report.get("teacher_answers") or {}).get("left_out")
        without = f"; {counted(left_out, 'row')} without usable thinking left out of the targets"
        out["Thinking"] = thinking + (without if left_out else "")
    facts = report.get("final_comparison")
    if not facts:
        return out
    margin = facts["margin_text"] or "none"
    out |= {
        "Comparison": facts["method"],
        "Margin": f"{margin}, by evaluate.margin" if facts["margin_text"] else margin,
        "Held-out rows": f"{facts['dataset_sha'][:16]} (hash of ids, inputs and true answers)",
        "Set": facts["split"],
    }
    if facts["provable_margin"] is not None:
        provable = f"{100 * facts['provable_margin']:.1f}" if facts["metric_unit"] == "rate" else "–"
        out["Provable margin"] = f"{provable} points with {counted(facts['n'], 'row')}, at a power of 80 %"
    return out


def _thinking(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Who thinks before an answer; empty where nobody does."""
    limits = {
        name: settings["thinking"] for name, settings in evaluations.items() if settings.get("thinking")
    }
    if not limits:
        return ""
    names = listed([model_phrase(name) for name in limits])
    verb = "thinks" if len(limits) == 1 else "think"
    return (
        f"{names} {verb} before the answer, at most {counted(max(limits.values()), 'token')}; others do not"
    )


def _prompts(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Who read another system prompt than that of the rows; empty where nobody did."""
    lengths = {
        name: len(settings["system"]) for name, settings in evaluations.items() if settings.get("system")
    }
    if not lengths:
        return ""
    names = listed([model_phrase(name) for name in lengths])
    length = counted(max(lengths.values()), "character")
    return f"{names} read targets.system ({length}) in place of that of the rows, which the others read"


def _any_figures(report: Report) -> Mapping[str, Any]:
    """The figures of one model: all answered the same rows."""
    return next(iter(report["metrics"].values()), {})


def measured_on(provenance: Mapping[str, Any]) -> str:
    """The machine, the MLX version and the device in one sentence."""
    machine, versions = provenance["machine"], provenance["versions"]
    names = [str(name) for name in (machine.get("processor"), machine.get("system")) if name]
    where = ", ".join(names) or "an unnamed machine"
    device = _device(str(machine.get("device", "")))
    on_metal = device == "the GPU" and "darwin" in str(machine.get("system", "")).lower()
    metal = "" if on_metal else " Nothing on this page was measured on Metal."
    return f"Measured on {where}, MLX {versions.get('mlx', 'of unknown version')} on {device}.{metal}"


def _device(name: str) -> str:
    if "gpu" in name.lower():
        return "the GPU"
    return "the CPU" if "cpu" in name.lower() else "an unnamed device"


def _machine(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The machine's known properties, sizes in units."""
    out = {}
    for key, value in machine.items():
        if value:
            name = words(key.removesuffix("_bytes")).capitalize()
            out[name] = size(value, page=True) if key.endswith("_bytes") else value
    return out


def _time(timestamp: float | None) -> str:
    if not timestamp:
        return NONE
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _settings(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that all models share, then each model's own; empty where there are none."""
    models = {model_title(name): _readable(settings) for name, settings in evaluations.items()}
    first = next(iter(models.values()), {})
    shared = {
        key: value
        for key, value in first.items()
        if all(settings.get(key, NONE) == value for settings in models.values())
    }
    own = {
        name: {key: value for key, value in settings.items() if key not in shared}
        for name, settings in models.items()
    }
    return {name: settings for name, settings in {"All models": shared, **own}.items() if settings}


def _readable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one evaluation with their keys as words."""
    out = {words(key): value for key, value in settings.items() if key not in ("dequantize", "unpack")}
    dequantized = is_dequantized(settings)
    if dequantized is not None:
        out["quantized weights"] = "dequantized" if dequantized else "as on disk"
    return out
