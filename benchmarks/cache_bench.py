"""The teacher cache: bytes a token, the KL computed from it, what writing costs beside the forward.

    python benchmarks/cache_bench.py --tokenizers FOLDER     # FOLDER/qwen3 and FOLDER/gpt-oss: tokenizer.json
    python benchmarks/cache_bench.py --parts kl store        # without tokenizers

    write  a teacher with a trunk of more than 100 million random weights and the head of the vocabulary reads
           texts of this repository in its tokenizer's tokens: seconds of the bare forward (trunk and all
           logits), and of the forward with what is kept of it written to disk, in turns, in processor time,
           since the machine is shared; its parts; the same with a temperature other than 1
    bytes  bytes on disk by token, all files counted, of 320 rows of this repository's documents in each
           tokenizer's tokens, with random top 32, without and with a temperature other than 1
    kl     the KL of a student computed from a cache against the exact one in float64, where the top 32 hold
           99.5 % of the mass and elsewhere, over random distributions of 151,936 columns
    store  the array store of rows and aligned rows beside pyarrow (parquet without and with compression):
           bytes, seconds to write and to read 300 rows at random, of packed records
    live   a token-level loss and its gradient by the student's hidden states at 256 positions from a live
           teacher, both heads of 151,936 columns: peak memory beyond the models and processor time, with both
           logits at once and tile by tile
    read   milliseconds of processor time in which a batch of aligned rows with 32 tokens a position is read
           from disk and collated: what reading ahead could save of a training step
    student
           the packaged tiny Qwen3, fine-tuned, teaches its own base: held-out KL of students from the cache
           and from the live teacher, with equal seeds; only the token-level loss

Results go to benchmarks/results/cache.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
RESULTS = ROOT / "benchmarks" / "results" / "cache.json"
PARTS = ("bytes", "write", "kl", "store", "live", "read", "student")
COLUMNS = {"qwen3": 151_936, "gpt-oss": 201_088}


def make_teacher(columns: int, hidden: int, layers: int, seed: int = 0) -> Any:
    import mlx.core as mx
    from mlx_lm.models import qwen3

    mx.random.seed(seed)
    arguments = qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=3 * hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        rms_norm_eps=1e-6,
        vocab_size=columns,
        max_position_embeddings=4096,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    model = qwen3.Model(arguments)
    # Logits with a spread like a trained model's, so that the top k and its tail are no extreme.
    model.model.norm.weight = model.model.norm.weight * 6.0
    mx.eval(model.parameters())
    return model


def texts(tokenizer: Any, rows: int, length: int) -> list[list[int]]:
    """Pieces of the repository's documents."""
    files = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
    whole = "\n".join(path.read_text("utf-8") for path in files)
    ids = tokenizer.encode(whole[: rows * length * 8], add_special_tokens=False)
    return [ids[i * length : (i + 1) * length] for i in range(rows)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def processor_time(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    out = work()
    return time.process_time() - start, out


def write(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from transformers import PreTrainedTokenizerFast

    from mlx_distill.distill.teacher import TokenizedAnswer, byte_lengths, score
    from mlx_distill.distill.teacher_cache import TargetReader, TargetWriter
    from mlx_distill.distill.token_codec import TokenLayout
    from mlx_distill.distill.token_distributions import top_k
    from mlx_distill.models.forward import hidden_states, logits

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / name / "tokenizer.json"))
    model = make_teacher(COLUMNS[name], arguments.hidden, arguments.layers)
    model.eval()
    rows, start = texts(tokenizer, arguments.rows, arguments.length), arguments.length // 2
    answers = [
        TokenizedAnswer(row, start, None, f"row-{i:05d}", tokenizer.decode(row[start:]))
        for i, row in enumerate(rows)
    ]
    lengths = byte_lengths(tokenizer)
    assert lengths is not None
    bits = int(lengths.max()).bit_length()
    layout = TokenLayout(columns=COLUMNS[name], top_k=32, length_bits=bits)
    tokens = sum(len(row) - start for row in rows)

    def bare() -> tuple[float, float, Any]:
        """Trunk, and logits of the answers' positions."""
        trunk, hidden = processor_time(lambda: _evaluated(hidden_states(model, mx.array(rows))))
        kept = hidden[:, start - 1 : -1].reshape(-1, hidden.shape[-1])
        head, z = processor_time(lambda: _evaluated(logits(model, kept)))
        return trunk, head, z

    def whole(temperatures: tuple[float, ...] = ()) -> tuple[float, float, Path]:
        target = Path(tempfile.mkdtemp()) / "targets"
        options = {"batch_size": len(rows), "multiple": 1, "temperatures": temperatures}
        forward, scored = processor_time(
            lambda: list(score(model, answers, top_k=32, tokenizer=tokenizer, **options))
        )
        writer = TargetWriter(target, replace(layout, temperatures=temperatures))
        packing, _ = processor_time(lambda: (writer.write(scored), writer.finish(labels=[])))
        return forward, packing, target

    whole()
    rounds = [(bare(), whole(), whole((2.0,))) for _ in range(arguments.rounds)]
    z = rounds[0][0][2]
    best = processor_time(lambda: _evaluated(top_k(z, 32)))[0]
    normalizer = processor_time(lambda: _evaluated(mx.logsumexp(z, axis=-1)))[0]
    target = rounds[-1][1][2]
    on_disk = sum(path.stat().st_size for path in target.iterdir())
    records = sum(path.stat().st_size for path in target.glob("tokens-*"))
    weights = sum(v.size for n, v in tree_flatten(model.parameters()) if "embed" not in n)
    index = TargetReader(target).index

    def speed(which: int) -> float:
        return statistics.median(sum(one[0][:2]) / sum(one[which][:2]) for one in rounds)

    return {
        "columns": COLUMNS[name],
        "trunk_parameters": weights,
        "tokens": tokens,
        "record_bytes": layout.record_bytes,
        "token_file_bytes_a_token": records / tokens,
        "all_files_bytes_a_token": on_disk / tokens,
        "kept_mass": index["kept_mass"],
        "processor_seconds": {
            "trunk": statistics.median(one[0][0] for one in rounds),
            "head": statistics.median(one[0][1] for one in rounds),
            "forward_with_what_is_kept": statistics.median(one[1][0] for one in rounds),
            "packing_and_writing": statistics.median(one[1][1] for one in rounds),
            "top_k": best,
            "one_logsumexp": normalizer,
        },
        "rounds": len(rounds),
        "speed_of_bare_forward": speed(1),
        "speed_of_bare_forward_with_a_temperature": speed(2),
    }


def stored_bytes(
    folder: Path, name: str, temperatures: tuple[float, ...], count: int = 320, length: int = 64
) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    from mlx_distill.distill.teacher import byte_lengths
    from mlx_distill.distill.teacher_cache import TargetWriter, TeacherTargets
    from mlx_distill.distill.token_codec import TokenLayout

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / name / "tokenizer.json"))
    lengths = byte_lengths(tokenizer)
    assert lengths is not None
    layout = TokenLayout(
        COLUMNS[name], 32, length_bits=int(lengths.max()).bit_length(), temperatures=temperatures
    )
    random, target = np.random.default_rng(0), Path(tempfile.mkdtemp()) / "targets"
    rows = [row for row in texts(tokenizer, count, length) if row]
    writer = TargetWriter(target, layout)
    targets = []
    for number, row in enumerate(rows):
        ids, n = np.array(row), len(row)
        logs = np.log(random.dirichlet(np.full(33, 0.1), n) + 1e-12).astype(np.float32)
        top = random.integers(0, COLUMNS[name], (n, 32))
        logs = np.concatenate([-np.sort(-logs[:, :32], axis=1), logs[:, 32:]], axis=1)
        targets.append(
            TeacherTargets(
                f"row-{number:05d}",
                tokenizer.decode(row),
                None,
                ids,
                logs[:, 0],
                top,
                logs[:, :32],
                tail_logprobs=logs[:, 32],
                ends=np.cumsum(lengths[ids]),
                tempered_tails=np.repeat(logs[:, 32:], len(temperatures), axis=1),
            )
        )
    for first in range(0, len(targets), 128):
        writer.write(targets[first : first + 128])
    writer.finish(labels=[])
    tokens = sum(map(len, rows))
    whole = sum(path.stat().st_size for path in target.iterdir())
    records = sum(path.stat().st_size for path in target.glob("tokens-*"))
    return {
        "tokens": tokens,
        "record_bytes": layout.record_bytes,
        "token_files_bytes_a_token": records / tokens,
        "all_files_bytes_a_token": whole / tokens,
    }


def _evaluated(array: Any) -> Any:
    import mlx.core as mx

    mx.eval(array)
    return array


def kl(rows: int = 48, columns: int = 151_936) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_distill.distill.token_codec import TokenLayout, TokenRecords, pack_records, unpack_records
    from mlx_distill.distill.token_distributions import Kept, distributions
    from mlx_distill.losses.topk import sparse_forward_kl
    from mlx_distill.records import TopK

    random = np.random.default_rng(0)
    # Ranks that fall as a power, as in text, at several sharpnesses; the student has noise on its logits.
    sharp = np.repeat(np.linspace(1.0, 6.0, rows // 4), 4)[:, None]
    z = (-sharp * np.log(np.arange(1, columns + 1))).astype(np.float32)
    z = np.stack([row[random.permutation(columns)] for row in z])
    student = z + random.normal(size=z.shape).astype(np.float32) * random.uniform(0.1, 1.5, (rows, 1))
    tokens = random.integers(0, columns, rows).astype(np.int32)
    kept = distributions(mx.array(z), tokens, Kept(32))
    layout = TokenLayout(columns=columns, top_k=32, length_bits=7)
    records = TokenRecords(
        tokens, kept.logprobs, kept.topk_ids, kept.topk_logprobs, kept.tail_logprobs, np.zeros(rows, int)
    )
    out = unpack_records(layout, pack_records(layout, records))
    found, unrounded = (
        np.array(sparse_forward_kl(mx.array(student), TopK(mx.array(ids), mx.array(logs))))
        for ids, logs in ((out.topk_ids, out.topk_logprobs), (kept.topk_ids, kept.topk_logprobs))
    )
    p, q = z.astype(np.float64), student.astype(np.float64)
    p -= np.log(np.exp(p - p.max(1, keepdims=True)).sum(1, keepdims=True)) + p.max(1, keepdims=True)
    q -= np.log(np.exp(q - q.max(1, keepdims=True)).sum(1, keepdims=True)) + q.max(1, keepdims=True)
    exact = (np.exp(p) * (p - q)).sum(1)
    mass = np.sort(np.exp(p), axis=1)[:, -32:].sum(1)
    high = mass >= 0.995
    return {
        "positions": rows,
        "positions_with_99.5_percent": int(high.sum()),
        "mean_kl_error_there": abs(float(found[high].sum() / exact[high].sum()) - 1),
        "largest_kl_error_there": float(np.abs(found[high] / exact[high] - 1).max()),
        "largest_change_by_rounding": float(np.abs(found / unrounded - 1).max()),
        "elsewhere_share_of_exact": float(found[~high].sum() / exact[~high].sum()),
        "elsewhere_tail_mass": float(1 - mass[~high].mean()),
        "elsewhere_above_exact": int((found[~high] > exact[~high] * 1.01).sum()),
    }


def store(rows: int = 2000) -> dict[str, Any]:
    import pyarrow as pa

    from mlx_distill.storage.array_store import Store, StoreWriter

    random = np.random.default_rng(0)
    data = [random.integers(0, 256, (int(n), 120), dtype=np.uint8) for n in random.integers(20, 120, rows)]
    order = random.integers(0, rows, 300)
    place, out = Path(tempfile.mkdtemp()), {}

    def own() -> None:
        with StoreWriter(place / "own") as writer:
            for row in data:
                writer.append(records=row)

    reader: Any = None
    seconds, _ = timed(own)
    reader = Store(place / "own", dict)
    read, _ = timed(lambda: [reader[int(i)] for i in order])
    size = sum(path.stat().st_size for path in (place / "own").iterdir())
    out["own"] = {"bytes": size, "write_s": seconds, "random_read_s": read}
    table = pa.table({"records": [row.tobytes() for row in data]})
    for codec in ("none", "zstd"):
        out[f"parquet_{codec}"] = _parquet(place / f"{codec}.parquet", table, codec, order)
    path = place / "rows.arrow"

    def ipc() -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=64)

    seconds, _ = timed(ipc)
    batches = pa.ipc.open_file(pa.memory_map(str(path)))
    read, _ = timed(lambda: [batches.get_batch(int(i) // 64)["records"][int(i) % 64].as_py() for i in order])
    out["arrow_ipc"] = {"bytes": path.stat().st_size, "write_s": seconds, "random_read_s": read}
    return out


def live(positions: int = 256, hidden: int = 128) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_distill.distill.live_teacher import LiveTeacher
    from mlx_distill.distill.token_losses import TOKEN_LOSSES, TokenLossInput
    from mlx_distill.train.objective import LogitReader

    columns = COLUMNS["qwen3"]
    teacher, student = (make_teacher(columns, hidden, 1, seed) for seed in (0, 1))
    student.freeze()
    states = [mx.random.normal((positions, hidden)) for _ in range(2)]
    mx.eval(states)
    extra = {"start_index": mx.arange(positions), "teacher_hidden": states[1]}
    out: dict[str, Any] = {"positions": positions, "columns": columns}
    for name in ("kl", "js_divergence"):
        values = {}
        for kind, limit in (("dense", 1 << 40), ("tiles", 0)):

            def loss(x: mx.array, name: str = name, limit: int = limit) -> mx.array:
                reader = LogitReader(student, x, limit)
                data = TokenLossInput(reader, extra, lambda: x, None, 1.0, teacher=LiveTeacher(teacher, None))
                return TOKEN_LOSSES[name].loss(data).sum()

            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            seconds, (value, gradient) = processor_time(
                lambda one=loss: _evaluated(mx.value_and_grad(one)(states[0]))
            )
            peak = mx.get_peak_memory() - before
            values[kind] = {"peak_bytes": peak, "processor_s": seconds, "value": value.item()}
            del value, gradient
        dense, tiles = values["dense"], values["tiles"]
        out[name] = {
            **values,
            "peak_ratio": tiles["peak_bytes"] / dense["peak_bytes"],
            "time_ratio": tiles["processor_s"] / dense["processor_s"],
        }
    return out


def read(rows: int = 400, prompt: int = 300, answer: int = 120) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_distill.distill.align import (
        align_row,
        aligned_row_arrays,
        aligned_row_from_arrays,
        collate_aligned_rows,
    )
    from mlx_distill.storage.array_store import Store, StoreWriter

    random, columns = np.random.default_rng(0), COLUMNS["qwen3"]
    place = Path(tempfile.mkdtemp()) / "rows"
    with StoreWriter(place) as writer:
        for _ in range(rows):
            row = align_row(
                random.integers(0, columns, prompt + answer),
                prompt,
                np.array([[j, j + 1, j, j + 1] for j in range(answer - 1)]),
                teacher_logprobs=-random.random(answer),
                topk_ids=random.integers(0, columns, (answer, 32)).astype(np.int32),
                topk_logprobs=-random.random((answer, 32)).astype(np.float32),
                label_start=None,
                label_logprobs=None,
            )
            writer.append(answer, **aligned_row_arrays(row))
    stored = Store(place, aligned_row_from_arrays)
    out: dict[str, Any] = {"prompt_tokens": prompt, "answer_tokens": answer}
    for size in (4, 16):
        order, found = random.permutation(rows), []
        for first in range(0, rows - size + 1, size):
            chosen = [[int(number)] for number in order[first : first + size]]

            def made(chosen: list[list[int]] = chosen) -> None:
                batch = collate_aligned_rows(stored, chosen, 0, 1, 16)
                mx.eval(batch.inputs, list(batch.extra.values()))

            found.append(processor_time(made)[0] * 1e3)
        out[f"batch_{size}_ms"] = statistics.median(found)
    return out


def student(out: Path, seeds: list[int], steps: int, known: dict[str, Any]) -> dict[str, Any]:
    from mlx_distill.pipeline import run
    from mlx_distill.storage import read_jsonl

    found = dict(known.get("seeds", {})) if known.get("steps") == steps else {}
    common = {
        "student": "asset:models/tiny-qwen3",
        "evaluate.models": [],
        "targets.top_k": 32,
        "distill.token_loss": "kl",
        "distill.token_weight": 1.0,
        "distill.label_weight": 0.0,
        "distill.text_weight": 0.0,
        "distill.steps": steps,
        "distill.evaluate_every": 0,
    }
    for stage in ("prepare", "convert", "teach", "targets"):
        run("tiny", out, overrides=common, only=stage, force=True)
    rows = [row for _, row in read_jsonl(out / "data" / "test.jsonl")][:60]
    before = held_out_kl(out, "student_base", rows)
    for seed in seeds:
        kls = {}
        for teacher in ("cached", "live"):
            overrides = {**common, "distill.teacher": teacher, "distill.seed": seed}
            run("tiny", out, overrides=overrides, only="distill", from_stage="distill")
            kls[teacher] = held_out_kl(out, "student", rows)
        found[str(seed)] = {**kls, "cached_over_live": kls["cached"] / kls["live"]}
    return {"steps": steps, "rows": len(rows), "base": before, "seeds": found}


def held_out_kl(out: Path, name: str, rows: list[dict[str, Any]]) -> float:
    """Mean KL of the teacher's whole distributions to a model's, at the tokens of the rows' own answers."""
    import mlx.core as mx

    from mlx_distill.data.chat import render
    from mlx_distill.losses.divergences import forward_kl
    from mlx_distill.models.load import load

    models = [load(out / folder, dtype="float32") for folder in ("teacher", name)]
    total = count = 0.0
    for row in rows:
        chat = render(models[0][1], row["messages"])
        start = chat.spans[-1][0]
        teacher, other = (
            model(mx.array(chat.tokens[None]))[0, start - 1 : -1].astype(mx.float32) for model, _ in models
        )
        total += forward_kl(other, teacher).sum().item()
        count += len(chat.tokens) - start
    return total / count


def _parquet(path: Path, table: Any, codec: str, order: np.ndarray) -> dict[str, Any]:
    import pyarrow.parquet as pq

    seconds, _ = timed(lambda: pq.write_table(table, path, compression=codec, row_group_size=64))
    file = pq.ParquetFile(path)
    read, _ = timed(lambda: [file.read_row_group(i // 64)["records"][i % 64].as_py() for i in order.tolist()])
    return {"bytes": path.stat().st_size, "write_s": seconds, "random_read_s": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizers", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--vocabularies", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", type=Path, help="folder of student's run; an earlier one is continued")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    import mlx_distill  # noqa: F401  # first: it loads OpenBLAS
    import mlx.core as mx  # isort: skip

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "device": str(mx.default_device()),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
    }
    if "kl" in arguments.parts:
        results["kl"] = kl()
    if "store" in arguments.parts:
        results["store"] = store()
    if "live" in arguments.parts:
        results["live"] = live()
    if "read" in arguments.parts:
        results["read"] = read()
    if "student" in arguments.parts:
        out = arguments.run or Path(tempfile.mkdtemp()) / "run"
        results["student"] = student(out, arguments.seeds, arguments.steps, results.get("student", {}))
    if "bytes" in arguments.parts and arguments.tokenizers:
        for name in arguments.vocabularies:
            stored = results.setdefault("bytes", {})
            stored[name] = stored_bytes(arguments.tokenizers, name, ())
            stored[f"{name}, one temperature"] = stored_bytes(arguments.tokenizers, name, (2.0,))
    if "write" in arguments.parts and arguments.tokenizers:
        for name in arguments.vocabularies:
            results.setdefault("write", {})[name] = write(arguments.tokenizers, name, arguments)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
