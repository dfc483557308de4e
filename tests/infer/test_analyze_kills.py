"""An analysis that is killed again and again, and continued by the same command each time, has the answers of
an undisturbed one. ``ANALYZE_KILLS=20`` kills it twenty times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.small_model import write_small_model
from helpers.small_run import TASK

ROWS = 2000
KILLS = int(os.environ.get("ANALYZE_KILLS", "5"))


def command(out: str) -> list[str]:
    options = ["--task", "task.yaml", "--max-tokens", "3", "--no-constrain", "--out", out]
    return [sys.executable, "-m", "mlx_distill", "analyze", "model", "rows.jsonl", *options]


def write_inputs(folder: Path) -> None:
    """A small model, rows, and a task without a label, whose distribution would take as long as answers."""
    write_small_model(folder / "model")
    task = {key: value for key, value in TASK.items() if key != "label"}
    (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(ROWS):
            row = {"id": f"r{number}", "text": f"{'a red heron crosses ' * (number % 3)}bridge {number}"}
            file.write("{broken\n" if number % 97 == 5 else json.dumps(row) + "\n")


def kill_behind(folder: Path, out: str, lines: int, delay: float) -> None:
    """Run the command, and kill it some time after its partial file has that many lines."""
    partial = folder / f".{out}.partial"
    process = subprocess.Popen(command(out), cwd=folder, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if partial.is_file() and partial.read_bytes().count(b"\n") > lines:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.01)
    assert process.wait(60) == -signal.SIGKILL
    assert not (folder / out).exists()


@pytest.mark.slow
def test_a_killed_analysis_is_continued_to_the_same_file(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    subprocess.run(command("whole.jsonl"), cwd=tmp_path, check=False, capture_output=True)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["id"] for answer in answers] == [
        f"rows.jsonl:{number + 1}" if number % 97 == 5 else f"r{number}" for number in range(ROWS)
    ]
    chance, kept = random.Random(0), []
    for number in range(KILLS):
        kill_behind(tmp_path, "out.jsonl", number * (ROWS - 200) // KILLS, chance.random() * 0.2)
        kept.append((tmp_path / ".out.jsonl.partial").read_bytes().count(b"\n"))
    assert kept == sorted(kept) and 0 < kept[0] < kept[-1] < ROWS
    last = subprocess.run(command("out.jsonl"), cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    before = int(last.stderr.split("answers, ")[-1].split(" of them from before")[0].replace(",", ""))
    assert kept[-1] - 128 <= before <= kept[-1]
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".out.jsonl.json", ".whole.jsonl.json"]
