"""The index of runs: made from folders alone, cheap to bring up to date, tolerant of damage."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.run_folders import make_run, make_stage

from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.ledger.runs import RunEntry, get_run, list_runs, scan_runs
from mlx_distill.run_models import fold_name
from mlx_distill.running_costs import cost_report, record_runs
from mlx_distill.storage import open_partial


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    make_run(
        tmp_path / "runs" / "demo",
        metrics={"student": {"accuracy": {"value": 0.9, "low": None, "high": None, "n": 3}}},
        data={"rows": {"train": 8, "test": 2}},
    )
    make_run(tmp_path / "deeper" / "a" / "b" / "half")
    make_run(tmp_path / ".hidden" / "run")
    return Ledger(Root.at(tmp_path))


def same(entries: list[RunEntry]) -> list[RunEntry]:
    """Without the time at which the index took them in."""
    return [replace(entry, seen_at=0.0) for entry in entries]


def test_a_scan_finds_the_runs_under_the_root(ledger: Ledger) -> None:
    assert sorted(scan_runs(ledger).added) == ["deeper/a/b/half", "runs/demo"]
    demo, half = get_run(ledger, "runs/demo"), get_run(ledger, "deeper/a/b/half")
    assert demo is not None and half is not None
    assert (demo.recipe, demo.task, demo.state, demo.created_at) == ("tiny", "music", "finished", 1000.0)
    assert demo.facts["models"]["student"]["accuracy"]["value"] == 0.9
    assert demo.facts["rows"] == {"train": 8, "test": 2}
    assert demo.facts["stages"]["student"]["seconds"] == 7.5
    assert (half.state, half.task) == ("unfinished", None)


def test_dropping_the_rows_and_scanning_again_gives_the_same(ledger: Ledger) -> None:
    scan_runs(ledger)
    before = list_runs(ledger)
    with ledger.write() as db:
        db.execute("DELETE FROM runs")
    scan_runs(ledger)
    assert same(list_runs(ledger)) == same(before) and len(before) == 2


def test_a_scan_writes_nothing_where_nothing_has_changed(ledger: Ledger) -> None:
    scan_runs(ledger)
    before = list_runs(ledger)
    with ledger.write():  # a scan that wrote would wait for this transaction until it is an error
        scan = scan_runs(ledger)
    assert (scan.added, scan.changed, scan.removed, scan.total) == ([], [], [], 2)
    assert list_runs(ledger) == before


def test_a_scan_notices_what_was_made_and_removed(ledger: Ledger) -> None:
    scan_runs(ledger)
    root = ledger.root.path
    make_stage(root / "deeper/a/b/half", "quantized", started=3000.0)
    shutil.rmtree(root / "runs/demo")
    scan = scan_runs(ledger)
    assert (scan.added, scan.changed, scan.removed) == ([], ["deeper/a/b/half"], ["runs/demo"])
    half = get_run(ledger, "deeper/a/b/half")
    assert half is not None and "quantized" in half.facts["stages"]
    assert get_run(ledger, "runs/demo") is None


def test_a_run_that_has_just_begun_is_in_the_index(ledger: Ledger) -> None:
    open_partial(ledger.root.path / "new" / "data", "key")
    assert "new" in scan_runs(ledger).added
    new = get_run(ledger, "new")
    assert new is not None and new.state == "unfinished" and new.created_at > time.time() - 60


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"stage": 1}', b"\xff" * 40])
@pytest.mark.parametrize("name", ["student/manifest.json", "report.json"])
def test_a_damaged_run_is_named_and_the_others_are_indexed(ledger: Ledger, name: str, damage: bytes) -> None:
    (ledger.root.path / "runs/demo" / name).write_bytes(damage)
    assert scan_runs(ledger).total == 2
    demo, half = get_run(ledger, "runs/demo"), get_run(ledger, "deeper/a/b/half")
    assert demo is not None and half is not None and half.state == "unfinished"
    if name == "report.json" and damage == b'{"stage": 1}':  # an object, of which nothing is known
        assert (demo.state, demo.facts["models"]) == ("finished", {})
    else:
        assert demo.state == "damaged" and name in demo.facts["problem"]


def test_the_folds_of_a_cross_validation_are_told_from_runs(ledger: Ledger) -> None:
    folder = ledger.root.path / "runs/demo-validation"
    for name in (fold_name(1, 5), fold_name(2, 5), fold_name(1, 5, 0.25)):
        make_run(folder / name)
    scan = scan_runs(ledger)
    assert (scan.total, scan.folds) == (5, 3)
    assert {entry.path for entry in list_runs(ledger, folds=False)} == {"deeper/a/b/half", "runs/demo"}
    assert {entry.validation for entry in list_runs(ledger)} == {None, "runs/demo-validation"}
    assert len(list_runs(ledger, 4)) == 4
    record_runs(ledger)  # what they cost is that of the cross-validation
    assert cost_report(ledger).models["runs/demo-validation"].seconds == 3 * 15.0
