"""What the evaluate stage measures besides the answers, on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import assert_loads_nothing
from helpers.small_chain import make_context

from mlx_distill.data.evaluation_files import LABEL_ORDERS, REPEATS, VALID_LABELS, read_lines
from mlx_distill.data.predictions import read_predictions
from mlx_distill.errors import ConfigError
from mlx_distill.report import build_report, render_html
from mlx_distill.stages.evaluate import evaluate
from mlx_distill.stages.evaluate_more import check_extra
from mlx_distill.storage import scratch

_SETTINGS = (
    "evaluate.repeats=2",
    "evaluate.repeat_rows=6",
    "evaluate.repeat_temperature=3",
    "evaluate.shuffle_options=2",
    "evaluate.constrain=false",
    "evaluate.max_rows=8",
    "evaluate.batch_size=2",
)


def with_list(task: Any) -> Any:
    return replace(task, system="Say whether the text names a colour: {colour:options}. Answer in JSON.")


@pytest.mark.slow
def test_repeats_label_orders_and_validation_labels_are_kept_and_reported(
    run_copy: Path, folder: Path
) -> None:
    context = make_context(*_SETTINGS, run=run_copy)
    context = replace(context, task=with_list(context.task))
    for split in ("valid", "test"):  # the rows as prepare would have written them for this task
        path = run_copy / "data" / f"{split}.jsonl"
        system = "Say whether the text names a colour. Answer in JSON."
        assert system in path.read_text()
        path.write_text(path.read_text().replace(system, with_list(context.task).prompt({"text": "x"})[0]))
    evaluate(context, folder, "teacher", "teacher")

    _, valid = read_lines(folder / VALID_LABELS) or ({}, [])
    assert valid and all(sum(line["label_probs"].values()) == pytest.approx(1, abs=1e-4) for line in valid)
    header, repeats = read_lines(folder / REPEATS) or ({}, [])
    assert header["temperatures"] == {"shuffled": 0.0, "sampled": 3.0} and len(repeats) == 2 * 2 * 6
    _, rows = read_predictions(folder)
    greedy = {row["id"]: row["text"] for row in rows}
    assert {line["id"] for line in repeats} < greedy.keys()
    shuffled = [line for line in repeats if line["kind"] == "shuffled"]
    assert all(line["text"] == greedy[line["id"]] for line in shuffled)
    by_run = [[line["id"] for line in shuffled if line["run"] == run] for run in (1, 2)]
    assert sorted(by_run[0]) == sorted(by_run[1]) and by_run[0] != by_run[1]
    assert any(line["text"] != greedy[line["id"]] for line in repeats if line["kind"] == "sampled")
    header, orders = read_lines(folder / LABEL_ORDERS) or ({}, [])
    assert header["orders"] == [["no", "yes"], ["yes", "no"]] or header["orders"][0] != header["orders"][1]
    assert len(orders) == len(rows) and all(len(line["labels"]) == 2 for line in orders)

    report = build_report(run_copy, {"name": "x"}, context.task, {"teacher": folder})
    figures = report["metrics"]["teacher"]
    assert figures["repeats"]["shuffled"]["flip_rate"]["n"] == 6
    assert figures["label_orders"]["flip_rate"]["n"] == len(rows)
    assert figures["calibration"]["reliability"]["bins"] and figures["calibration"]["risk_coverage"]
    page = assert_loads_nothing(render_html(report))
    for words in ("Repeated answers", "Auto-decidable", "Reliability", "order of the labels"):
        assert words in page.text


@pytest.mark.slow
def test_repeats_continue_behind_the_last_finished_part(run_copy: Path, folder: Path) -> None:
    settings = [
        s
        for s in _SETTINGS
        if s.split("=")[0][9:] not in ("shuffle_options", "repeat_rows", "repeat_temperature")
    ]
    context = make_context(*settings, "evaluate.repeat_temperature=0", run=run_copy)
    evaluate(context, folder, "teacher", "teacher")
    before = read_lines(folder / REPEATS)
    parts = sorted(scratch(folder).glob("repeats-*.jsonl"))
    assert len(parts) == 2
    parts[1].unlink()
    written = parts[0].stat().st_mtime_ns
    evaluate(context, folder, "teacher", "teacher")
    assert read_lines(folder / REPEATS) == before and parts[0].stat().st_mtime_ns == written


def test_one_run_and_a_prompt_without_the_list_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.repeats: 1"):
        check_extra(make_context("evaluate.repeats=1"))
    with pytest.raises(ConfigError, match="no place for the list of labels"):
        check_extra(make_context("evaluate.shuffle_options=2"))
