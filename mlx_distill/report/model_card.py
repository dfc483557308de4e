"""The model card (README.md) of an exported model: architecture, provenance and measured metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_distill.models.checkpoint.plan import CheckpointPlan
from mlx_distill.report.card_prompts import prompt_section
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
    "answer_f1",
    "teacher_answer_f1",
    "json_valid",
)


def _rate_text(rate: Mapping[str, Any]) -> str:
    value, ends = percent(rate.get("value")), interval(rate)
    return f"{value} [{ends}]" if ends else value


def _score_text(gap: Mapping[str, Any]) -> str:
    value = f"{gap['value']:.1f}"
    return value if gap["low"] is None else f"{value} [{gap['low']:.1f}–{gap['high']:.1f}]"


# The metrics on the card, and how each is formatted.
_FORMATS: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(_RATES, _rate_text),
    "score_gap": _score_text,
    "first_token_s": partial(duration, page=True),
    "latency_s": partial(duration, page=True),
    "requests_per_second": lambda rate: significant(rate, 3),
    "items_per_minute": lambda rate: significant(rate, 3),
    "load_s": partial(duration, page=True),
    "model_memory_gb": gigabytes,
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
        title: The name of the exported folder.
        folder: The folder that is exported: a model or an adapter.
        plan: The model, or the adapter's base model.
        notes: Notes of the export on what it wrote.
        report: A run's ``report.json``.
        library: The library that reads the exported folder.
    """
    manifests = _ancestors(folder, plan.folder)
    sources = (manifest.recorded.get("source") for manifest in manifests.values())
    source = next((str(source) for source in sources if source), "")
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
    if difference := plan.architecture.stock_difference(plan.config):
        lines += ["", f"Note: {difference}."]
    lines += prompt_section(folder)
    if manifests:
        lines += ["", "## Provenance", "", *(_origin(name, m) for name, m in manifests.items())]
    if report:
        lines += ["", "## Measured", "", *_measured(folder.resolve().name, report)]
    return "\n".join(lines) + "\n"


def with_check(card: str, check: Mapping[str, Any]) -> str:
    """A model card with what the check of the exported folder found.

    Args:
        card: Of :func:`card_text`.
        check: Of :func:`mlx_distill.evaluate.artifact.check_artifact`.
    """
    steps = [f"- {_escaped(step['sentence'])}" for step in check["steps"]]
    sentence = check["sentence"]
    lines = ["", "## Checked", "", f"{sentence[0].upper()}{sentence[1:]}.", "", *steps]
    lines += ["", "Greedy answers, each step against the one before it, all computed in float32."]
    return card + "\n".join(lines) + "\n"


def _ancestors(folder: Path, base: Path) -> dict[str, Manifest]:
    """Manifests of the folder, its base and their parents, nearest first.

    Only parents that are still in the same run with the same content are followed.
    """
    manifests: dict[str, Manifest] = {}
    queue = [folder.resolve(), base.resolve()]
    for path in queue:
        manifest = read_manifest(path)
        if manifest is None or path.name in manifests:
            continue
        manifests[path.name] = manifest
        for name, content in manifest.parents.items():
            parent = read_manifest(path.parent / name)
            if parent is not None and parent.content == content:
                queue.append(path.parent / name)
    return manifests


def _origin(name: str, manifest: Manifest) -> str:
    """A line on how a folder was made."""
    parts = [f"- `{name}`: made by the stage `{manifest.stage}`, key `{manifest.key[:16]}`"]
    if source := manifest.recorded.get("source"):
        # The path of a local folder means nothing on another machine.
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


def _measured(name: str, report: Mapping[str, Any]) -> list[str]:
    """The table of metrics as lines of Markdown, and a sentence on where they come from."""
    metrics: Mapping[str, Mapping[str, Any]] = report.get("metrics") or {}
    titles = metric_titles(report.get("task_details") or {})
    keys = [key for key in _FORMATS if any(_cell(figures, key) for figures in metrics.values())]
    if not keys:
        return ["No figures."]
    answer = report.get("answer")
    lines = [answer["sentence"], ""] if answer else []
    lines += [_row(["model", *(_escaped(titles[key]) for key in keys)]), "|---" * (len(keys) + 1) + "|"]
    for model, figures in metrics.items():
        lines.append(_row([_escaped(model), *(_cell(figures, key) for key in keys)]))
    settings = (report.get("provenance") or {}).get("evaluations") or {}
    note = dequantization_note({model: settings[model] for model in metrics if model in settings})
    notes = " ".join(text for text in (_source(name, report), note) if text)
    return [*lines, "", notes] if notes else lines


def _source(name: str, report: Mapping[str, Any]) -> str:
    """One sentence: the run, the number of rows, the level of the intervals, the name of this model."""
    rows = (report.get("sets") or {}).get(report.get("main_set"))
    parts = []
    if report.get("name"):
        parts.append(f"Of the run `{report['name']}`")
    if isinstance(rows, int):
        parts.append(f"on {rows:,} held-out rows")
    if report.get("confidence"):
        parts.append(f"in brackets {percent(report['confidence'], 0)} intervals")
    if name in (report.get("metrics") or {}):
        parts.append(f"this is its `{name}`")
    return ", ".join(parts) + "." if parts else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(figures: Mapping[str, Any], key: str) -> str:
    """A metric as the report formats it; empty where it was not measured."""
    entry = figures.get(key)
    value = entry.get("value") if isinstance(entry, Mapping) else entry
    return "" if value is None else _FORMATS[key](entry)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
