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


ANSWERS, LABELS = ("--max-tokens", "3", "--no-constrain"), ("--labels-only",)


def command(out: str, options: tuple[str, ...]) -> list[str]:
    analyze = [sys.executable, "-m", "mlx_distill", "analyze", "model", "rows.jsonl"]
    return [*analyze, "--task", "task.yaml", *options, "--out", out]


def write_inputs(folder: Path, rows: int, options: tuple[str, ...]) -> None:
    """A small model, rows, and for answers a task without a label, whose distribution would take as long as
    they do.
    """
    write_small_model(folder / "model")
    task = {key: value for key, value in TASK.items() if key != "label" or options == LABELS}
    (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            row = {"id": f"r{number}", "text": f"{'a red heron crosses ' * (number % 3)}bridge {number}"}
            file.write("{broken\n" if number % 97 == 5 else json.dumps(row) + "\n")


def kill_behind(folder: Path, out: str, lines: int, delay: float, options: tuple[str, ...]) -> None:
    """Run the command, and kill it some time after its partial file has that many lines."""
    partial = folder / f".{out}.partial"
    process = subprocess.Popen(command(out, options), cwd=folder, stderr=subprocess.DEVNULL)
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
@pytest.mark.parametrize(("options", "rows", "kills"), [(ANSWERS, ROWS, KILLS), (LABELS, 1000, 1)])
def test_a_killed_analysis_is_continued_to_the_same_file(
    tmp_path: Path, options: tuple[str, ...], rows: int, kills: int
) -> None:
    write_inputs(tmp_path, rows, options)
    subprocess.run(command("whole.jsonl", options), cwd=tmp_path, check=False, capture_output=True)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["id"] for answer in answers] == [
        f"rows.jsonl:{number + 1}" if number % 97 == 5 else f"r{number}" for number in range(rows)
    ]
    assert ("probabilities" in answers[0]) == (options == LABELS)
    chance, kept = random.Random(0), []
    for number in range(kills):
        lines, delay = number * (rows - 200) // kills, chance.random() * 0.2 if options == ANSWERS else 0.0
        kill_behind(tmp_path, "out.jsonl", lines, delay, options)
        kept.append((tmp_path / ".out.jsonl.partial").read_bytes().count(b"\n"))
    assert kept == sorted(kept) and kept[0] > 0 and kept[-1] < rows
    assert kills == 1 or kept[0] < kept[-1]
    last = subprocess.run(command("out.jsonl", options), cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    before = int(last.stderr.split("answers, ")[-1].split(" of them from before")[0].replace(",", ""))
    assert kept[-1] - 128 <= before <= kept[-1]
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".out.jsonl.json", ".whole.jsonl.json"]
