"""Time and memory of ``compare`` over two files of 10,000 rows, and how long its page takes to open.

    python benchmarks/compare_bench.py                   # about a minute on two quiet cores
    python benchmarks/compare_bench.py --rows 1000 --rounds 1

Each comparison is a process of its own, the command ``mlx-distill compare A B --task TASK --rows ROWS``, with
and without ``--out page.html``; memory is the kernel's peak resident memory of that process, imports and
all, and the process says whether it loaded mlx. The page is opened in headless Chromium: the time from the
start of the browser to the dump of the page, less that of an empty page; as it is, and searched for one row,
which the page must then show alone.

    moderation   a label and a number: answers repeat, and equal ones are checked once
    music        seven fields, lists among them: nearly every answer differs

Results go to benchmarks/results/compare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
SEED = 0
RUN = (
    "import sys; from mlx_distill.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
    "print('mlx' in sys.modules, file=sys.stderr)"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")


def make_answer(task: str, properties: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for name, schema in properties.items():
        if schema["type"] == "integer":
            answer[name] = chance.randint(0, 100)
        elif schema["type"] == "array":
            options = schema["items"].get("enum", ["John 3:16", "Psalm 23"])
            answer[name] = chance.sample(options, k=chance.randint(1, 2))
        else:
            answer[name] = chance.choice(schema["enum"])
    return answer


def write_files(folder: Path, task_name: str, count: int) -> None:
    """Rows, and the answers of two models that are right nine times of ten and invalid once in a hundred."""
    from mlx_distill.tasks.task import load_task

    task, chance = load_task(task_name), random.Random(SEED)
    properties = dict(task.schema["properties"])
    files = {name: open(folder / f"{name}.jsonl", "w", encoding="utf-8") for name in ("rows", "a", "b")}
    for number in range(count):
        truth = make_answer(task_name, properties, chance)
        texts = {
            name: f"{name} of row {number}: {'word ' * chance.randint(5, 40)}" for name in task.input_fields
        }
        slices = {name: f"{name} {number % 7}" for name in task.slices}
        files["rows"].write(json.dumps({"id": f"r{number}", **texts, **slices, "answer": truth}) + "\n")
        for name in ("a", "b"):
            answer = dict(truth)
            if chance.random() < 0.1:
                answer = make_answer(task_name, properties, chance)
            text = json.dumps(answer)[: None if chance.random() < 0.99 else 12]
            files[name].write(
                json.dumps({"id": f"r{number}", "text": text, "latency_s": chance.random()}) + "\n"
            )
    for file in files.values():
        file.close()


def compare(folder: Path, task: str, *options: str) -> dict[str, Any]:
    arguments = [str(folder / "a.jsonl"), str(folder / "b.jsonl"), "--task", task]
    arguments += ["--rows", str(folder / "rows.jsonl"), "--margin", "3pt", *options]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "compare", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said[-2000:])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(peak / 1e6, 1),
        "loaded_mlx": said.split()[-1] == "True",
    }


def dump(browser: str, address: str) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", address]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return time.perf_counter() - began, done.stdout


def open_page(browser: str, page: Path, count: int, rounds: int) -> dict[str, Any]:
    empty = page.with_name("empty.html")
    empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    base = statistics.median(dump(browser, empty.as_uri())[0] for _ in range(rounds))
    wanted = f"r{count // 2}"
    searched = f"{page.as_uri()}#cases?q={wanted}"
    opened = [dump(browser, page.as_uri()) for _ in range(rounds)]
    found = [dump(browser, searched) for _ in range(rounds)]
    table = re.search(r'<table id="case-table">.*?</table>', found[0][1], re.DOTALL)
    ids = re.findall(r'<th scope="row">(r\d+)', table[0]) if table else []
    return {
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "open_s": round(statistics.median(seconds for seconds, _ in opened) - base, 2),
        "open_and_search_s": round(statistics.median(seconds for seconds, _ in found) - base, 2),
        "search_shows_the_row_alone": ids == [wanted],
        "rows_with_javascript": len(re.findall(r"<tbody data-c", opened[0][1].split("<template")[0])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["moderation", "music"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compare.json")
    arguments = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    results = []
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_files(folder, task, arguments.rows)
            page = ["--out", str(folder / "page.html")]
            parts = {"figures": [], "page": page, "page with rows": [*page, "--with-rows"]}
            for part, options in parts.items():
                runs = [compare(folder, task, *options) for _ in range(arguments.rounds)]
                result = min(runs, key=lambda run: run["processor_seconds"])
                result = {"task": task, "rows": arguments.rows, "part": part, **result}
                if options and browser:
                    result |= open_page(browser, folder / "page.html", arguments.rows, arguments.rounds)
                print(result, flush=True)
                results.append(result)
                write(arguments.out, results, browser)


def write(path: Path, results: list[dict[str, Any]], browser: str | None) -> None:
    from importlib.metadata import version

    def said(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    setting = {
        "commit": said("git", "describe", "--always", "--dirty"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "browser": said(browser, "--version") if browser else None,
        "versions": {name: version(name) for name in ("numpy", "scipy", "jsonschema", "Jinja2")},
    }
    path.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
