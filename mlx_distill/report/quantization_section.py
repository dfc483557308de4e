"""Section of the report: what quantizing did to the student, and which weights were kept and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.report.charts import points_chart
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import Report, TableRow, number_cell, table
from mlx_distill.text import NONE, counted, duration, signed_points, significant

_NAMES = {
    "rounding": "Rounding, without rows",
    "weighted scales": "Scales weighted by activations",
    "calibrate": "Calibrated: scales and error feedback",
    "distill": "Distilled: trained towards the student",
}
_MODULES = 12  # of the table of sensitivity that are shown


def quantization(report: Report) -> Html | None:
    """The candidates for the quantized weights, the curve of divergence over bits, the tensors that lose
    most; None where the student was quantized without rows, or not at all.
    """
    facts = report.get("quantization")
    if not facts or "candidates" not in facts:
        return None
    parts = [el("p", _summary(facts)), _candidates(facts), _chart(facts), _sensitivity(facts)]
    return el("div", parts)


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
        f"rounding, that of its answers from {_nats(before['answer_kl'])} to {_nats(after['answer_kl'])}."
    )


def _candidates(facts: Mapping[str, Any]) -> Html:
    rows: list[TableRow] = []
    for one in facts["candidates"]:
        if "failed" in one:
            cells = [number_cell(NONE)] * 3 + [_time(one), el("span", one["failed"])]
            rows.append((_NAMES[one["name"]], cells, None))
            continue
        flips = f"{one['flips']} of {one['labelled']}" if one["labelled"] else NONE
        kept = one["name"] == facts["kept"]
        tried = "passed" if one["passed"] else "failed"
        verdict = "kept" if kept else NONE if one["name"] == "rounding" else tried
        cells = [
            number_cell(_nats(one["kl"])),
            number_cell(_nats(one["answer_kl"])),
            number_cell(flips),
            _time(one),
            el("span", verdict),
        ]
        rows.append((_NAMES[one["name"]], cells, "best" if kept else None))
    caption = (
        "KL divergence of the quantized student from the unquantized one, in thousandths of a nat a token. "
        "Kept is the best candidate whose divergence is below that of rounding, whose answers’ divergence is "
        f"at most {_nats(facts['answer_tolerance'])} above, and that flips no more labels."
    )
    heads = ["Weights", "All tokens", "Answers", "Labels flipped", "Time", "Gate"]
    return table(caption, heads, rows, class_="cost")


def _time(one: Mapping[str, Any]) -> Html:
    return number_cell(duration(one["seconds"], page=True) if one["seconds"] else NONE)


def _chart(facts: Mapping[str, Any]) -> Html | None:
    """The divergence over the bits a weight: rounding in each mode, and the candidates."""
    curve: Sequence[Mapping[str, Any]] = facts.get("curve", ())
    points = [(one["bits_per_weight"], 1000 * one["kl"], one["mode"]) for one in curve if one["kl"] > 0]
    own = [
        (facts["bits_per_weight"], 1000 * one["kl"], one["name"])
        for one in facts["candidates"]
        if one.get("kl", 0) > 0 and (one["name"] != "rounding" or facts.get("chosen"))
    ]
    if len(points) < 2:
        return None
    caption = el(
        "figcaption",
        el("b", "Divergence over size"),
        " ",
        el("small", "line: one mode everywhere, rounded; dots: this student"),
    )
    label = "KL divergence in thousandths of a nat a token over bits a weight"
    figure = el("figure", caption, points_chart(points, own, "bits a weight", label), class_="chart")
    return el("div", figure, class_="charts")


def _sensitivity(facts: Mapping[str, Any]) -> Html | None:
    """The modules that lose most when they alone are quantized."""
    measured = facts.get("sensitivity")
    if not measured or not measured["kl"]:
        return None
    chosen: Mapping[str, str] = facts.get("chosen") or {}
    modes = list(dict.fromkeys(mode for some in measured["kl"].values() for mode in some))
    first = modes[0]
    order = sorted(measured["kl"], key=lambda path: -measured["kl"][path].get(first, 0.0))
    rows: list[TableRow] = []
    for path in order[:_MODULES]:
        some = measured["kl"][path]
        cells = [number_cell(_nats(some[mode]) if mode in some else NONE) for mode in modes]
        cells += [el("span", chosen[path])] if chosen else []
        rows.append((path.removeprefix("model."), cells, None))
    how = "" if measured["every_mode_measured"] else "; the first mode was measured, the others computed"
    caption = (
        "Divergence with one tensor alone quantized by rounding, in thousandths of a nat a token, on "
        f"{counted(measured['rows'], 'training row')}{how}. "
        f"{min(_MODULES, len(order))} of {len(order)} tensors, those that lose most first."
    )
    return table(caption, ["Tensor", *modes, *(["Chosen"] if chosen else [])], rows, class_="cost")


def _nats(value: float) -> str:
    """Thousandths of a nat."""
    return significant(1000 * max(value, 0.0), 3)
