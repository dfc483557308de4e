"""The section on quantization: what was kept and why, the curve, the tensors that lose most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.html_page import Page, assert_loads_nothing

from mlx_distill.report import render_html
from mlx_distill.report.charts import points_chart


def candidate(name: str, kl: float, answer_kl: float, flips: int, passed: bool) -> dict[str, Any]:
    return {
        "name": name,
        "kl": kl,
        "answer_kl": answer_kl,
        "flips": flips,
        "tokens": 900,
        "answer_tokens": 90,
        "rows": 21,
        "labelled": 20,
        "passed": passed,
        "seconds": 0.0 if name == "rounding" else 12.5,
    }


def make_facts(kept: str = "calibrate", **changes: Any) -> dict[str, Any]:
    curve = [("affine3", 3.5, 0.0899), ("affine4", 4.5, 0.0198), ("affine5", 5.5, 0.0029)]
    facts = {
        "mode": "affine4",
        "bits_per_weight": 4.52,
        "asked": "calibrate",
        "kept": kept,
        "calibration_rows": 128,
        "answer_tolerance": 0.002,
        "held_out": {"rows": 21, "from": "validation rows"},
        "candidates": [
            candidate("rounding", 0.0198, 0.0007, 2, False),
            candidate("calibrate", 0.0121, 0.0011, 1, True),
        ],
        "curve": [{"mode": mode, "bits_per_weight": bits, "kl": kl} for mode, bits, kl in curve],
        "sensitivity": {
            "rows": 24,
            "every_mode_measured": True,
            "kl": {"model.embed_tokens": {"affine4": 0.0033}, "model.layers.0.q": {"affine4": 0.0121}},
        },
    }
    return facts | changes


def page_of(run: tuple[Path, dict[str, Any]], facts: dict[str, Any] | None) -> str:
    html = render_html({**run[1], "quantization": facts})
    assert_loads_nothing(html)
    return Page(html).text.replace("\u202f", " ")


def test_the_kept_refinement_with_its_figures(run: tuple[Path, dict[str, Any]]) -> None:
    text = page_of(run, make_facts())
    assert "The student has 4.52 bits a weight." in text
    assert "On 21 validation rows the divergence" in text and "−38.9 % against rounding" in text
    for figure in ("19.8", "12.1", "2 of 20", "1 of 20", "affine3", "12.1"):
        assert figure in text
    assert text.index("layers.0.q") < text.index("embed_tokens")  # the tensor that loses most first


def test_why_nothing_was_kept(run: tuple[Path, dict[str, Any]]) -> None:
    candidates = [candidate("rounding", 0.02, 0.001, 0, False), candidate("calibrate", 0.01, 0.009, 0, False)]
    text = page_of(run, make_facts("rounding", candidates=candidates))
    assert "nothing that was fitted to 128 training rows passed the gate" in text and "failed" in text


def test_a_training_that_diverged_is_said_in_the_table(run: tuple[Path, dict[str, Any]]) -> None:
    failed = {"name": "distill", "failed": "its training diverged", "passed": False, "seconds": 3.0}
    text = page_of(run, make_facts(candidates=[*make_facts()["candidates"], failed]))
    assert "its training diverged" in text and "kept" in text


def test_chosen_modes_stand_in_the_table(run: tuple[Path, dict[str, Any]]) -> None:
    chosen = {"model.embed_tokens": "affine5", "model.layers.0.q": "affine3"}
    text = page_of(run, make_facts(chosen=chosen))
    assert "Chosen" in text and "affine5" in text


@pytest.mark.parametrize("facts", [None, {"mode": "affine4", "bits_per_weight": 4.5}])
def test_no_section_without_rows(run: tuple[Path, dict[str, Any]], facts: Any) -> None:
    assert "Divergence over size" not in page_of(run, facts)


def test_points_stand_where_their_values_are() -> None:
    svg = str(points_chart([(3.0, 100.0, "a"), (5.0, 1.0, "b")], [(4.0, 10.0, "c")], "bits", "label"))
    page = Page(svg)
    circles = [(float(a["cx"]), float(a["cy"])) for tag, a in page.tags if tag == "circle"]
    (ax, ay), (bx, by), (cx, cy) = circles
    assert ax < cx < bx and ay < cy < by
    assert cy == pytest.approx((ay + by) / 2, abs=0.2)  # the axis is logarithmic


def test_names_of_points_stand_clear_of_the_line() -> None:
    """Above it beside its own points, below it beside the dots, and no name on another."""
    line = [(3.5, 90.0, "affine3"), (4.5, 20.0, "affine4"), (5.5, 3.0, "affine5")]
    dots = [(4.52, 12.0, "calibrate"), (4.52, 11.0, "distill")]
    page = Page(str(points_chart(line, dots, "bits", "label")))
    points = next(a["points"] for tag, a in page.tags if tag == "polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in str(points).split()]
    names = {}
    texts = [a for tag, a in page.tags if tag == "text" and "y" in a][-5:]
    for name, a in zip(["affine3", "affine4", "affine5", "distill", "calibrate"], texts, strict=True):
        x, y, width = float(str(a["x"])), float(str(a["y"])), 6.5 * len(name)
        start = x - width if a["text-anchor"] == "end" else x
        names[name] = (start, start + width, y)
    for name, (start, end, y) in names.items():
        assert start >= 0 and end <= 460, name
        for x in np.linspace(start, end, 9):
            if corners[0][0] <= x <= corners[-1][0]:
                at = np.interp(x, [c[0] for c in corners], [c[1] for c in corners])
                assert not y - 9 < at < y + 2, name
    assert names["distill"][2] - names["calibrate"][2] >= 12
