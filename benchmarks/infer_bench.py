"""The engine beside mlx-lm's own decoders: one row, batches, shared beginnings, many requests.

    python benchmarks/infer_bench.py                                # about 10 minutes on two cores
    python benchmarks/infer_bench.py --parts one --rounds 7

    load    seconds to load the model from a folder, and MLX's memory behind it
    one     seconds of one answer: mlx_lm.generate (generate_step), BatchGenerator, the engine, in turns
    batch   tokens per second of a batch: BatchGenerator and the engine, and the engine one by one
    prefix  prompt tokens computed, and seconds, of prompts behind one system prompt, with a prefix cache and
            without
    many    requests a second and time to the first token, where more requests wait than fit into the batch;
            answers of 8 to 40 tokens, so that rows leave and join all the time; BatchGenerator beside it

The model has random weights in float32. Every contender greedily decodes the same prompts to the same number
of tokens, in one process, in turns; the figures are medians, and ratios are the medians of each round's.
With --clock cpu, seconds are those of the processor, which other work on the machine changes little (the
time to the first token stays on the wall's). Results go to benchmarks/results/infer.json. What a constraint
costs is in constrained_bench.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
RESULTS = ROOT / "benchmarks" / "results" / "infer.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter
PARTS = ("load", "one", "batch", "prefix", "many")


class Numbers:
    """Text takes no part here."""

    def decode(self, tokens: Sequence[int]) -> str:
        return ""


def make_model(hidden: int, layers: int, vocabulary: int) -> Any:
    import mlx.core as mx
    from mlx_lm.models import qwen3

    mx.random.seed(0)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=3 * hidden,
            num_attention_heads=8,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            head_dim=hidden // 8,
            tie_word_embeddings=True,
            rope_theta=10000.0,
        )
    )
    mx.eval(model.parameters())
    return model.eval()


def make_prompts(count: int, low: int, high: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, int(random.integers(low, high))).tolist() for _ in range(count)]


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the first one of a round changes."""
    names = list(contenders)
    for name in names:
        contenders[name]()
    out: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            out[name].append(contenders[name]())
    return out


def ratio(times: dict[str, list[float]], a: str, b: str) -> dict[str, float]:
    each = [x / y for x, y in zip(times[a], times[b], strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def timed(call: Callable[[], Any]) -> float:
    began = clock()
    call()
    return clock() - began


def batch_generator(model: Any, prompts: list[list[int]], lengths: Sequence[int], rows: int) -> int:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model, stop_tokens=[], completion_batch_size=rows, prefill_batch_size=min(8, rows)
    )
    count = 0
    try:
        generator.insert(prompts, list(lengths))
        while responses := generator.next_generated():
            count += len(responses)
    finally:
        generator.close()
    assert count == sum(lengths)
    return count


def engine(
    model: Any, prompts: list[list[int]], lengths: Sequence[int], rows: int, prefix_cache_tokens: int = 8192
) -> tuple[Any, list[Any]]:
    from mlx_distill.infer.engine import Engine
    from mlx_distill.infer.requests import Finished, Request

    made = Engine(model, Numbers(), batch_size=rows, prefix_cache_tokens=prefix_cache_tokens)
    for prompt, length in zip(prompts, lengths, strict=True):
        made.submit(Request(prompt, length))
    events: list[Any] = []
    while made.busy:
        events += made.step()
    generations = [event.generation for event in events if isinstance(event, Finished)]
    assert sum(len(g.tokens) for g in generations) == sum(lengths)
    return made.stats, generations


def measure_load(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model = make_model(hidden, layers, vocabulary)
    weights = dict(tree_flatten(model.parameters()))
    args = vars(model.args)
    del model
    with tempfile.TemporaryDirectory() as name:
        mx.save_safetensors(f"{name}/model.safetensors", weights)
        Path(name, "config.json").write_text(json.dumps(args))
        size = Path(name, "model.safetensors").stat().st_size
        del weights
        mx.clear_cache()
        before = mx.get_active_memory()
        seconds = timed(lambda: mx.eval(load_model(Path(name))[0].parameters()))
        model, _ = load_model(Path(name))
        mx.eval(model.parameters())
        return {"file_mb": size / 1e6, "seconds": seconds, "mlx_mb": (mx.get_active_memory() - before) / 1e6}


def measure_one(model: Any, vocabulary: int, tokens: int, rounds: int) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    prompt = make_prompts(1, 32, 33, vocabulary)[0]

    def plain() -> None:
        assert sum(1 for _ in generate_step(mx.array(prompt), model, max_tokens=tokens)) == tokens

    times = in_turns(
        {
            "mlx_lm.generate": lambda: timed(plain),
            "BatchGenerator": lambda: timed(lambda: batch_generator(model, [prompt], [tokens], 1)),
            "engine": lambda: timed(lambda: engine(model, [prompt], [tokens], 1)),
        },
        rounds,
    )
    return {
        "tokens": tokens,
        "seconds": {name: statistics.median(line) for name, line in times.items()},
        "engine_over_mlx_lm": ratio(times, "engine", "mlx_lm.generate"),
        "engine_over_BatchGenerator": ratio(times, "engine", "BatchGenerator"),
    }


def measure_batch(model: Any, vocabulary: int, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    prompts = make_prompts(rows, 8, 24, vocabulary)
    lengths = [tokens] * rows
    times = in_turns(
        {
            "one by one": lambda: timed(lambda: engine(model, prompts, lengths, 1)),
            "BatchGenerator": lambda: timed(lambda: batch_generator(model, prompts, lengths, rows)),
            "engine": lambda: timed(lambda: engine(model, prompts, lengths, rows)),
        },
        rounds,
    )
    return {
        "rows": rows,
        "tokens": tokens,
        "tokens_per_s": {name: rows * tokens / statistics.median(line) for name, line in times.items()},
        "engine_over_one_by_one": ratio(times, "one by one", "engine"),
        "engine_over_BatchGenerator": ratio(times, "BatchGenerator", "engine"),
    }


def measure_prefix(model: Any, vocabulary: int, shared: int, rows: int, rounds: int) -> dict[str, Any]:
    beginning = make_prompts(1, shared, shared + 1, vocabulary, seed=1)[0]
    rests = make_prompts(rows, 8, 24, vocabulary, seed=2)
    prompts = [beginning + rest for rest in rests]
    stats: dict[str, Any] = {}

    def run(limit: int) -> float:
        began = clock()
        stats[str(limit)] = engine(model, prompts, [4] * rows, 16, limit)[0]
        return clock() - began

    times = in_turns({"with": lambda: run(8192), "without": lambda: run(0)}, rounds)
    return {
        "shared_tokens": shared,
        "own_tokens": sum(len(rest) - 1 for rest in rests),
        "rows": rows,
        "computed_tokens": {"with": stats["8192"].prompt_tokens, "without": stats["0"].prompt_tokens},
        "reused_tokens": stats["8192"].reused_tokens,
        "seconds": {name: statistics.median(line) for name, line in times.items()},
        "speedup": ratio(times, "without", "with"),
    }


def measure_many(model: Any, vocabulary: int, rows: int, requests: int, rounds: int) -> dict[str, Any]:
    import mlx.core as mx

    prompts = make_prompts(requests, 8, 24, vocabulary, seed=3)
    lengths = np.random.default_rng(4).integers(8, 41, requests).tolist()
    first: list[float] = []

    def run() -> float:
        began = clock()
        generations = engine(model, prompts, lengths, rows)[1]
        first[:] = sorted(g.first_token_seconds for g in generations)
        return clock() - began

    mx.reset_peak_memory()
    times = in_turns(
        {
            "BatchGenerator": lambda: timed(lambda: batch_generator(model, prompts, lengths, rows)),
            "engine": run,
        },
        rounds,
    )
    return {
        "rows": rows,
        "requests": requests,
        "requests_per_s": {name: requests / statistics.median(line) for name, line in times.items()},
        "engine_over_BatchGenerator": ratio(times, "BatchGenerator", "engine"),
        "first_token_seconds": {"first": first[0], "median": statistics.median(first), "last": first[-1]},
        "peak_mb": mx.get_peak_memory() / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=48_000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(arguments)

    from mlx_distill.runtime import load_blas, machine, versions

    global clock
    clock = CLOCKS[options.clock]
    load_blas()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    size = options.hidden, options.layers, options.vocabulary
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"machine": machine(), "versions": versions(), "commit": commit.stdout.strip()}
    setting = {"clock": options.clock, **dict(zip(("hidden", "layers", "vocabulary"), size, strict=True))}
    model = make_model(*size)
    vocabulary, rounds = options.vocabulary, options.rounds
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "load": lambda: measure_load(*size),
        "one": lambda: measure_one(model, vocabulary, options.tokens, rounds),
        "batch": lambda: measure_batch(model, vocabulary, 16, options.tokens, rounds),
        "prefix": lambda: measure_prefix(model, vocabulary, 200, 16, rounds),
        "many": lambda: measure_many(model, vocabulary, 16, 48, rounds),
    }
    for part in options.parts:
        results[part] = {**setting, **parts[part]()}
        print(part, json.dumps(results[part]), file=sys.stderr)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
