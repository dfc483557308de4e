"""The report of a recipe without a task: the loss of the model on held-out chats, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.evaluation_files import CHAT_LOSSES
from mlx_distill.errors import DataError
from mlx_distill.evaluate.goals import judge_goals
from mlx_distill.metrics.intervals import ratio_estimate
from mlx_distill.report import provenance
from mlx_distill.report.collect import heading
from mlx_distill.report.diagnosis import Finding
from mlx_distill.storage import read_jsonl, read_manifest
from mlx_distill.tasks.task import CHATS

Lines = Sequence[Mapping[str, Any]]


def build_chat_report(
    run: str | Path,
    recipe: Mapping[str, Any],
    evaluations: Mapping[str, str | Path],
    *,
    confidence: float = 0.95,
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """Collect the losses of each model and the facts about the run.

    Args:
        run: The run's folder.
        recipe: The recipe as a plain mapping.
        evaluations: Model name to the folder of its evaluation.
        confidence: Level of the intervals.
        findings: What is known to be wrong with the run's stages.

    Returns:
        The report as plain JSON values, with the keys that the report of a task has where they apply. Under
        ``metrics`` each model has ``loss`` in nats a token, ``perplexity``, its exponential, and
        ``token_accuracy``, the share of trained tokens that are the model's most probable ones; ``n`` of
        their intervals counts chats. All are None where no chat was held out.
    """
    run = Path(run)
    folders = {name: Path(path) for name, path in evaluations.items()}
    lines = {name: [line for _, line in read_jsonl(path / CHAT_LOSSES)] for name, path in folders.items()}
    splits = {name: _recorded(path).get("split", "test") for name, path in folders.items()}
    main = next(iter(splits.values()))
    metrics = {name: _figures(lines[name], folders[name], confidence) for name in folders}
    report: dict[str, Any] = {
        **heading(run, recipe, CHATS, confidence, main, {main: len(next(iter(lines.values())))}),
        "task_details": {
            "is_chats": True,
            "description": CHATS.description,
            "label": None,
            "labels": [],
            "score": None,
            "properties": [],
        },
        "models": list(evaluations),
        "controls": [],
        "answer": None,
        "final_comparison": None,
        "metrics": metrics,
        "by_set": {main: metrics},
        "comparisons": [],
        "change": _change(lines, confidence),
        **provenance.run_facts(run, recipe, {name: {} for name in folders}, folders, confidence),
        "diagnosis": list(findings),
    }
    report["goals"] = judge_goals(recipe["goals"], report, CHATS)
    return report


def _figures(lines: Lines, folder: Path, confidence: float) -> dict[str, Any]:
    """The figures of one model."""
    tokens = [line["tokens"] for line in lines]
    loss = ratio_estimate([line["nats"] for line in lines], tokens, confidence, bounds=(0.0, math.inf))
    right = ratio_estimate([line["right"] for line in lines], tokens, confidence, bounds=(0.0, 1.0))
    return {
        "loss": loss,
        "perplexity": {key: _exp(loss[key]) for key in ("value", "low", "high")} | {"n": loss["n"]},
        "token_accuracy": right,
        "tokens": sum(tokens),
        "peak_memory_gb": provenance.peak_memory_gb({}, folder),
        **provenance.speed(folder),
    }


def _exp(value: float | None) -> float | None:
    """The exponential; None where it is above every float."""
    return math.exp(value) if value is not None and value < 700 else None


def _change(lines: Mapping[str, Lines], confidence: float) -> dict[str, Any] | None:
    """By how much the loss has changed, on the same chats; None where there are none."""
    before, after = lines.get("teacher_before"), lines.get("teacher")
    if not before or not after:
        return None
    if [line["tokens"] for line in before] != [line["tokens"] for line in after]:
        raise DataError("the models were measured on different chats", fix="run the evaluate stage again")
    gaps = [new["nats"] - old["nats"] for old, new in zip(before, after, strict=True)]
    return dict(ratio_estimate(gaps, [line["tokens"] for line in after], confidence))


def _recorded(folder: Path) -> Mapping[str, Any]:
    manifest = read_manifest(folder)
    return manifest.recorded if manifest else {}
