"""Section of the report: what quantizing did to the student, and which weights were kept and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.tables import Report
from mlx_distill.text import counted, signed_points, significant

_NAMES = {
    "rounding": "Rounding, without rows",
    "weighted scales": "Scales weighted by activations",
    "calibrate": "Calibrated: scales and error feedback",
    "distill": "Distilled: trained towards the student",
}
_MODULES = 12  # of the table of sensitivity that are shown


def quantization(report: Report) -> dict[str, Any] | None:
    """The candidates for the quantized weights, the curve of divergence over bits, the tensors that lose
    most; None where the student was quantized without rows, or not at all.
    """
    facts = report.get("quantization")
    if not facts or "candidates" not in facts:
        return None
    return {
        "facts": facts,
        "names": _NAMES,
        "summary": _summary(facts),
        "chart": _chart(facts),
        "sensitivity": _sensitivity(facts),
    }


def _summary(facts: Mapping[str, Any]) -> str:
    """Which weights were kept, and why."""
    candidates, kept = facts["candidates"], facts["kept"]
    before, after = candidates[0], next(one for one in candidates if one["name"] == kept)
    rows = f"{counted(before['rows'], facts['held_out']['from'].removesuffix('s'))}"
    size = f"The student has {facts['bits_per_weight']:.2f} bits a weight. "
    if kept == "rounding" and facts["asked"] == "none":
        return f"{size}Its weights are rounded without rows (quantize.refine: none), measured on {rows}."
    if kept == "rounding":
        return (
            f"{size}Its weights are rounded without rows: on {rows} nothing that was fitted to "
            f"{counted(facts['calibration_rows'], 'training row')} passed the gate."
        )
    change = after["kl"] / before["kl"] - 1 if before["kl"] > 0 else 0.0
    fitted = counted(facts["calibration_rows"], "training row")
    return (
        f"{size}Kept: {_NAMES[kept][0].lower()}{_NAMES[kept][1:]}, fitted to {fitted}. "
        f"On {rows} the divergence from the unquantized student changes by {signed_points(change)} % against "
        f"rounding, that of its answers from {nats(before['answer_kl'])} to {nats(after['answer_kl'])}."
    )


def _chart(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The divergence over the bits a weight: rounding in each mode, and the candidates."""
    line = [
        (one["bits_per_weight"], 1000 * one["kl"], one["mode"])
        for one in facts.get("curve", ())
        if one["kl"] > 0
    ]
    dots = [
        (facts["bits_per_weight"], 1000 * one["kl"], one["name"])
        for one in facts["candidates"]
        if one.get("kl", 0) > 0 and (one["name"] != "rounding" or facts.get("chosen"))
    ]
    return {"line": line, "dots": dots} if len(line) > 1 else None


def _sensitivity(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The modules that lose most when they alone are quantized."""
    measured = facts.get("sensitivity")
    if not measured or not measured["kl"]:
        return None
    modes = list(dict.fromkeys(mode for some in measured["kl"].values() for mode in some))
    order = sorted(measured["kl"], key=lambda path: -measured["kl"][path].get(modes[0], 0.0))
    return {
        "modes": modes,
        "rows": {path: measured["kl"][path] for path in order[:_MODULES]},
        "all": len(order),
        "chosen": facts.get("chosen") or {},
    }


def nats(value: float) -> str:
    """Thousandths of a nat.

    >>> nats(0.01234)
    '12.3'
    """
    return significant(1000 * max(value, 0.0), 3)
