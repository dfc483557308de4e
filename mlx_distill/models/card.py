"""The README.md of a folder that leaves the house: what it is, where it came from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.files import read_manifest

_FIGURES = (
    ("accuracy", "accuracy"),
    ("verdict_agreement", "same label as the teacher"),
    ("agreement", "same label and near score"),
    ("json_valid", "valid JSON"),
)


def card_text(folder: Path, ready: Any, notes: Sequence[str], report: Mapping[str, Any] | None = None) -> str:
    """A model card in Markdown.

    Args:
        folder: The folder that is exported.
        ready: Its :class:`mlx_distill.models.convert.Prepared`.
        notes: What the export says of itself.
        report: A run's ``report.json``.
    """
    manifest = read_manifest(folder) or read_manifest(ready.folder)
    source = str((manifest.recorded if manifest else {}).get("source") or "")
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        front.append(f"base_model: {source}")
    lines = ["---", *front, "---", "", f"# {folder.resolve().name}", "", f"A `{ready.architecture.model_type}` written by mlx-distill."]
    lines += ["", "## How it was written", "", *(f"- {note}" for note in notes)]
    if difference := ready.architecture.stock_differs(ready.config):
        lines += ["", f"Note: {difference}."]
    if manifest:
        lines += ["", "## Provenance", "", f"- made by the stage `{manifest.stage}`, key `{manifest.key[:16]}`"]
        lines += [f"- from {name}: `{value[:16]}`" for name, value in sorted(manifest.parents.items())]
    if report:
        lines += ["", "## Measured", "", *_figures(report)]
    return "\n".join(lines) + "\n"


def _figures(report: Mapping[str, Any]) -> list[str]:
    metrics: Mapping[str, Mapping[str, Any]] = report.get("metrics") or {}
    keys = [(key, label) for key, label in _FIGURES if any(_value(m.get(key)) is not None for m in metrics.values())]
    if not keys:
        return ["No figures."]
    out = ["| model | " + " | ".join(label for _, label in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, values in metrics.items():
        cells = [_value(values.get(key)) for key, _ in keys]
        out.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.3f}" for cell in cells) + " |")
    return out


def _value(entry: Any) -> float | None:
    value = entry.get("value") if isinstance(entry, Mapping) else entry
    return float(value) if isinstance(value, (int, float)) else None
