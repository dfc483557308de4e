"""What runs and served calls have cost: recorded once, never rewritten, without invented money."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import report_runs
from helpers.run_folders import make_run, make_stage

from mlx_distill.cli import cli
from mlx_distill.evaluate.costs import HardwarePrice, Prices, ReplacedSystem, break_even, call_cost
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.report import build_report
from mlx_distill.running_costs import ServedCalls, cost_report, record_runs, record_served, record_training
from mlx_distill.storage import link_stage, write_json, write_jsonl

_HARDWARE = HardwarePrice(price=3500.0, watts=60.0, electricity=0.35)
_PRICES = Prices(
    date="2026-11-27",
    currency="EUR",
    hardware=_HARDWARE,
    replaces=[ReplacedSystem(name="an API", input=2.5, output=10.0)],
    label_a_row=0.05,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    make_run(tmp_path / "runs/demo", data={"rows": {"train": 8, "test": 2}})
    ledger = Ledger(Root.at(tmp_path))
    with ledger.write() as db:
        db.execute("INSERT INTO models (name, created_at) VALUES ('music', 0.0)")
        db.execute(
            "INSERT INTO versions (model, number, sha, path, source_run, state, created_at) "
            "VALUES ('music', 3, 'x', 'kept', 'runs/demo', 'READY', 0.0)"
        )
    return ledger


def rows(ledger: Ledger) -> list[dict[str, Any]]:
    with ledger.read() as db:
        return [dict(row) for row in db.execute("SELECT * FROM costs ORDER BY id")]


def test_the_work_of_a_run_is_recorded_once(ledger: Ledger) -> None:
    assert record_training(ledger, "runs/demo") == 2
    assert record_training(ledger, ledger.root.path / "runs/demo") == 0
    assert [(row["kind"], row["quantity"], row["unit"], row["run"]) for row in rows(ledger)] == [
        ("preparation", 7.5, "second", "runs/demo"),
        ("training", 7.5, "second", "runs/demo"),
    ]
    # Made again, it costs again; linked to another run, it does not.
    make_stage(ledger.root.path / "runs/demo", "student", started=3000.0)
    link_stage(ledger.root.path / "runs/demo/data", ledger.root.path / "runs/other/data")
    assert record_runs(ledger) == 1
    assert cost_report(ledger).total.seconds == 22.5


def test_the_seconds_of_a_training_are_those_of_all_its_parts(ledger: Ledger) -> None:
    log = [{"step": 1, "seconds": 60.0, "tokens": 50}, {"step": 2, "seconds": 100.0, "tokens": 40}]
    write_jsonl(ledger.root.path / "runs/demo/student/metrics.jsonl", log)
    record_training(ledger, "runs/demo")
    training = cost_report(ledger).kinds["training"]
    assert (training.seconds, training.tokens) == (100.0, 90)


def test_without_prices_there_is_no_money(ledger: Ledger) -> None:
    record_runs(ledger)
    record_served(ledger, "music:3", ServedCalls(calls=4, seconds=2.0, prompt_tokens=400, tokens=80))
    report = cost_report(ledger)
    assert report.total.money == {} and report.total.unpriced_seconds == 17.0 and report.paid_back == {}
    assert all(row["unit_price"] is None for row in rows(ledger))
    assert "EUR" not in "\n".join(report.lines())


def test_sums_by_kind_month_and_model(ledger: Ledger) -> None:
    record_runs(ledger)
    record_served(ledger, "music:3", ServedCalls(calls=4, seconds=2.0, tokens=80))
    record_served(ledger, "music:3", ServedCalls(calls=6, seconds=3.0, tokens=20, measured=False))
    record_served(ledger, "runs/demo:student", ServedCalls(calls=1, seconds=1.0))
    record_served(ledger, "asset:models/tiny-qwen3", ServedCalls(calls=1, seconds=0.5))
    record_served(ledger, "music:3", ServedCalls(calls=0, seconds=0.0))  # nothing was served
    report = cost_report(ledger)
    assert (report.kinds["served"].calls, report.kinds["served"].tokens) == (12, 100)
    assert report.kinds["served"].estimated_seconds == 3.0
    assert {name: one.seconds for name, one in report.models.items()} == {
        "music": 21.0,
        "asset:models/tiny-qwen3": 0.5,
    }
    assert sum(one.seconds for one in report.months.values()) == report.total.seconds == 21.5
    assert [row["run"] for row in rows(ledger)][2:] == ["runs/demo", "runs/demo", "runs/demo", None]


def test_break_even_is_that_of_the_evaluation(ledger: Ledger) -> None:
    record_runs(ledger)
    served = ServedCalls(calls=10, seconds=5.0, prompt_tokens=5000, tokens=1000)
    record_served(ledger, "music:3", served)
    report = cost_report(ledger, _PRICES)
    entry = report.paid_back["music"]
    once = call_cost(15.0, _HARDWARE)["total"] + 10 * 0.05
    a_call, replaced = call_cost(0.5, _HARDWARE)["total"], (500 * 2.5 + 100 * 10.0) / 1e6
    assert entry["once"] == pytest.approx(once) and entry["a_call"] == pytest.approx(a_call)
    assert entry["break_even"]["an API"] == pytest.approx(break_even(once, a_call, replaced))
    assert report.total.money == {"EUR": pytest.approx(call_cost(20.0, _HARDWARE)["total"])}


def test_a_recorded_price_stays_when_prices_change(ledger: Ledger) -> None:
    record_served(ledger, "music:3", ServedCalls(calls=1, seconds=10.0), prices=_PRICES)
    later = Prices(
        date="2027-11-27", currency="USD", hardware=HardwarePrice(price=1.0, watts=1.0, electricity=9.0)
    )
    assert cost_report(ledger, later).total.money == {
        "EUR": pytest.approx(call_cost(10.0, _HARDWARE)["total"])
    }


def test_the_command_records_and_shows(ledger: Ledger, tmp_path: Path, runner: Any) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "date: 2026-11-27\ncurrency: EUR\nhardware: {price: 3500, watts: 60, electricity: 0.35}\n"
    )
    root = ["--root", str(tmp_path)]
    result = runner.invoke(cli, ["costs", *root, "--prices", str(prices), "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["kinds"]["training"]["seconds"] == 7.5 and shown["total"]["money"]["EUR"] > 0
    text = runner.invoke(cli, ["costs", *root]).stdout
    assert "by model" in text and "no prices" in text and len(rows(ledger)) == 2


def test_an_empty_root_says_what_to_do_first(tmp_path: Path, runner: Any) -> None:
    result = runner.invoke(cli, ["costs", "--root", str(tmp_path)])
    assert result.exit_code == 0 and "start with: mlx-distill run" in result.stdout


def test_backup_check_and_restore(ledger: Ledger, tmp_path: Path, runner: Any) -> None:
    root, copy = ["--root", str(tmp_path)], str(tmp_path / "copy.db")
    assert runner.invoke(cli, ["ledger", "backup", copy, *root]).stdout.startswith("written: ")
    record_runs(ledger)
    assert "1 run under" in runner.invoke(cli, ["ledger", "check", *root]).stdout
    restored = runner.invoke(cli, ["ledger", "restore", copy, *root])
    assert restored.exit_code == 0 and "what was there" in restored.stdout
    assert rows(ledger) == []


def test_one_run_is_paid_back_at_the_call_that_its_report_names(tmp_path: Path) -> None:
    run, task = tmp_path / "runs/demo", report_runs.make_task()
    paths = report_runs.make_run(run, task, models=("teacher", "student", "quantized"))
    names = ("data", "teacher_base", "teacher", "targets", "student_base", "student", "quantized")
    for seconds, stage in enumerate((*names, "student_labels"), 3):
        shutil.rmtree(run / stage, ignore_errors=True)
        make_stage(run, stage, seconds=float(seconds))
    write_json(run / "data/statistics.json", {"rows": {"train": 8, "test": 2}})
    log = [{"step": 1, "seconds": 60.0, "tokens": 50}]  # an interrupted training: more than its last part
    write_jsonl(run / "student/metrics.jsonl", log)
    report = build_report(run, report_runs.RECIPE, task, paths, prices=_PRICES)
    write_json(run / "report.json", report)
    told = report["costs"]["models"]["quantized"]
    assert report["costs"]["stages"].keys() == set(names)  # without the control
    once = sum(range(3, 10)) - 8 + 60
    assert told["fixed"] == pytest.approx(call_cost(once, _HARDWARE)["total"] + 10 * 0.05)

    ledger = Ledger(Root.at(tmp_path))
    record_runs(ledger)
    record_served(ledger, "runs/demo:quantized", ServedCalls(calls=7, seconds=7 * told["call"]["seconds"]))
    entry = cost_report(ledger, _PRICES).paid_back["runs/demo"]
    assert entry["once"] == pytest.approx(told["fixed"], rel=1e-12)
    assert entry["a_call"] == pytest.approx(told["call"]["total"], rel=1e-12)
