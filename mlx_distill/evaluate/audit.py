"""The audit of a run in figures: bits per byte of each model on the data and on general text, the parts of
the student's loss, and what the teacher's cache loses of a divergence. Without a student bits per byte alone.

The stage ``audit`` writes sums over rows (:data:`LOSSES`, :data:`PARTS`, :data:`COMPARED`) and
:data:`FACTS`; intervals are made here, at the confidence of the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.metrics.intervals import Estimate, ratio_estimate
from mlx_distill.run_models import model_phrase
from mlx_distill.storage import read_json, read_jsonl
from mlx_distill.text import percent, significant

FOLDER = "audit"
FACTS = "audit.json"
LOSSES = "losses.jsonl"
PARTS = "parts.json"
COMPARED = "divergences.jsonl"
FORMAT = 1
SETS = ("train", "valid", "general")
"""Answers of training rows, answers of validation rows, general text."""
MAX_FORGOTTEN = 0.01  # of the bits a byte before
MAX_LOST = 0.01  # of the divergence
MIN_NATS = 1e-3  # a position: a smaller difference teaches nothing, and may be rounding
_PAIRS = {"teacher": "teacher_before", "student": "student_before"}

Lines = Sequence[Mapping[str, Any]]


def read_audit(folder: Path, confidence: float = 0.95) -> dict[str, Any] | None:
    """The audit in a folder in figures (:func:`audit_figures`); None where there is none."""
    if not (folder / FACTS).is_file():
        return None
    losses, compared = ([line for _, line in read_jsonl(folder / name)] for name in (LOSSES, COMPARED))
    return audit_figures(read_json(folder / FACTS), losses, read_json(folder / PARTS), compared, confidence)


def audit_figures(
    facts: Mapping[str, Any],
    losses: Lines,
    parts: Mapping[str, Any],
    compared: Lines,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The figures of an audit as JSON.

    Args:
        facts: What was measured on which text and with which losses.
        losses: A line a model, set and row: ``model``, ``set``, ``id``, ``nats``, ``tokens``, ``bytes``.
        parts: ``{model: {term: {kind: [events, sum]}}}`` and under ``coefficients`` those of the terms.
        compared: A line a model and row, see :func:`mlx_distill.distill.audit.compare`.
        confidence: Level of the intervals.

    Returns:
        ``facts``; ``bits_per_byte``: of each model and set an estimate over its rows; ``changes``: of
        ``teacher`` and ``student`` and each set the difference to the model before its training, an estimate
        over the same rows with ``relative``, its share of the value before; ``parts``: of each student and
        term ``coefficient``, ``mean`` and by kind ``events``, ``mean`` and ``share`` of the whole loss;
        ``divergence``: of each student see :func:`_divergence`; and ``warnings``, texts.
    """
    models = list(dict.fromkeys(line["model"] for line in losses))
    by = {
        (model, name): [line for line in losses if (line["model"], line["set"]) == (model, name)]
        for model in models
        for name in SETS
    }
    out: dict[str, Any] = {
        "facts": dict(facts),
        "bits_per_byte": {
            model: {name: _bits_per_byte(by[model, name], confidence) for name in SETS if by[model, name]}
            for model in models
        },
        "changes": {
            model: {
                name: _change(by[before, name], by[model, name], confidence)
                for name in SETS
                if by[model, name]
            }
            for model, before in _PAIRS.items()
            if model in models and before in models
        },
        "parts": {
            model: _parts(terms, parts["coefficients"])
            for model, terms in parts.items()
            if model != "coefficients" and terms
        },
        "divergence": {
            model: _divergence([line for line in compared if line["model"] == model])
            for model in dict.fromkeys(line["model"] for line in compared)
        },
    }
    return out | {"warnings": list(_warnings(out))}


def _bits_per_byte(lines: Lines, confidence: float) -> Estimate:
    bits = [line["nats"] / math.log(2) for line in lines]
    return ratio_estimate(bits, [line["bytes"] for line in lines], confidence, bounds=(0.0, math.inf))


def _change(before: Lines, after: Lines, confidence: float) -> dict[str, Any]:
    """The difference in bits a byte on the same rows."""
    gaps = [(new["nats"] - old["nats"]) / math.log(2) for old, new in zip(before, after, strict=True)]
    sizes = [line["bytes"] for line in after]
    estimate = ratio_estimate(gaps, sizes, confidence)
    reference = _bits_per_byte(before, confidence)["value"]
    value = estimate["value"]
    relative = value / reference if value is not None and reference else None
    return {**estimate, "relative": relative}


def _parts(terms: Mapping[str, Any], coefficients: Mapping[str, float]) -> dict[str, Any]:
    """The means of a student's loss by term and kind of token, and each one's share of the whole loss, as it
    is trained: each term a mean over its events, times its coefficient.
    """
    totals = {term: np.array(list(kinds.values()), dtype=float).sum(axis=0) for term, kinds in terms.items()}
    loss = sum(coefficients[term] * total / max(events, 1) for term, (events, total) in totals.items())
    return {
        "loss": float(loss),
        "terms": {
            term: {
                "coefficient": coefficients[term],
                "events": round(float(totals[term][0])),
                "mean": float(totals[term][1] / max(totals[term][0], 1)),
                "kinds": {
                    kind: {
                        "events": events,
                        "mean": total / events,
                        "share": float(coefficients[term] * total / totals[term][0] / loss) if loss else None,
                    }
                    for kind, (events, total) in kinds.items()
                },
            }
            for term, kinds in terms.items()
        },
    }


def _divergence(lines: Lines) -> dict[str, Any]:
    """A divergence from the cache beside the exact one.

    Returns:
        ``positions``, means a position ``cached`` and ``exact``, ``lost``, the share of the exact one that
        the cache does not have (negative: it has more), ``tail``, the mean mass outside of the top k;
        ``kept``: ``positions``, ``cached``, ``exact`` and ``lost`` of those whose top k has nearly all mass;
        ``worst``: the position at which the two differ most.
    """
    kept = _means([line["kept"] for line in lines])
    worst = max(
        (line["worst"] for line in lines if "worst" in line),
        key=lambda one: abs(one["exact"] - one["cached"]),
        default=None,
    )
    count = sum(line["positions"] for line in lines)
    tail = sum(line["tail"] for line in lines) / max(count, 1)
    return {**_means(lines), "tail": tail, "kept": kept, "worst": worst}


def _means(lines: Lines) -> dict[str, Any]:
    positions = sum(line["positions"] for line in lines)
    cached, exact = (sum(line[key] for line in lines) / max(positions, 1) for key in ("cached", "exact"))
    lost = 1 - cached / exact if exact > 0 else None
    return {"positions": positions, "cached": cached, "exact": exact, "lost": lost}


def _warnings(figures: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for model, sets in figures["changes"].items():
        change = sets.get("general")
        if change and _is_forgotten(change):
            section = "teach" if model == "teacher" else "distill"
            yield {
                "what": f"{model_phrase(model)} has forgotten: general text takes "
                f"{percent(change['relative'])} more bits than before its training "
                f"(+{significant(change['value'], 2)} a byte)",
                "fix": "if it is used for more than the task, add rows of other kinds, or lower "
                f"{section}.learning_rate or {section}.epochs",
            }
    facts, after = figures["facts"], figures["divergence"].get("student")
    if after and facts["reads_cache"] and _is_off(after):
        yield {
            "what": f"{facts['compared']} from the cache is {percent(abs(after['lost']))} "
            f"{'below' if after['lost'] > 0 else 'above'} the exact one: {percent(after['tail'], 2)} of the "
            "teacher’s mass is outside of its top k",
            "fix": "raise targets.top_k, or set distill.teacher: live",
        }


def _is_off(entry: Mapping[str, Any]) -> bool:
    """The divergence from the cache is not the exact one."""
    lost = entry["lost"]
    return lost is not None and abs(lost) > MAX_LOST and abs(entry["exact"] - entry["cached"]) > MIN_NATS


def _is_forgotten(change: Mapping[str, Any]) -> bool:
    """The whole interval is above 0, and the change is no trifle."""
    low, relative = change["low"], change["relative"]
    return low is not None and low > 0 and relative is not None and relative > MAX_FORGOTTEN


def audit_texts(figures: Mapping[str, Any]) -> dict[str, str]:
    """The main figures for people, by what they are.

    >>> rates = {"train": {"value": 0.41}, "valid": {"value": 0.52}}
    >>> audit_texts({"bits_per_byte": {"teacher": rates}, "changes": {}, "divergence": {}})
    {'bits a byte of training / validation answers': 'teacher 0.410 / 0.520'}
    """
    shown = (
        f"{model.replace('_', ' ')} "
        + " / ".join(f"{sets[name]['value']:.3f}" for name in ("train", "valid") if name in sets)
        for model, sets in figures["bits_per_byte"].items()
    )
    out = {"bits a byte of training / validation answers": ", ".join(shown)}
    changes = [
        f"{model} {one['value']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f}, {one['relative']:+.1%})"
        for model, sets in figures["changes"].items()
        if (one := sets.get("general")) and one["low"] is not None and one["relative"] is not None
    ]
    if changes:
        out["change in bits a byte of general text"] = ", ".join(changes)
    after = figures["divergence"].get("student")
    if after and figures["facts"].get("reads_cache", True):
        softened = figures["facts"]["temperature"]
        at = f" at temperature {softened:g}" if softened != 1 else ""
        out[f"{figures['facts']['compared']} to the teacher{at}"] = (
            f"{after['cached']:.4g} nats a position from the cache, {after['exact']:.4g} exactly; "
            f"{percent(after['tail'], 2)} of the mass in the tail"
        )
    return out


def audit_lines(figures: Mapping[str, Any]) -> list[str]:
    """What is printed of :func:`audit_figures`."""
    lines = [f"{name}: {text}" for name, text in audit_texts(figures).items()]
    return lines + [f"warning: {one['what']} (to fix: {one['fix']})" for one in figures["warnings"]]
