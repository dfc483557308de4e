"""The page: its text, and that it is complete and loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import Page, assert_loads_nothing, page_text
from helpers.report_runs import (
    RECIPE,
    make_predictions,
    make_run,
    make_task,
)

from mlx_distill.report import RunReport, build_report, render_html
from mlx_distill.report.charts import nice_ticks
from mlx_distill.report.provenance import SPEED
from mlx_distill.storage import write_jsonl


def test_page_is_complete_and_loads_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    page = assert_loads_nothing(render_html(report))
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert "No export of this run's models was checked" in page.text
    assert {a["href"] for t, a in page.tags if t == "a"} == {f"#{name}" for name in ids}
    assert {
        "artifact",
        "attribution",
        "comparison",
        "results",
        "errors",
        "groups",
        "confusion",
        "fields",
        "slices",
        "distributions",
        "calibration",
        "sets",
        "training",
        "disagreements",
        "cost",
        "origin",
    } == set(ids)


def test_page_states_the_result_in_one_sentence(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    agreement = report["metrics"]["quantized"]["verdict_agreement"]
    share = f"{100 * agreement['value']:.1f} %"
    text = Page(render_html(report)).text.replace("\u202f", " ")
    assert f"The quantized student gives the teacher’s tone on {share} of 60 held-out rows [" in text
    assert "Nothing on this page was measured on Metal." in text


def test_the_section_on_speed_says_where_and_how_it_was_measured(
    run: tuple[Path, dict[str, Any]],
) -> None:
    page = Page(render_html(run[1]))
    text = page.text.replace("\u202f", " ")
    assert "Measured on A processor, Linux 6, MLX 0.32.4 on the CPU." in text
    assert "rows over the wall time of whole chunks, 16 rows decoded together" in text
    for title, value in {
        "Loading": "1.25 s",
        "Memory after loading": "64.0 MB",
        "First token": "42 ms",
        "Requests per second": "7,319",
    }.items():
        assert title in text and value in text
    unmeasured = {name: figures | dict.fromkeys(SPEED) for name, figures in run[1]["metrics"].items()}
    text = page_text({**run[1], "metrics": unmeasured})
    assert "7,319" not in text and "64.0 MB" not in text


@pytest.mark.slow
def test_speed_is_compared_only_between_models_with_the_same_kind_of_weights(
    run: tuple[Path, dict[str, Any]], mixed: dict[str, Any]
) -> None:
    text = page_text(run[1])
    assert re.search(r"It answers [\d,.]+ rows per minute, [\d.]+ times the teacher’s speed\.", text)
    assert "do not compare" not in text
    assert "weights dequantized" not in text
    assert {name: entry["dequantize"] for name, entry in mixed["provenance"]["evaluations"].items()} == {
        "teacher": True,
        "student_before": True,
        "student": True,
        "quantized": False,
    }
    text = page_text(mixed)
    assert re.search(r"It answers [\d,.]+ rows per minute\.", text)
    assert "times the teacher’s speed" not in text
    assert (
        "The quantized student computed with quantized weights, all others with dequantized ones: times,"
        in text
    )
    assert (text.count("weights dequantized"), text.count("weights quantized")) == (6, 2)  # two tables


def test_settings_that_hold_for_all_models_are_listed_once(mixed: dict[str, Any]) -> None:
    settings = page_text(mixed).split("Settings of the evaluations")[1].split("Recipe")[0].replace(" ", "")
    assert settings.startswith("Allmodelsbatchsize16computedtypefloat32Teacherquantizedweightsdequantized")
    assert settings.count("batchsize") == 1
    assert settings.endswith("Quantizedquantizedweightsasondisk")


def test_the_size_of_an_adapter_includes_its_base(run: tuple[Path, dict[str, Any]]) -> None:
    assert "Its weights take 150 kB on disk, 22 % of the teacher’s 670 kB (base and adapter)." in page_text(
        run[1]
    )


@pytest.mark.slow
def test_a_difference_that_does_not_match_the_rounded_rates_is_explained(tmp_path: Path) -> None:
    """308 and 319 of 320 are shown as 96.2 and 99.7 %, but differ by 3.4 points."""
    task = make_task()
    for wrong, explained in (
        ({"teacher": 12, "quantized": 1}, True),
        ({"teacher": 32, "quantized": 16}, False),
    ):
        paths = {}
        for name, count in wrong.items():
            header, *rows = make_predictions(task, "teacher", {"test": 320})
            labels = ["light" if row["truth"]["tone"] != "light" else "mild" for row in rows]
            for i, row in enumerate(rows):
                row["label"] = labels[i] if i < count else row["truth"]["tone"]
                row |= {"answer": {**row["truth"], "tone": row["label"]}}
            paths[name] = tmp_path / f"{name}.jsonl"
            write_jsonl(paths[name], [header, *rows])
        report = build_report(tmp_path, RECIPE, task, paths)
        text = page_text(report)
        assert ("+3.4 points" in text) == explained
        assert ("(computed from the exact rates)" in text) == explained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "sentence"),
    [(60, "Too few rows in every group to"), (130, "Too few rows in all groups except north to")],
)
def test_groups_of_few_rows_are_flagged_and_their_intervals_fit_the_axis(
    tmp_path: Path, n: int, sentence: str
) -> None:
    report = build_report(tmp_path, RECIPE, make_task(), make_run(tmp_path, make_task(), sets={"test": n}))
    html = render_html(report)
    assert sentence in Page(html).text
    section = html.split('id="groups"')[1].split("</section>")[0].split("False negatives")[0]
    assert section.count("Too few rows") == 1
    ends = [float(x) for x in re.findall(r'x2="([\d.]+)%" y1="\d+" y2="\d+" class="range"', section)]
    rates = [
        group["false_positive_rate"]
        for model in ("teacher", "student", "quantized")
        for group in report["metrics"][model]["by_group"]["groups"].values()
    ]
    top = max(rate["high"] for rate in rates if rate["n"])
    assert max(ends) == pytest.approx(100 * top / min(1.0, nice_ticks(0.0, top)[-1]), abs=0.01)


def test_disagreements_are_counted_by_set(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    main, other = (report["by_set"][name]["quantized"]["disagreements"] for name in ("test", "written"))
    sentence = (
        f"Quantized: {main} of 60 held-out rows ({100 * main / 60:.1f} %); "
        f"{other} of 15 rows of the set “written” ("
    )
    assert sentence.replace("(0.0 %)", "(0 %)") in page_text(report)


@pytest.mark.slow
def test_rows_without_a_title_are_named_by_the_start_of_their_input(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task())
    for name, path in paths.items():
        header, *rows = make_predictions(make_task(), name, {"test": 60})
        write_jsonl(path, [header, *({**row, "title": None} for row in rows)])
    report = build_report(tmp_path, RECIPE, make_task(), paths)
    row = report["disagreements"]["quantized"]["rows"][0]
    text = page_text(report)
    assert f"The answers to {' '.join(row['input'].split())}, field by field" in text
    assert f"The answers to {row['id']}" not in text


@pytest.mark.slow
def test_report_json_read_back_gives_the_same_page(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert render_html(json.loads(json.dumps(report))) == render_html(report)


def test_tables_and_charts_are_accessible(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    page = Page(render_html(report))
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")
    assert [t for t, _ in page.tags].count("table") == [t for t, _ in page.tags].count("caption")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
    assert dict(page.tags)["html"] == {"lang": "en"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"positive": [], "group": None},
        {"score": None, "slices": []},
        {"title": None, "group": None},
    ],
)
def test_optional_fields_of_a_task(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = make_task(**changes)
    report = build_report(tmp_path, RECIPE, task, make_run(tmp_path, task, sets={"test": 12}))
    page = assert_loads_nothing(render_html(report))
    assert ("Precision, recall, error rates" in page.text) == bool(task.positive)
    assert ("points within 5" in page.text) == bool(task.score)


def test_a_page_of_one_row(tmp_path: Path) -> None:
    """One model, no truth, no teacher, no training, no weights: what was not measured is None, not zero."""
    row = {
        "id": "a",
        "set": "odd",
        "fields": {},
        "truth": None,
        "answer": None,
        "label": None,
        "score": None,
        "text": "?",
        "error": "x",
        **dict.fromkeys(("title", "input", "label_probs", "latency_s", "prompt_tokens", "tokens")),
    }
    write_jsonl(tmp_path / "predictions.jsonl", [{"format": 1, "set_counts": {"odd": 1}}, row])
    report = build_report(tmp_path, {}, make_task(), {"student": tmp_path})
    figures = report["metrics"]["student"]
    assert report["main_set"] == "odd"
    assert figures["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}
    assert figures["json_valid"]["value"] == 0.0
    for key in ("latency_s", "score_mae", "peak_memory_gb", "verdict_agreement"):
        assert figures[key] is None
    assert_loads_nothing(render_html(report))
    assert "–" in str(RunReport(tmp_path / "report.json", report))
