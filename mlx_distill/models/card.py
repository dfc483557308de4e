"""The README.md of a folder that leaves the house: what it is, where it came from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.files import Manifest, read_manifest
from mlx_distill.models.prepare import Prepared

# Of a report's figures, those that say how good and how fast a model is: key -> head of the column.
_FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "verdict_agreement": "same label as the teacher",
    "agreement": "same label and near score",
    "score_mae": "mean error of the score",
    "false_positive_rate": "false positives",
    "false_negative_rate": "false negatives",
    "json_valid": "valid JSON",
    "latency_s": "seconds an answer",
    "items_per_minute": "items a minute",
    "peak_memory_gb": "peak memory, GB",
}


def card_text(
    title: str,
    folder: Path,
    ready: Prepared,
    notes: Sequence[str],
    report: Mapping[str, Any] | None = None,
    *,
    library: str = "transformers",
) -> str:
    """A model card in Markdown.

    Args:
        title: What the exported folder is called.
        folder: The folder that is exported: a model or an adapter.
        ready: The model, or the adapter's base.
        notes: What the export says of itself.
        report: A run's ``report.json``.
        library: What reads the exported folder.
    """
    made = _ancestry(folder, ready.folder)
    source = next((str(m.recorded["source"]) for m in made.values() if m.recorded.get("source")), "")
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if _is_hub_id(source):
        front.append(f"base_model: {source}")
    lines = ["---", *front, "---", "", f"# {title}", "", f"A `{ready.architecture.model_type}` written by mlx-distill."]
    lines += ["", "## How it was written", "", *(f"- {note}" for note in notes)]
    if difference := ready.architecture.stock_differs(ready.config):
        lines += ["", f"Note: {difference}."]
    if made:
        lines += ["", "## Provenance", "", *(_origin(name, manifest) for name, manifest in made.items())]
    if report:
        lines += ["", "## Measured", "", *_figures(folder.resolve().name, report)]
    return "\n".join(lines) + "\n"


def _ancestry(folder: Path, base: Path) -> dict[str, Manifest]:
    """Manifests of the folder and of what it was made from, as far as that stands beside it unchanged; nearest first."""
    found: dict[str, Manifest] = {}
    queue = [folder.resolve(), base.resolve()]
    for path in queue:
        manifest = read_manifest(path)
        if manifest is None or path.name in found:
            continue
        found[path.name] = manifest
        for name, content in manifest.parents.items():
            parent = read_manifest(path.parent / name)
            if parent is not None and parent.content == content:
                queue.append(path.parent / name)
    return found


def _origin(name: str, manifest: Manifest) -> str:
    parts = [f"- `{name}`: made by the stage `{manifest.stage}`, key `{manifest.key[:16]}`"]
    if source := manifest.recorded.get("source"):
        # A folder's path says nothing on another machine.
        parts.append(f"from {source if _is_hub_id(str(source)) else Path(str(source)).name}")
    if commit := manifest.recorded.get("commit"):
        parts.append(f"at commit `{commit}`")
    parts += [f"from {parent} `{content[:16]}`" for parent, content in sorted(manifest.parents.items())]
    versions = manifest.recorded.get("versions") or {}
    parts += [f"with {package} {versions[package]}" for package in ("mlx-distill", "mlx") if package in versions]
    return ", ".join(parts)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def _figures(name: str, report: Mapping[str, Any]) -> list[str]:
    metrics: Mapping[str, Mapping[str, Any]] = report.get("metrics") or {}
    keys = [key for key in _FIGURES if any(_cell(m.get(key)) for m in metrics.values())]
    if not keys:
        return ["No figures."]
    out = ["| model | " + " | ".join(_FIGURES[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    out += ["| " + " | ".join([model, *(_cell(values.get(key)) for key in keys)]) + " |" for model, values in metrics.items()]
    rows = (report.get("sets") or {}).get(report.get("main_set"))
    said = [f"Of the run `{report['name']}`"] if report.get("name") else []
    said += [f"on {rows:,} held-out rows"] if isinstance(rows, int) else []
    said += [f"in brackets {report['confidence']:.0%} intervals"] if report.get("confidence") else []
    said += [f"this is its `{name}`"] if name in metrics else []
    return [*out, "", ", ".join(said) + "."] if said else out


def _cell(entry: Any) -> str:
    """A figure, with its interval where it has one; nothing where there is none."""
    if isinstance(entry, Mapping):
        value, low, high = (entry.get(key) for key in ("value", "low", "high"))
        between = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        return "" if value is None else f"{value:.3f}{between}"
    return f"{entry:.3f}" if isinstance(entry, (int, float)) else ""
