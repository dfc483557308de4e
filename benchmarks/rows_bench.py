"""Memory and speed of preparing, tokenizing and iterating over 10,000 and 100,000 rows.

    python benchmarks/rows_bench.py                   # about 3 minutes on two cores
    python benchmarks/rows_bench.py --rows 1000 5000

Rows are generated: words of the packaged generator's texts and some invented ones, drawn by Zipf's law, in
chats of log-normal length (median about 180 tokens, 95th percentile about 700, at most 1,024 are kept); every
twentieth is a near duplicate of the one before. The tokenizer is that of the packaged tiny teacher. Each part
runs in its own process; memory is the kernel's peak resident memory above that after the imports. The page
cache is not counted.

    prepare    checks, near duplicates, split                      (data/prepare.py)
    tokenize   chats to tokens on disk                             (data/chat.py, storage/array_store.py)
    walk       two epochs in batches of 8, each batch collated     (train/batches.py)
    list       the same tokens in a list of arrays
    by itself  the same tokens in a list, chat by chat, only for the smallest number of rows
    datasets   Dataset.map with the tokenizer's template, batched; it makes no mask, so it does less work, and
               it maps its files, whose pages count as resident

Results go to benchmarks/results/rows.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "mlx_distill" / "assets" / "models" / "tiny-qwen3"
MAX_LENGTH, BATCH, SEED = 1024, 8, 0
# Words of a text; with the tokens of the prompt and 1.75 tokens per word about 180 and 700 tokens.
MEDIAN_WORDS, P95_WORDS, MAX_WORDS = 70, 367, 1000
TASK: dict[str, Any] = {
    "name": "kinds",
    "system": "Say of which kind the text is. Answer in JSON.",
    "user": "{text}",
    "label": "kind",
    "slices": ("group",),
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["kind"],
        "properties": {"kind": {"type": "string", "enum": ["a", "b", "c"]}},
    },
}


def make_rows(count: int) -> Iterator[dict[str, Any]]:
    import numpy as np

    from mlx_distill.assets.music.generator import generate

    random = np.random.default_rng(SEED)
    songs = generate(count=300, seed=0, noise=0.0, part="train")
    known = sorted({word for song in songs for word in song["lyrics"].split()})
    known = [known[i] for i in random.permutation(len(known))]
    sigma = math.log(P95_WORDS / MEDIAN_WORDS) / 1.645
    text: list[str] = []
    for number in range(count):
        if number % 20 == 19:
            text = [*text]
            text[int(random.integers(len(text)))] = "changed"
        else:
            length = math.exp(random.normal(math.log(MEDIAN_WORDS), sigma))
            words = int(min(max(length, 3), MAX_WORDS))
            indices = np.minimum(random.zipf(1.3, words), len(known)) - 1
            text = [
                f"x{int(random.integers(200_000))}" if rare else known[i]
                for i, rare in zip(indices, random.random(words) < 0.02, strict=True)
            ]
        yield {
            "id": f"row{number}",
            "text": " ".join(text),
            "kind": "abc"[number % 3],
            "group": "uvwxyz"[number % 6],
        }


# ---- the parts; each imports what it needs, calls ``start_measuring``, then works in the folder of its rows


def part_make(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    start_measuring()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(count))
    return {"rows": count, "bytes": (folder / "rows.jsonl").stat().st_size}


def part_prepare(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    from mlx_distill.data.prepare import prepare
    from mlx_distill.recipe import DataConfig, SourceConfig
    from mlx_distill.tasks.answer import check_answer
    from mlx_distill.tasks.task import Task

    task = Task(**TASK)
    check_answer({"kind": "a"}, task.schema)
    start_measuring()
    (folder / "data").mkdir()
    config = DataConfig(
        sources=[SourceConfig(path=str(folder / "rows.jsonl"))], stratify=["group"], test_fraction=0.0
    )
    statistics = prepare(config, task, None, folder / "data")
    return {"rows": count, "kept": statistics["rows"], "near_duplicates": statistics["near_duplicates"]}


def _tokenizer() -> Any:
    from mlx_distill.data.chat import render
    from mlx_distill.models.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return tokenizer


def _encoded(folder: Path, tokenizer: Any, report: Any) -> Iterator[Any]:
    from mlx_distill.data.chat import encode_rows
    from mlx_distill.data.rows import from_row
    from mlx_distill.storage import read_jsonl

    rows = (from_row(row) for _, row in read_jsonl(folder / "data" / "train.jsonl"))
    return encode_rows(rows, tokenizer, MAX_LENGTH, "last", report)


def part_tokenize(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    import numpy as np

    from mlx_distill.data.chat import EncodeReport, TokenizedRow
    from mlx_distill.storage.array_store import ROWS, Store, StoreWriter

    tokenizer, report = _tokenizer(), EncodeReport()
    start_measuring()
    start = time.perf_counter()
    with StoreWriter(folder / "store") as writer:
        for item in _encoded(folder, tokenizer, report):
            writer.append(int(item.trained.sum()), tokens=item.tokens, trained=item.trained)
    seconds = time.perf_counter() - start
    lengths = Store(folder / "store", TokenizedRow).lengths
    return {
        "rows": report.kept + report.left_out,
        "seconds": seconds,
        "kept": report.kept,
        "tokens": int(lengths.sum()),
        "median": float(np.median(lengths)),
        "p95": float(np.quantile(lengths, 0.95)),
        "bytes": (folder / "store" / ROWS).stat().st_size,
    }


def part_walk(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    """Two epochs; the bytes that are read from the file of rows while the second epoch is planned and run."""
    import mlx.core as mx

    from mlx_distill.data.batching import collate, plan_epoch
    from mlx_distill.data.chat import TokenizedRow
    from mlx_distill.data.packing import plan_sequences
    from mlx_distill.storage.array_store import Store
    from mlx_distill.train.batches import RowBatches

    bytes_read, pread = [0], os.pread

    def counting_pread(handle: int, size: int, start: int) -> bytes:
        bytes_read[0] += size
        return pread(handle, size, start)

    os.pread = counting_pread
    mx.eval(mx.zeros(1))
    start_measuring()
    start = time.perf_counter()
    store = Store(folder / "store", TokenizedRow)
    packs = plan_sequences(store.lengths.tolist(), MAX_LENGTH, SEED, False)
    weights = packs.sum_rows(store.counted.tolist())
    source = RowBatches(
        packs.lengths,
        lambda indices: collate(store, packs.rows_of(indices), 0, packs.multiple),
        BATCH,
        SEED,
        weights=weights,
    )
    open_seconds = time.perf_counter() - start
    rows = 0
    for _ in range(len(source)):
        rows += len(next(source).rows)
    bytes_before, plan_start = bytes_read[0], time.perf_counter()
    plan_epoch(packs.lengths, BATCH, SEED, 1)
    plan_seconds, plan_bytes = time.perf_counter() - plan_start, bytes_read[0] - bytes_before
    for _ in range(len(source)):
        rows += len(next(source).rows)
    return {
        "rows": rows,
        "seconds": time.perf_counter() - start,
        "open_seconds": open_seconds,
        "plan_seconds": plan_seconds,
        "bytes_read_by_the_second_plan": plan_bytes,
        "bytes_read_by_the_second_epoch": bytes_read[0] - bytes_before,
    }


def part_list(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    from mlx_distill.data.chat import EncodeReport

    tokenizer, report = _tokenizer(), EncodeReport()
    start_measuring()
    rows = list(_encoded(folder, tokenizer, report))
    return {"rows": report.kept + report.left_out, "kept": len(rows)}


def part_by_itself(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    from mlx_distill.data.chat import render
    from mlx_distill.storage import read_jsonl

    tokenizer = _tokenizer()
    start_measuring()
    rows = [render(tokenizer, row["messages"]) for _, row in read_jsonl(folder / "data" / "train.jsonl")]
    return {"rows": len(rows)}


def part_datasets(folder: Path, count: int, start_measuring: Callable[[], None]) -> dict[str, Any]:
    os.environ |= {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    from datasets import load_dataset

    inner = _tokenizer()._tokenizer
    start_measuring()

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [
            inner.apply_chat_template(chat, tokenize=False, enable_thinking=False)
            for chat in rows["messages"]
        ]
        return {"tokens": inner(texts, add_special_tokens=False, verbose=False)["input_ids"]}

    rows = load_dataset("json", data_files=str(folder / "data" / "train.jsonl"), split="train")
    tokenized = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    return {"rows": len(tokenized)}


PARTS = {
    "make": part_make,
    "prepare": part_prepare,
    "tokenize": part_tokenize,
    "walk": part_walk,
    "list": part_list,
    "by itself": part_by_itself,
    "datasets": part_datasets,
}


# ---- measuring


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; the peak where the kernel has no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(name: str, folder: Path, count: int) -> dict[str, Any]:
    state: dict[str, float] = {}

    def start_measuring() -> None:
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        state.update(floor=resident("VmRSS"), start=time.perf_counter(), cpu=time.process_time())

    result = PARTS[name](folder, count, start_measuring)
    seconds, cpu = time.perf_counter() - state["start"], time.process_time() - state["cpu"]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "floor": state["floor"],
        "peak": resident("VmHWM"),
        **result,
    }


def measure(name: str, folder: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--rows", str(count)]
    process = subprocess.run(command, capture_output=True, cwd=ROOT, text=True)
    if process.returncode:
        raise SystemExit(f"{name} {count} failed ({process.returncode}):\n{process.stderr[-3000:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    result |= {
        "peak_above_floor": result["peak"] - result["floor"],
        "rows_per_second": result["rows"] / result["seconds"],
        "rows_per_cpu_second": result["rows"] / result["cpu_seconds"],
    }
    speed = f"{result['seconds']:7.1f} s {result['rows_per_second']:9.0f} rows/s"
    memory = f"{result['peak_above_floor'] / 1e6:8.1f} MB above {result['floor'] / 1e6:.0f} MB"
    print(f"{name:10} {count:8,} {speed} {memory}", flush=True)
    return result


def compare(runs: dict[str, dict[str, Any]], sizes: list[int]) -> dict[str, Any]:
    small, large = str(sizes[0]), str(sizes[-1])
    # Bytes of memory per additional row.
    growth = {
        name: (run[large]["peak_above_floor"] - run[small]["peak_above_floor"]) / (sizes[-1] - sizes[0])
        for name, run in runs.items()
        if large in run and small in run and large != small
    }
    ours, walk = runs["tokenize"], runs["walk"][large]
    ratios = {
        f"tokenize: {key} of {other}": ours[size][key] / runs[other][size][key]
        for other, size in (("list", large), ("datasets", large), ("by itself", small))
        for key in ("peak_above_floor", "rows_per_second", "rows_per_cpu_second")
    }
    ratios |= {
        f"tokenize: bytes a row of {other}": growth["tokenize"] / growth[other]
        for other in ("list", "datasets")
        if other in growth
    }
    ratios["bytes read by the second plan"] = walk["bytes_read_by_the_second_plan"]
    ratios["second plan, share of an epoch's time"] = walk["plan_seconds"] / (walk["seconds"] / 2)
    return {"bytes_a_row": growth, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(child(options.child, options.folder, options.rows[0])))
        return
    from mlx_distill.runtime import machine, versions

    start, sizes = time.perf_counter(), sorted(options.rows)
    runs: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
    with tempfile.TemporaryDirectory() as work:
        for count in sizes:
            folder = Path(work) / str(count)
            folder.mkdir()
            for name in PARTS:
                if name != "by itself" or count == sizes[0]:
                    runs[name][str(count)] = measure(name, folder, count)
    out: dict[str, Any] = {
        "settings": {"longest": MAX_LENGTH, "batch": BATCH, "task": TASK},
        "runs": runs,
        **compare(runs, sizes),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    from importlib.metadata import version

    packages = {**versions(), **{name: version(name) for name in ("datasets", "tokenizers")}}
    out |= {
        "seconds": time.perf_counter() - start,
        "machine": machine(),
        "versions": packages,
        "commit": commit,
    }
    for title in ("bytes_a_row", "ratios"):
        for key, value in out[title].items():
            print(f"{title.replace('_', ' ')}: {key:50} {value:.4g}")
    path = ROOT / "benchmarks" / "results" / "rows.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
