"""The README.md of a folder that leaves the house: what it is, where it came from, what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_distill.models.checkpoint.plan import CheckpointPlan
from mlx_distill.report.tables import metric_titles
from mlx_distill.run_models import dequantization_note
from mlx_distill.storage import Manifest, read_manifest
from mlx_distill.text import duration, gigabytes, interval, percent, significant

_RATES = (
    "accuracy",
    "macro_f1",
    "verdict_agreement",
    "agreement",
    "false_positive_rate",
    "false_negative_rate",
    "json_valid",
)
# Of a report's figures, those that say how good and how fast a model is, and how each is written.
_FIGURES: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(_RATES, lambda rate: _between(percent(rate.get("value")), interval(rate))),
    "score_gap": lambda gap: f"{gap['value']:.1f} [{gap['low']:.1f}–{gap['high']:.1f}]",
    "latency_s": partial(duration, page=True),
    "items_per_minute": lambda pace: significant(pace, 3),
    "peak_memory_gb": gigabytes,
}


def card_text(
    title: str,
    folder: Path,
    plan: CheckpointPlan,
    notes: Sequence[str],
    report: Mapping[str, Any] | None = None,
    *,
    library: str = "transformers",
) -> str:
    """A model card in Markdown.

    Args:
        title: What the exported folder is called.
        folder: The folder that is exported: a model or an adapter.
        plan: The model, or the adapter's base.
        notes: What the export says of itself.
        report: A run's ``report.json``.
        library: What reads the exported folder.
    """
    made = _ancestry(folder, plan.folder)
    source = next((str(m.recorded["source"]) for m in made.values() if m.recorded.get("source")), "")
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if _is_hub_id(source):
        front.append(f"base_model: {source}")
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {title}",
        "",
        f"A `{plan.architecture.model_type}` written by mlx-distill.",
    ]
    lines += ["", "## How it was written", "", *(f"- {note}" for note in notes)]
    if difference := plan.architecture.stock_differs(plan.config):
        lines += ["", f"Note: {difference}."]
    if made:
        lines += ["", "## Provenance", "", *(_origin(name, manifest) for name, manifest in made.items())]
    if report:
        lines += ["", "## Measured", "", *_figures(folder.resolve().name, report)]
    return "\n".join(lines) + "\n"


def _ancestry(folder: Path, base: Path) -> dict[str, Manifest]:
    """Manifests of the folder and of what it was made from, as far as that stands beside it unchanged;
    nearest first.
    """
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
    parts += [
        f"with {package} {versions[package]}" for package in ("mlx-distill", "mlx") if package in versions
    ]
    return ", ".join(parts)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def _figures(name: str, report: Mapping[str, Any]) -> list[str]:
    metrics: Mapping[str, Mapping[str, Any]] = report.get("metrics") or {}
    heads = metric_titles(report.get("task_details") or {})
    keys = [key for key in _FIGURES if any(_cell(m, key) for m in metrics.values())]
    if not keys:
        return ["No figures."]
    out = [
        "| model | " + " | ".join(_escaped(heads[key]) for key in keys) + " |",
        "|---" * (len(keys) + 1) + "|",
    ]
    out += [
        "| " + " | ".join([_escaped(model), *(_cell(values, key) for key in keys)]) + " |"
        for model, values in metrics.items()
    ]
    rows = (report.get("sets") or {}).get(report.get("main_set"))
    said = [f"Of the run `{report['name']}`"] if report.get("name") else []
    said += [f"on {rows:,} held-out rows"] if isinstance(rows, int) else []
    said += [f"in brackets {percent(report['confidence'], 0)} intervals"] if report.get("confidence") else []
    said += [f"this is its `{name}`"] if name in metrics else []
    settings = (report.get("provenance") or {}).get("evaluations") or {}
    note = dequantization_note({model: settings[model] for model in metrics if model in settings})
    tail = " ".join([*([", ".join(said) + "."] if said else []), *([note] if note else [])])
    return [*out, "", tail] if tail else out


def _cell(figures: Mapping[str, Any], key: str) -> str:
    """A figure as the run's page writes it, with its interval where it has one; nothing where there is none."""
    entry = figures.get(key)
    measured = entry.get("value") if isinstance(entry, Mapping) else entry
    return "" if measured is None else _FIGURES[key](entry)


def _between(value: str, ends: str) -> str:
    return f"{value} [{ends}]" if ends else value


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
