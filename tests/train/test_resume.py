"""A run that was stopped or killed anywhere and resumed equals an uninterrupted one bitwise, and so do two
runs with the same seed.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.training_cases import CASES, KILLED, hit_after, name_of, run_case, same, steps_of

from mlx_distill.errors import Interrupted
from mlx_distill.runtime import StopFlag
from mlx_distill.train import TrainResult

RUNNER = Path(__file__).parents[1] / "helpers" / "training_process.py"


class Killed(BaseException):
    """Raised in place of a kill; nothing catches it."""


def outcome(result: TrainResult) -> TrainResult:
    """The part of a result that is the same in two equal runs."""
    kept = {
        k: v
        for k, v in result.metrics.items()
        if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")
    }
    return replace(result, metrics=kept, best=None, seconds=0.0, resumed=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_interrupted_run_resumes_bitwise(tmp_path: Path, case: dict[str, Any]) -> None:
    """Stopped after step 5, interrupted twice in any part of any step, and once more without interruption."""
    with hit_after(0, None) as parts:
        whole, result = run_case(tmp_path / "whole", case)
    assert result.stopped_early == ("patience" in case) and result.steps > 5
    for name in ("again", "stopped", "killed"):
        folder = tmp_path / name
        if name == "stopped":
            flag = StopFlag()
            with pytest.raises(Interrupted, match="step 5 of"):
                run_case(
                    folder,
                    case,
                    stop=flag,
                    hooks=[lambda row, flag=flag: setattr(flag, "set", row["step"] == 5)],
                )
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"step": 6, "lo')  # a kill in the middle of a line
        if name == "killed":
            for part in (random.randrange(1, parts[0] // 2), random.randrange(1, parts[0] // 2)):
                with hit_after(part, kill), pytest.raises(Killed):
                    run_case(folder, case)
        weights, found = run_case(folder, case)
        assert same(weights, whole), name
        assert steps_of(folder) == steps_of(tmp_path / "whole") and outcome(found) == outcome(result), name
        assert found.resumed == {"again": 0, "stopped": 5}.get(name, found.resumed)
    assert not same(run_case(tmp_path / "other", {**case, "seed": 1})[0], whole)


def kill() -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "cases"), [("kill", -9, KILLED), ("interrupt", 130, KILLED[:1])])
def test_a_killed_process_resumes_bitwise(
    tmp_path: Path, how: str, code: int, cases: list[dict[str, Any]]
) -> None:
    """kill -9 (or Ctrl-C) of a real process, at a random place of each case's run."""
    seed = str(random.randrange(10**6))
    places = [str(CASES.index(case)) for case in cases]
    for attempt in range(len(cases) + 1):
        command = [sys.executable, RUNNER, tmp_path / "cut", how, seed, str(attempt), *places]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == (code if attempt < len(cases) else 0), (
            f"seed {seed}, attempt {attempt}: {done.stderr}"
        )
    for case, place in zip(cases, places, strict=True):
        weights, _ = run_case(tmp_path / "whole" / place, case)
        assert steps_of(tmp_path / "cut" / place) == steps_of(tmp_path / "whole" / place), (
            f"seed {seed}, {name_of(case)}"
        )
        assert same(weights, read(tmp_path / "cut" / place)), f"seed {seed}, {name_of(case)}"


def read(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    return dict(mx.load(str(folder / "final-0.safetensors")))
