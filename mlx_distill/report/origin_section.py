"""Machine, versions, seeds, stages and the recipe: where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import TableRow, table
from mlx_distill.run_models import is_dequantized, model_title
from mlx_distill.text import NONE, duration, size, value_text, words

Report = Mapping[str, Any]


def measured_note(report: Report) -> str:
    """One sentence: what was measured where."""
    found = report["provenance"]
    machine, versions = found["machine"], found["versions"]
    where = (
        ", ".join(str(part) for part in (machine.get("processor"), machine.get("system")) if part)
        or "an unnamed machine"
    )
    device = str(machine.get("device", ""))
    metal = "" if _on_metal(machine) else " Nothing on this page was measured on Metal."
    return (
        f"Measured on {where}, MLX {versions.get('mlx', 'of unknown version')} on {_device(device)}.{metal}"
    )


def _on_metal(machine: Mapping[str, Any]) -> bool:
    return (
        "gpu" in str(machine.get("device", "")).lower() and "darwin" in str(machine.get("system", "")).lower()
    )


def _device(device: str) -> str:
    return (
        "the GPU"
        if "gpu" in device.lower()
        else "the CPU"
        if "cpu" in device.lower()
        else "an unnamed device"
    )


def origin(report: Report) -> Html:
    """Everything that one needs to get the same figures again."""
    found = report["provenance"]
    machine = {
        words(key.removesuffix("_bytes")).capitalize(): size(value, page=True)
        if key.endswith("_bytes")
        else value
        for key, value in found["machine"].items()
        if value
    }
    versions = {name: value for name, value in found["versions"].items() if value != "missing"}
    parts = [
        el("p", measured_note(report), class_="note"),
        el(
            "div",
            _list("Machine", machine),
            _list("Versions", versions),
            _list("Seeds", found["seeds"]),
            class_="lists",
        ),
        _stages(found["stages"]),
        _settings(found["evaluations"]),
        el(
            "details",
            el("summary", "Recipe"),
            el("pre", yaml.safe_dump(dict(found["recipe"]), sort_keys=False, allow_unicode=True)),
        ),
    ]
    return el("div", parts)


def _list(title: str, items: Mapping[str, Any]) -> Html | None:
    pairs = [el("div", el("dt", name), el("dd", value_text(value))) for name, value in items.items()]
    return el("div", el("h3", title), el("dl", pairs)) if pairs else None


def _stages(stages: list[Mapping[str, Any]]) -> Html | None:
    rows: list[TableRow] = []
    for entry in stages:
        finished = (
            datetime.fromtimestamp(entry["finished"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            if entry["finished"]
            else NONE
        )
        cells = [
            duration(entry["seconds"], page=True),
            size(entry["bytes"], page=True),
            finished,
            el("code", entry["key"][:12], title=entry["key"]),
        ]
        rows.append((entry["folder"], cells, None))
    heads = ["Folder", "Took", "Size", "Finished", "Key"]
    return (
        table(
            "Stages of this run; a key is a hash of all that can change a stage’s result",
            heads,
            rows,
            class_="stages",
        )
        if rows
        else None
    )


def _settings(evaluations: Mapping[str, Mapping[str, Any]]) -> Html | None:
    """What holds for all models once, then each model's own."""
    shown = {model_title(name): _shown(settings) for name, settings in evaluations.items()}
    first = next(iter(shown.values()), {})
    common = {
        key: value for key, value in first.items() if all(s.get(key, NONE) == value for s in shown.values())
    }
    own = {
        name: {key: value for key, value in settings.items() if key not in common}
        for name, settings in shown.items()
    }
    lists = [
        found for name, settings in {"All models": common, **own}.items() if (found := _list(name, settings))
    ]
    if not lists:
        return None
    return el("details", el("summary", "Settings of the evaluations"), el("div", lists, class_="lists"))


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    shown = {words(key): value for key, value in settings.items() if key not in ("dequantize", "unpack")}
    dequantized = is_dequantized(settings)
    if dequantized is not None:
        shown["quantized weights"] = "dequantized" if dequantized else "as on disk"
    return shown
