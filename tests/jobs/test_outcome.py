"""What a job leaves in the ledger when it has succeeded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.registry_runs import make_run

from mlx_distill.jobs import events, get, submit
from mlx_distill.jobs.outcome import keep_result
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import parse_version, promote
from mlx_distill.registry.comparisons import read_comparison


@pytest.mark.slow
def test_a_runs_version_is_compared_with_what_serves(tmp_path: Path) -> None:
    run = tmp_path / "runs/music"
    make_run(run, seed=1, n=60)
    ledger = Ledger(Root.at(tmp_path))
    job = get(ledger, submit(ledger, "run", ["recipe.yaml"]).id)
    job = replace(job, run_path="runs/music")
    first = keep_result(ledger, job)
    assert first.keys() == {"path", "version"}  # nothing serves
    served = parse_version(ledger, first["version"])
    promote(ledger, served.model, served.number, actor="ann", reason="a try", override="a test")
    shutil.rmtree(run)
    make_run(run, seed=2, n=60, wrong=range(30))
    second = keep_result(ledger, job)
    kept = read_comparison(ledger, second["comparison"])
    assert (kept.a["name"], kept.b["name"]) == (first["version"], second["version"])
    assert kept.facts["verdict"] == "worse"
    warned = [event.message for event in events(ledger, job.id) if event.level == "warn"]
    assert not [message for message in warned if "comparison" in message]
