"""The figures and warnings of an audit, from lines written by hand; the section of the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlx_distill.evaluate.audit import audit_figures, audit_lines
from mlx_distill.report.audit_section import audit

FACTS = {
    "general_text": {"name": "g.txt", "packaged": True, "bytes": 400, "paragraphs": 40, "left_out": 0},
    "rows": {"train": 2, "valid": 0},
    "targets": {"rows": 2, "set": "train", "left_out": 0},
    "token_loss": "kl",
    "compared": "kl",
    "reads_cache": True,
    "sampled": False,
    "live": False,
    "top_k": 4,
    "temperature": 1.0,
}
PARTS = {
    "student_before": {"text": {"words": [2, 6.0]}, "token": {"words": [2, 4.0]}},
    "student": {"text": {"words": [1, 1.0], "digits": [3, 5.0]}, "token": {"words": [2, 1.0]}},
    "coefficients": {"text": 0.5, "token": 2.0},
}


def general(model: str, nats: list[float]) -> list[dict[str, Any]]:
    return [
        {"model": model, "set": "general", "id": str(n), "nats": value, "tokens": 3, "bytes": 10}
        for n, value in enumerate(nats)
    ]


def figures(before: list[float], after: list[float], *, lost: float = 0.0, **facts: Any) -> dict[str, Any]:
    worst = {"cached": 0.5, "exact": 0.6, "tail": 0.02}
    compared = [
        {
            "model": "student",
            "positions": 10,
            "cached": 2.0 * (1 - lost),
            "exact": 2.0,
            "tail": 0.1,
            "kept": {"positions": 4, "cached": 0.9, "exact": 1.0},
            "worst": worst,
        },
        {"model": "student", "positions": 0, "cached": 0.0, "exact": 0.0, "tail": 0.0}
        | {"kept": {"positions": 0, "cached": 0.0, "exact": 0.0}},
    ]
    lines = [*general("student_before", before), *general("student", after)]
    return audit_figures({**FACTS, **facts}, lines, PARTS, compared)


NATS = np.random.default_rng(0).normal(20, 4, 40)
NOISE = np.random.default_rng(1).normal(0, 1, 40)


def test_a_change_is_paired_and_its_interval_is_that_of_a_bootstrap_over_paragraphs() -> None:
    found = figures(NATS.tolist(), (NATS + 0.6 + NOISE).tolist())["changes"]["student"]["general"]
    gaps = (0.6 + NOISE) / math.log(2)
    assert found["value"] == pytest.approx(gaps.sum() / 400)
    assert found["relative"] == pytest.approx((0.6 + NOISE).sum() / NATS.sum())
    draws = np.random.default_rng(2).integers(0, 40, (20_000, 40))
    ends = np.quantile(gaps[draws].sum(axis=1) / 400, [0.025, 0.975])
    assert [found["low"], found["high"]] == pytest.approx(ends.tolist(), abs=6e-3)


@pytest.mark.parametrize(
    ("change", "noise", "warned"),
    [(0.6, 1.0, True), (-0.6, 1.0, False), (0.3, 9.0, False), (0.1, 0.01, False)],
)
def test_forgetting_is_said_where_it_is_beyond_doubt_and_no_trifle(
    change: float, noise: float, warned: bool
) -> None:
    found = figures(NATS.tolist(), (NATS + change + noise * (NOISE - NOISE.mean())).tolist())
    assert bool(found["warnings"]) is warned
    if warned:
        (one,) = found["warnings"]
        what = one["what"].replace("\u202f", " ")
        assert "the student has forgotten: general text takes 3.0 % more bits" in what
        assert "distill.learning_rate" in one["fix"]


@pytest.mark.parametrize(
    ("lost", "facts", "warned"),
    [
        (0.02, {}, True),
        (-0.02, {}, True),
        (0.009, {}, False),
        (0.5, {"reads_cache": False}, False),
    ],
)
def test_a_cache_that_is_off_by_more_than_one_percent_is_said(
    lost: float, facts: dict[str, Any], warned: bool
) -> None:
    found = figures(NATS.tolist(), NATS.tolist(), lost=lost, **facts)
    assert bool(found["warnings"]) is warned
    entry = found["divergence"]["student"]
    assert entry["lost"] == pytest.approx(lost)
    assert (entry["positions"], entry["tail"], entry["kept"]["lost"]) == (10, 0.01, pytest.approx(0.1))
    assert entry["worst"] == {"cached": 0.5, "exact": 0.6, "tail": 0.02}
    assert any("to fix" in line for line in audit_lines(found)) is warned


def test_the_parts_are_means_a_term_times_its_coefficient() -> None:
    found = figures(NATS.tolist(), NATS.tolist())["parts"]
    # text: 6 nats at 4 events, times 0.5; token: 1 nat at 2 events, times 2.
    assert found["student"]["loss"] == pytest.approx(0.5 * 6 / 4 + 2 * 1 / 2)
    digits = found["student"]["terms"]["text"]["kinds"]["digits"]
    assert digits == {"events": 3, "mean": 5 / 3, "share": pytest.approx(0.5 * 5 / 4 / 1.75)}
    assert found["student_before"]["loss"] == pytest.approx(0.5 * 3 + 2 * 2)


def test_the_section_shows_figures_changes_and_a_kind_that_only_one_student_has() -> None:
    view = audit({"audit": figures(NATS.tolist(), (NATS + 0.6 + NOISE).tolist())})
    assert view is not None
    value, change = view["bits"]["student"]["general"]
    assert float(value) > 2 and change.startswith("+0.0") and change.endswith("%")
    assert list(view["columns"]) == ["general"]
    assert view["kinds"]["digits"]["text"][0] == "–"  # the student before has none
    assert view["kinds"]["words"]["text"] == ("1.00", view["kinds"]["words"]["text"][1])
    assert view["terms"] == {"token": "Token (times 2)", "text": "Text (times 0.5)"}
    nothing = {"facts": FACTS, "bits_per_byte": {"student": {"general": {"value": None}}}}
    empty = nothing | {"changes": {}, "parts": {}, "divergence": {}, "warnings": []}
    view = audit({"audit": empty})
    assert view is not None and view["bits"] == {"student": {"general": ("–", "")}} and view["kinds"] == {}
    assert audit({"audit": None}) is None and audit({}) is None
