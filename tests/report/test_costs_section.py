"""The report's section of costs."""

from __future__ import annotations

from pathlib import Path

from helpers.report_runs import RECIPE, make_log, make_run, make_task

from mlx_distill.evaluate.costs import ErrorPrice, HardwarePrice, Prices, ReplacedSystem
from mlx_distill.report import build_report, render_html
from mlx_distill.storage import write_jsonl

PRICES = Prices(
    date="2026-11-27",
    currency="EUR",
    hardware=HardwarePrice(price=4000, watts=60, electricity=0.3),
    replaces=[ReplacedSystem("<i>API</i>", a_call=0.004), ReplacedSystem("a stone", a_call=0.0)],
    errors=ErrorPrice(false_positive=10),
    label_a_row=0.5,
)


def test_a_run_with_prices_says_what_its_models_cost(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task(), models=("teacher", "student_before", "quantized"))
    write_jsonl(tmp_path / "student" / "metrics.jsonl", make_log(10, ("label",), 0))
    report = build_report(tmp_path, RECIPE, make_task(), paths, prices=PRICES)
    costs = report["costs"]
    trained = {name: entry["total"] for name, entry in costs["stages"].items()}
    assert costs["models"]["quantized"]["fixed"] == sum(trained.values()) + costs["fixed"]["labelling"]
    assert costs["models"]["student_before"]["break_even"] == {}  # nobody trained it
    assert costs["models"]["quantized"]["break_even"]["a stone"] is None
    assert costs["pair"] == ["teacher", "quantized"]
    assert costs["errors"]["difference"]["n"] == report["metrics"]["teacher"]["n"]
    page = render_html(report)
    section = page.partition('id="costs"')[2].partition("</section>")[0]
    assert "&lt;i&gt;API&lt;/i&gt;" in section and "<i>API</i>" not in section
    assert "never (0 a call)" in section


def test_a_run_without_prices_has_no_such_section(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task(), models=("teacher", "quantized"))
    page = render_html(build_report(tmp_path, RECIPE, make_task(), paths))
    assert 'id="costs"' not in page
