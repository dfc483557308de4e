"""Answers under a grammar: how many parse, what a mask costs, and how much slower decoding becomes.

    python benchmarks/constrained_bench.py                          # about 20 minutes on two cores
    python benchmarks/constrained_bench.py --tokenizer FOLDER       # masks and speed with its vocabulary
    python benchmarks/constrained_bench.py --parts valid --generations 200

    valid   generations of an untrained model (random weights, the tokenizer of the packaged tiny-qwen3), half
            of them sampled, each with a schema of its own of bounded length, 16 at a time: how many were
            complete, how many of these parse, how many were cut by max_tokens
    masks   microseconds a row to fill the mask of the next token, by kind of schema, along texts of it: one
            row at a time; 8 and 16 rows one after the other and on llguidance's threads, in turns
    speed   tokens per second of one engine, free and under the grammar in turns, for models of random weights
            whose steps take tens of milliseconds: wall time and processor time, which other work on the
            machine changes less and in which nothing overlaps

Without --tokenizer the vocabulary has 48,000 generated tokens. Results go to
benchmarks/results/constrained.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MODEL = ROOT / "mlx_distill" / "assets" / "models" / "tiny-qwen3"
RESULTS = ROOT / "benchmarks" / "results" / "constrained.json"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KINDS: dict[str, Any] = {
    "enums": {
        "type": "array",
        "items": {"enum": ["violence", "substances", "language", "none"]},
        "minItems": 40,
    },
    "integers 0-100": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 100},
        "minItems": 40,
    },
    "free text": {"type": "string", "minLength": 400},
    "text, maxLength 40": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 40},
    "text, maxLength 500": {"type": "string", "minLength": 400, "maxLength": 500},
    "text, pattern": {
        "type": "array",
        "items": {"type": "string", "pattern": "^[A-Z][a-z]+ \\d+:\\d+$"},
        "minItems": 40,
    },
}


def schema_of(part: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": part}, "required": ["x"], "additionalProperties": False}


def make_tokenizer(folder: str | None, size: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if folder:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"))
        tokenizer.eos_token = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else "<|return|>"
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: number for number, letter in enumerate(alphabet)}
        merges, random = [], np.random.default_rng(0)
        known = ["Ġ", *"abcdefghijklmnopqrstuvwxyz", *"abcdefghijklmnopqrstuvwxyz".upper()]
        while len(vocabulary) < size - len(SPECIAL):
            left = known[int(len(known) * random.random() ** 2)]
            right = known[1 + int(26 * random.random())]
            if left + right not in vocabulary and len(left) < 12:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
                known.append(left + right)
        core = Tokenizer(models.BPE(vocabulary, merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(width: int, hidden: int, layers: int, seed: int = 0) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import qwen3

    mx.random.seed(seed)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=3 * hidden,
            num_attention_heads=8,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=width,
            max_position_embeddings=4096,
            head_dim=hidden // 8,
            tie_word_embeddings=True,
            rope_theta=10000.0,
        )
    )
    model.update(tree_map(lambda p: p * 3 if p.ndim > 1 else p, model.parameters()))  # wanders, repeats less
    mx.eval(model.parameters())
    return model.eval()


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    from mlx_distill.data.chat import prompt_ids
    from mlx_distill.records import Message

    texts = [f"row {number}" + " and more" * (number % 7) for number in range(count)]
    return [prompt_ids(tokenizer, [Message("user", text), Message("assistant", "")]) for text in texts]


def measure_valid(generations: int, max_tokens: int) -> dict[str, Any]:
    from helpers.schemas import random_schema

    from mlx_distill.data.chat import stop_ids
    from mlx_distill.infer.constrained import AnswerGrammar
    from mlx_distill.infer.engine import generate
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.tasks.answer import parse_answer

    tokenizer = load_tokenizer(MODEL)
    width = len(tokenizer.get_vocab()) + 64
    out: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": 16}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        random, count = np.random.default_rng(1), generations // 2
        model = make_model(width, 64, 2, seed=int(temperature))
        schemas = [random_schema(random) for _ in range(count)]
        prompts = prompts_of(tokenizer, count)
        constraints = [
            AnswerGrammar(tokenizer, schema, width).constraint(prompt)
            for schema, prompt in zip(schemas, prompts, strict=True)
        ]
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_tokens=max_tokens,
            batch_size=16,
            stop=set(stop_ids(tokenizer)),
            temperature=temperature,
            constraints=constraints,
        )
        complete = [(a, s) for a, s in zip(answers, schemas, strict=True) if a.finish == "stop"]
        errors = [error for a, s in complete if (error := parse_answer(a.text, s)[1])]
        out[name] = {
            "generations": count,
            "complete": len(complete),
            "valid": len(complete) - len(errors),
            "cut": count - len(complete),
            "tokens": sum(len(a.tokens) for a in answers),
            "errors": errors[:5],
        }
    return out


def measure_masks(tokenizer: Any, width: int) -> dict[str, Any]:
    from mlx_distill.infer.constrained import AnswerGrammar, token_table

    began = time.perf_counter()
    token_table(tokenizer, width)
    out: dict[str, Any] = {"width": width, "table_seconds": time.perf_counter() - began, "kinds": {}}
    for name, part in KINDS.items():
        began = time.perf_counter()
        grammar = AnswerGrammar(tokenizer, schema_of(part), width)
        grammar.constraint()
        compiled = time.perf_counter() - began
        single = _walk(grammar, 1, 200)[False]
        out["kinds"][name] = {
            "compile_ms": 1e3 * compiled,
            "row_us": {
                "median": 1e6 * statistics.median(single),
                "p95": 1e6 * float(np.quantile(single, 0.95)),
            },
            **{f"row_of_{rows}_us": _in_turns(grammar, rows) for rows in (8, 16)},
        }
    return out


def _in_turns(grammar: Any, rows: int) -> dict[str, Any]:
    """Microseconds a row, one row after the other and on threads."""
    seconds = _walk(grammar, rows, 60)
    of = {name: np.array(seconds[parallel]) for name, parallel in (("serial", False), ("parallel", True))}
    out = {
        name: {
            "median": 1e6 * float(np.median(values)) / rows,
            "mean": 1e6 * float(values.mean()) / rows,
            "p95": 1e6 * float(np.quantile(values, 0.95)) / rows,
        }
        for name, values in of.items()
    }
    return {**out, "parallel_over_serial": float(np.median(of["parallel"] / of["serial"]))}


def _walk(grammar: Any, rows: int, steps: int) -> dict[bool, list[float]]:
    """Seconds of each fill along the same random texts of the grammar, the first ones left out: on threads
    (True) and not, each with states of its own, since llguidance keeps what it has computed.
    """
    from mlx_distill.infer.constrained import fill_masks

    random = np.random.default_rng(0)
    ways = {
        way: [grammar.constraint() for _ in range(rows)] for way in ((False, True) if rows > 1 else (False,))
    }
    mask = np.zeros((rows, -(-grammar.table.width // 32)), dtype=np.int32)
    seconds: dict[bool, list[float]] = {way: [] for way in ways}
    for step in range(steps):
        for way in sorted(ways, reverse=step % 2 > 0):
            began = time.perf_counter()
            fill_masks(ways[way], mask, parallel=way)
            seconds[way].append(time.perf_counter() - began)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        for row in range(rows):
            token = int(random.choice(np.flatnonzero(bits[row])))
            for constraints in ways.values():
                constraints[row].accept(token)
                if constraints[row].done:
                    constraints[row] = grammar.constraint()
    return {way: values[8:] for way, values in seconds.items()}


def measure_speed(
    tokenizer: Any, width: int, model: Any, batch: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Free and constrained decoding in turns, by kind of schema: from the step on at which all rows have
    joined, so without the reading of prompts.
    """
    from mlx_distill.infer.constrained import AnswerGrammar

    out = {}
    prompts = prompts_of(tokenizer, batch)
    for kind in ("free text", "text, maxLength 500", "integers 0-100"):
        grammar = AnswerGrammar(tokenizer, schema_of(KINDS[kind]), width)

        def run(constrained: bool, grammar: Any = grammar) -> np.ndarray:
            return _decode(model, tokenizer, prompts, tokens, grammar if constrained else None)

        run(False), run(True)
        pairs = [(run(False), run(True)) if i % 2 else (run(True), run(False))[::-1] for i in range(rounds)]
        times = np.array(pairs)  # [rounds, free and constrained, wall and processor]
        for column, clock in enumerate(("wall", "cpu")):
            free, under = np.median(times[:, :, column], axis=0)
            ratios = times[:, 0, column] / times[:, 1, column]
            out.setdefault(kind, {})[clock] = {
                "step_ms": 1e3 * free * batch,
                "free_tokens_per_s": 1 / free,
                "constrained_tokens_per_s": 1 / under,
                "ratio": float(np.median(ratios)),
                "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
                "ratio_range": [float(ratios.min()), float(ratios.max())],
                "extra_us_a_row_and_step": 1e6 * (under - free),
            }
        print(batch, kind, json.dumps(out[kind]), file=sys.stderr, flush=True)
    return {"rounds": rounds, "tokens": tokens, "kinds": out}


def _decode(model: Any, tokenizer: Any, prompts: Any, tokens: int, grammar: Any) -> np.ndarray:
    """Seconds a token of wall and of processor time."""
    from mlx_distill.infer.engine import Engine
    from mlx_distill.infer.requests import Finished, Request

    engine = Engine(model, tokenizer, batch_size=len(prompts))
    stop = frozenset() if grammar is None else grammar.table.stop
    for prompt in prompts:
        constraint = None if grammar is None else grammar.constraint(prompt)
        engine.submit(Request(prompt, tokens, stop, constraint=constraint))
    events = []
    while engine.stats.rows < len(prompts):
        events += engine.step()
    before, began = engine.stats.tokens, np.array([time.perf_counter(), time.process_time()])
    while engine.busy:
        events += engine.step()
    seconds = np.array([time.perf_counter(), time.process_time()]) - began
    answers = [event.generation for event in events if isinstance(event, Finished)]
    assert len(answers) == len(prompts)
    assert all(len(answer.tokens) == tokens for answer in answers)
    return seconds / (engine.stats.tokens - before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["valid", "masks", "speed"])
    parser.add_argument("--generations", type=int, default=1200)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--tokenizer", help="a folder with a tokenizer.json")
    parser.add_argument("--size", type=int, default=48_000, help="of the generated vocabulary")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)

    from mlx_distill.runtime import load_blas, machine, versions

    load_blas()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"machine": machine(), "versions": versions(), "commit": commit.stdout.strip()}
    tokenizer = (
        make_tokenizer(options.tokenizer, options.size) if {"masks", "speed"} & {*options.parts} else None
    )
    name = Path(options.tokenizer).name if options.tokenizer else f"generated, {options.size:,} tokens"
    width = -(-len(tokenizer.get_vocab()) // 128) * 128 if tokenizer else 0
    if "valid" in options.parts:
        results["valid"] = measure_valid(options.generations, options.max_tokens)
    if "masks" in options.parts:
        results.setdefault("masks", {})[name] = measure_masks(tokenizer, width)
    if "speed" in options.parts:
        model = make_model(width, options.hidden, options.layers)
        speed = results.setdefault("speed", {}).setdefault(name, {})
        speed |= {
            "hidden": options.hidden,
            "layers": options.layers,
            "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        }
        for batch in options.batches:
            speed[f"batch {batch}"] = measure_speed(
                tokenizer, width, model, batch, options.tokens, options.rounds
            )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
