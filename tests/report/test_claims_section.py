"""The sections of invalid claims and of edge cases."""

from __future__ import annotations

from pathlib import Path

from helpers.report_runs import make_run, make_task

from mlx_distill.evaluate.edge_cases import edge_case_metrics
from mlx_distill.report import build_report, render_html


def test_invalid_claims_and_failed_edge_cases_are_shown_as_text(tmp_path: Path) -> None:
    references = {"themes": [{"kind": "vocabulary", "list": ["grief"]}, {"kind": "support"}]}
    task = make_task(references=references)
    report = build_report(tmp_path, {"name": "run"}, task, make_run(tmp_path, task, sets={"test": 12}))
    student = report["metrics"]["student"]
    field = student["references"]["themes"]
    assert field["invalid"] > 0 and field["per_claim"] == student["hallucination_rate"]
    assert field["support"]["supported"]["n"] == field["claims"]
    outcome = {"id": "e1", "kind": "empty", "title": "<script>x</script>", "why": "", "did": "answer"}
    outcomes = [{**outcome, "behaved": False, "reason": "an <b>answer</b>"}, {**outcome, "behaved": True}]
    student["edge_cases"] = edge_case_metrics(outcomes)
    page = render_html(report)
    claims = page.split('id="references"')[1].split("</section>")[0]
    assert "<b>hope</b> (not in the list)" in claims
    assert f"{field['invalid']} of {field['invalid'] + field['valid']}" in claims
    assert "what stands in the row" in claims
    cases = page.split('id="edge-cases"')[1].split("</section>")[0]
    assert "1 of 2 cases not handled as expected" in cases
    assert "&lt;script&gt;x&lt;/script&gt;" in cases and "an &lt;b&gt;answer&lt;/b&gt;" in cases
    assert "<script" not in page
