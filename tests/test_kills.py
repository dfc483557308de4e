"""A run that is killed in the middle of every stage, and continued by the same command each time, has the
result of an undisturbed run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import killed_run
from helpers.small_chain import STAGES, finished, manifests, whole_stages, write_chain

pytestmark = pytest.mark.slow

# In the order of the run: the stage that is killed, and the path that is about to be renamed into place then.
KILLS = {
    "data": r"\.data\.partial/valid\.jsonl$",
    "teacher_base": r"\.teacher_base\.partial/config\.json$",
    "student_base": r"\.student_base\.partial/model-\d+-of-\d+\.safetensors$",
    "teacher": r"\.teacher\.partial/scratch/checkpoints/step-0*4$",
    "targets": r"\.targets\.partial/tokens-00001\.safetensors$",
    "student": r"out/\.student\.partial/scratch/checkpoints/step-0*4$",
    "quantized": r"\.quantized\.partial/config\.json$",
    "evaluations/teacher": r"evaluations/\.teacher\.partial/scratch/predictions-0*16\.jsonl$",
    "evaluations/student": r"evaluations/student$",
    "report": r"report\.html$",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A run that was killed once in every stage, and the stages that were visible after each kill."""
    folder = tmp_path_factory.mktemp("killed")
    recipe, out = write_chain(folder), folder / "out"
    seen, written = {}, {}
    for name, pattern in [*KILLS.items(), ("end", "")]:
        command = [sys.executable, killed_run.__file__, str(recipe), str(out), pattern]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == (-signal.SIGKILL if pattern else 0), f"{name}: {done.stderr[-3000:]}"
        seen[name] = whole_stages(out)
        for stage in seen[name]:  # a finished stage is not made again
            time = (out / stage / "manifest.json").stat().st_mtime_ns
            assert written.setdefault(stage, time) == time
    return out, seen


def predictions(folder: Path) -> list[dict[str, Any]]:
    rows = [
        json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{key: value for key, value in row.items() if key != "latency_s"} for row in rows]


def test_a_killed_stage_is_not_visible_and_those_before_it_are(
    killed: tuple[Path, dict[str, list[str]]],
) -> None:
    _, seen = killed
    order = [*STAGES, "report", "end"]
    for name, visible in seen.items():
        assert visible == sorted(STAGES[: order.index(name)]), name


def test_the_result_equals_that_of_an_undisturbed_run(killed: tuple[Path, dict[str, list[str]]]) -> None:
    resumed, undisturbed = manifests(killed[0]), manifests(finished() / "out")
    assert list(resumed) == list(undisturbed) == list(STAGES)
    for name in STAGES:
        assert resumed[name].key == undisturbed[name].key, name
        if name.startswith("evaluations/"):
            assert predictions(killed[0] / name) == predictions(finished() / "out" / name)
        else:
            assert resumed[name].content == undisturbed[name].content, name


def test_trainings_resumed_from_the_checkpoint_before_the_kill(
    killed: tuple[Path, dict[str, list[str]]],
) -> None:
    for out, resumed in ((killed[0], 2), (finished() / "out", 0)):
        recorded = [manifests(out)[name].recorded for name in ("teacher", "student")]
        assert [facts["resumed"] for facts in recorded] == [resumed, resumed]


def test_no_temporary_files_are_left(killed: tuple[Path, dict[str, list[str]]]) -> None:
    out, _ = killed
    assert [p.relative_to(out).as_posix() for p in out.rglob(".*")] == [".lock"]
    same = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert same == {
        p.relative_to(finished() / "out").as_posix() for p in (finished() / "out").rglob("*") if p.is_file()
    }
    assert "</html>" in (out / "report.html").read_text(encoding="utf-8")
