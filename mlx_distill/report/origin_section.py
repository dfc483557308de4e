"""Section of the report: machine, versions, seeds, stages and recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import Report, TableRow, table
from mlx_distill.run_models import is_dequantized, model_title
from mlx_distill.text import NONE, duration, size, value_text, words


def origin(report: Report) -> Html:
    """The section on where the figures come from."""
    provenance = report["provenance"]
    versions = {name: value for name, value in provenance["versions"].items() if value != "missing"}
    recipe = yaml.safe_dump(dict(provenance["recipe"]), sort_keys=False, allow_unicode=True)
    lists = [
        _list("Machine", _machine(provenance["machine"])),
        _list("Versions", versions),
        _list("Seeds", provenance["seeds"]),
    ]
    return el(
        "div",
        el("p", measured_on(provenance), class_="note"),
        el("div", lists, class_="lists"),
        _stages(provenance["stages"]),
        _settings(provenance["evaluations"]),
        el("details", el("summary", "Recipe"), el("pre", recipe)),
    )


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


def _list(title: str, items: Mapping[str, Any]) -> Html | None:
    pairs = [el("div", el("dt", name), el("dd", value_text(value))) for name, value in items.items()]
    return el("div", el("h3", title), el("dl", pairs)) if pairs else None


def _stages(stages: Sequence[Mapping[str, Any]]) -> Html | None:
    if not stages:
        return None
    rows: list[TableRow] = []
    for entry in stages:
        cells = [
            duration(entry["seconds"], page=True),
            size(entry["bytes"], page=True),
            _time(entry["finished"]),
            el("code", entry["key"][:12], title=entry["key"]),
        ]
        rows.append((entry["folder"], cells, None))
    caption = "Stages of this run; a key is a hash of everything that can change a stage’s result"
    return table(caption, ["Folder", "Duration", "Size", "Finished", "Key"], rows, class_="stages")


def _time(timestamp: float | None) -> str:
    if not timestamp:
        return NONE
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _settings(evaluations: Mapping[str, Mapping[str, Any]]) -> Html | None:
    """The settings that all models share, then each model's own."""
    models = {model_title(name): _readable(settings) for name, settings in evaluations.items()}
    first = next(iter(models.values()), {})
    shared = {
        key: value
        for key, value in first.items()
        if all(settings.get(key, NONE) == value for settings in models.values())
    }
    lists = [_list("All models", shared)]
    for name, settings in models.items():
        lists.append(_list(name, {key: value for key, value in settings.items() if key not in shared}))
    if not any(lists):
        return None
    return el("details", el("summary", "Settings of the evaluations"), el("div", lists, class_="lists"))


def _readable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one evaluation with their keys as words."""
    out = {words(key): value for key, value in settings.items() if key not in ("dequantize", "unpack")}
    dequantized = is_dequantized(settings)
    if dequantized is not None:
        out["quantized weights"] = "dequantized" if dequantized else "as on disk"
    return out
