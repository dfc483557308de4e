"""Memory and speed of ``analyze`` over 1,000 to 100,000 rows.

    python benchmarks/analyze_bench.py                  # about 10 minutes on two cores
    python benchmarks/analyze_bench.py --rows 1000 5000

Rows are generated songs of 5 to 40 words, one in a hundred of them broken; the model is a random one of one
narrow layer with the packaged tiny tokenizer, so that time and memory are those of what is around the model.
Each analysis is a process of its own, the command ``mlx-distill analyze ROWS --out FILE``; memory is the
kernel's peak resident memory of that process, imports and all.

    answers    two tokens an answer, no distribution over labels
    labels     --labels-only
    list       md.analyze over a list of all rows

Results go to benchmarks/results/analyze.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SEED = 0
TASK: dict[str, Any] = {
    "name": "moods",
    "system": "Judge the song. Answer in JSON.",
    "user": "{title}: {lyrics}",
    "label": "mood",
    "max_answer_tokens": 2,
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["mood"],
        "properties": {"mood": {"type": "string", "enum": ["glad", "sad", "angry", "calm"]}},
    },
}
PARTS = ("answers", "labels", "list")


def make_rows(count: int) -> Iterator[str]:
    chance = random.Random(SEED)
    words = "rain roof river light window winter door song heart road fire sea night bell stone".split()
    for number in range(count):
        lyrics = " ".join(chance.choices(words, k=chance.randint(5, 40)))
        row = {"id": f"s{number}", "title": f"Song {number}", "lyrics": lyrics, "year": 1950 + number % 70}
        yield json.dumps(row)[: -1 if number % 100 == 99 else None] + "\n"


def analyze(part: str, folder: Path, rows: Path) -> None:
    """One analysis in this process, without a result."""
    from mlx_distill.runtime import load_blas

    load_blas()
    task = {key: value for key, value in TASK.items() if part == "labels" or key != "label"}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    if part == "list":
        import mlx_distill as md
        from mlx_distill.data.files import ReadOptions, read_each

        items = [row for _, row in read_each(rows, rows.name, ReadOptions()) if isinstance(row, dict)]
        answers = md.analyze(folder / "model", folder / "task.json", items, max_tokens=2, constrain=False)
        assert len(answers) == len(items)
        return
    from mlx_distill.infer.analyze_file import analyze_file

    summary = analyze_file(
        folder / "model",
        rows,
        task=str(folder / "task.json"),
        out=folder / f"{part}.jsonl",
        force=True,
        labels_only=part == "labels",
        constrain=False,
    )
    assert summary.kinds["bad row"] == summary.answers // 100, summary.line()


def measure(part: str, folder: Path, rows: Path, count: int) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, __file__, "--part", part, str(folder), str(rows)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{part}: {said[-2000:]}")
    seconds = time.perf_counter() - began
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "part": part,
        "rows": count,
        "seconds": round(seconds, 1),
        "items_per_second": round(count / seconds, 1),
        "peak_mb": round(peak / 1e6, 1),
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "analyze.json")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        analyze(arguments.part[0], Path(arguments.part[1]), Path(arguments.part[2]))
        return
    from helpers.small_model import write_small_model

    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_model(folder / "model")
        for count in arguments.rows:
            rows = folder / f"rows{count}.jsonl"
            with open(rows, "w", encoding="utf-8") as file:
                file.writelines(make_rows(count))
            results += [measure(part, folder, rows, count) for part in arguments.parts]
    write(arguments.out, results)


def write(path: Path, results: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    import mlx.core as mx

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    setting = {
        "commit": commit.stdout.strip(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": str(mx.default_device()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }
    path.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
