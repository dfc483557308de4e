"""A job whose process is killed at random moments tells the truth, and ends as if it had not been."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers.chat_run import write_recipe

from mlx_distill import pipeline
from mlx_distill.jobs import dispatch, events, get, resume, submit
from mlx_distill.ledger.database import Ledger
from mlx_distill.progress import NullProgress
from mlx_distill.storage import read_manifest

KILLS = 5
STEPS = 12


def content(run: Path) -> dict[str, str]:
    """The hashes of the run's data and model, without times."""
    manifests = {name: read_manifest(run / name) for name in ("data", "teacher_base", "teacher")}
    return {name: manifest.content for name, manifest in manifests.items() if manifest is not None}


@pytest.mark.slow
def test_killed_jobs_are_told_as_such_and_end_bit_equal(ledger: Ledger) -> None:
    root = ledger.root.path
    recipe = write_recipe(root, steps=STEPS, evaluate_every=3)
    pipeline.run(recipe, root / "whole", only=None, progress=NullProgress())
    whole = content(root / "whole")
    assert len(whole) == 3

    job = submit(ledger, "run", ["recipe.yaml", "--out", "runs/killed"], run_path="runs/killed")
    moments = random.Random(7)
    kills = 0
    for attempt in range(40):
        dispatch(ledger)
        job = get(ledger, job.id)
        assert job.state == "running" and job.pid is not None and job.attempt == attempt + 1
        until = time.monotonic() + moments.uniform(0.0, 5.0) if kills < KILLS else float("inf")
        while time.monotonic() < until and get(ledger, job.id).state == "running":
            time.sleep(0.02)
            if kills == KILLS:
                dispatch(ledger)
        if get(ledger, job.id).state != "running":
            break
        os.kill(job.pid, signal.SIGKILL)
        kills += 1
        while get(ledger, job.id).state == "running":
            dispatch(ledger)
            time.sleep(0.02)
        told = get(ledger, job.id)
        assert (told.state, told.error["code"] if told.error else None) == ("failed", "orphaned")
        resume(ledger, job.id)

    done = get(ledger, job.id)
    assert done.state == "succeeded" and kills == KILLS
    assert content(root / "runs/killed") == whole
    types = [event.type for event in events(ledger, job.id)]
    assert types.count("failed") == KILLS and types.count("succeeded") == 1
    with ledger.read() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert db.execute("SELECT count(*) FROM leases").fetchone()[0] == 0
