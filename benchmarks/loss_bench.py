"""Memory and time of the losses over the vocabularies of Qwen3 and gpt-oss, against the dense form.

    OPENBLAS_NUM_THREADS=1 python benchmarks/loss_bench.py            # five minutes on one quiet core
    OPENBLAS_NUM_THREADS=1 python benchmarks/loss_bench.py --quick    # one round, few columns: values only

The forms are taken in turn, in float32 and with the same data; a ratio is that of the medians over the
rounds. On a CPU the time is that of the process, user and system: other work on the machine then counts less.
Memory is the allocator's peak above what was there before: weights and inputs are not in it. Values and
gradients of the forms are compared. Exits with 1 where a target fails. Results go to
benchmarks/results/loss.json.

    head      forward KL of two heads of width 128 at 1,024 positions, T = 2, gradient by the hidden state
    cached    forward KL from the top 32 of a cache, against the dense form of ``head``
    learning  at 256 positions through a head that trains, with the gradient by its weight too
    step      gradients of a LoRA step: 4 layers of width 128, 512 tokens, forward KL to a teacher's hidden
              states and head; against the dense step as one compiled function. Bytes a token are the peak of
              the step over its tokens; a peer budgets 13 copies of the float32 logits
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import mlx_distill.runtime  # noqa: F401, I001  before mlx: chooses the matrix library
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.losses import forward_kl, linear_divergence, linear_rows, sparse_linear_kl
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.records import Batch, TopK
from mlx_distill.recipe import ATTENTION, MLP
from mlx_distill.train.gradients import window_gradients
from mlx_distill.train.objective import MIN_ROWS, LogitReader, read_objective, trained_tokens
from mlx_distill.train.trunk_head import make_trunk

VOCABULARIES = {"qwen3": 151_936, "gpt_oss": 201_088}
POSITIONS, LEARNING_POSITIONS, STEP_TOKENS = 1024, 256, 512
WIDTH, TOP_K, TEMPERATURE = 128, 32, 2.0
PEER_COPIES = 13
# At most so much of the dense form's peak and time.
TARGETS: dict[str, dict[str, float]] = {
    "head": {"peak": 1 / 100, "time": 0.35},
    "cached": {"peak": 1 / 200, "time": 0.3},
    "learning": {},
    "step": {"peak": 1 / 32, "time": 0.65},
}
TOLERANCE = 2e-4  # of the largest gradient; the dense form has errors of 4e-5 of its own
# A form: computes and evaluates; its results, the gradients last.
Form = Callable[[], list[mx.array]]


def normal(*shape: int, seed: int, scale: float = 1.0) -> mx.array:
    """Normal numbers."""
    out = mx.random.normal(shape, key=mx.random.key(seed)) * scale
    mx.eval(out)
    return out


def differentiated(loss: Callable[..., mx.array], *inputs: mx.array) -> Form:
    """The sum of a loss and its gradients by the inputs."""

    def run() -> list[mx.array]:
        value, gradients = mx.value_and_grad(lambda *x: loss(*x).sum(), argnums=tuple(range(len(inputs))))(
            *inputs
        )
        out = [value, *gradients]
        mx.eval(out)
        return out

    return run


def head_forms(columns: int) -> dict[str, Form]:
    """The dense form, the tiled one, and that from a cache, through a frozen head."""
    student, teacher = (normal(POSITIONS, WIDTH, seed=i) for i in (1, 2))
    ours, theirs = (normal(columns, WIDTH, seed=i, scale=0.2) for i in (3, 4))
    targets = top_k(teacher, theirs)
    return {
        "dense": differentiated(
            lambda h: forward_kl(h @ ours.T, teacher @ theirs.T, temperature=TEMPERATURE), student
        ),
        "head": differentiated(
            lambda h: linear_divergence(h, ours, teacher, theirs, temperature=TEMPERATURE), student
        ),
        "cached": differentiated(lambda h: sparse_linear_kl(h, ours, targets), student),
    }


def learning_forms(columns: int) -> dict[str, Form]:
    """A head that trains, dense and some rows at a time."""
    student, teacher = (normal(LEARNING_POSITIONS, WIDTH, seed=i) for i in (1, 2))
    ours, theirs = (normal(columns, WIDTH, seed=i, scale=0.2) for i in (3, 4))
    head = nn.Linear(WIDTH, columns, bias=False)

    def dense(h: mx.array, w: mx.array) -> mx.array:
        return forward_kl(h @ w.T, teacher @ theirs.T, temperature=TEMPERATURE)

    def rows(h: mx.array, w: mx.array) -> mx.array:
        head.weight = w
        return linear_rows(
            lambda z, at: forward_kl(z, teacher[at] @ theirs.T, temperature=TEMPERATURE),
            h,
            head,
            rows=MIN_ROWS,
        )

    return {
        "dense": differentiated(dense, student, ours),
        "learning": differentiated(rows, student, ours),
    }


def top_k(hidden: mx.array, head: mx.array) -> TopK:
    """What a cache has of the distributions."""
    ids, logs = [], []
    for start in range(0, hidden.shape[0], 64):
        z = hidden[start : start + 64] @ head.T
        best = mx.argpartition(-z, kth=TOP_K - 1, axis=-1)[:, :TOP_K]
        ids.append(best.astype(mx.int32))
        logs.append(mx.take_along_axis(z, best, -1) - mx.logsumexp(z, -1, keepdims=True))
        mx.eval(ids[-1], logs[-1])
    out = TopK(mx.concatenate(ids), mx.concatenate(logs))
    mx.eval(out.ids, out.logprobs)
    return out


def make_student(columns: int) -> nn.Module:
    """A small Llama with LoRA and a frozen head of its own."""
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=WIDTH,
            num_hidden_layers=4,
            intermediate_size=3 * WIDTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rms_norm_eps=1e-6,
            vocab_size=columns,
            tie_word_embeddings=False,
        )
    )
    model.freeze()
    add_lora(model, LoraSettings(8, 16.0, 0.0, ATTENTION + MLP))
    mx.eval(model.parameters())
    return model


def step_forms(columns: int) -> dict[str, Form]:
    """The gradients of one LoRA step, dense and compiled as a whole, and as the library trains."""
    model, teacher = make_student(columns), normal(STEP_TOKENS, WIDTH, seed=5)
    theirs = normal(columns, WIDTH, seed=6, scale=0.2)
    tokens = np.random.default_rng(0).integers(0, columns, STEP_TOKENS + 1).astype(np.int32)
    batch = Batch(mx.array(tokens[None, :-1]), mx.array(tokens[None, 1:]), mx.ones((1, STEP_TOKENS)))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    own = dict(tree_flatten(model.trainable_parameters()))

    def loss(parameters: list[mx.array], inputs: mx.array) -> mx.array:
        model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        z = model(inputs).reshape(-1, columns)
        return forward_kl(z, teacher @ theirs.T, temperature=TEMPERATURE).mean()

    compiled = mx.compile(mx.value_and_grad(loss))

    def dense() -> list[mx.array]:
        value, gradients = compiled([own[name] for name in names], batch.inputs)
        model.update(tree_unflatten(list(own.items())))
        mx.eval(value, gradients)
        return [value, *gradients]

    def read(reader: LogitReader, batch: Batch) -> dict[str, mx.array]:
        assert reader.tiled_head is not None
        value = linear_divergence(reader.hidden, reader.tiled_head, teacher, theirs, temperature=TEMPERATURE)
        return {"token": value.sum()}

    every = mx.arange(STEP_TOKENS)
    objective = read_objective(
        lambda b: {"token": trained_tokens(b)}, lambda _: every, read, {"token": 1.0}, dense_limit=0
    )
    trunk = make_trunk(model, compiled=True)

    def tiled() -> list[mx.array]:
        found = window_gradients(model, [batch], objective, trunk=trunk)
        out = [mx.array(found.loss), *(found.gradients[name] for name in names)]
        mx.eval(out)
        return out

    return {"dense": dense, "step": tiled}


def measured(forms: Mapping[str, Form], rounds: int) -> dict[str, dict[str, Any]]:
    """For each form but the first, which is the dense one: peak and time of both, their ratios, and how far
    the results are apart.

    Args:
        forms: Run in turn.
        rounds: How often, after one run to compile what is compiled.
    """
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks, differences = dict.fromkeys(forms, 0), {}
    for number in range(-1, rounds):
        expected: list[mx.array] = []
        for name, form in forms.items():
            if number < 0 and "step" not in forms:
                continue
            mx.clear_cache()
            base = mx.get_active_memory()
            mx.reset_peak_memory()
            start = clock()
            found = form()
            elapsed = clock() - start
            if number >= 0:
                seconds[name].append(round(elapsed, 3))
            peaks[name] = max(peaks[name], mx.get_peak_memory() - base)
            differences[name] = _difference(expected or found, found)
            expected = expected or found
            del found
    dense, *others = forms
    return {
        name: {
            "peak": peaks[name] / peaks[dense],
            "time": median(seconds[name]) / median(seconds[dense]),
            **({} if name == "cached" else {"difference": differences[name]}),  # of another loss
            "peak_bytes": peaks[name],
            "dense_peak_bytes": peaks[dense],
            "seconds": seconds[name],
            "dense_seconds": seconds[dense],
        }
        for name in others
    }


def _difference(expected: list[mx.array], found: list[mx.array]) -> float:
    """The largest one, as a share of the largest number of its array."""
    pairs = zip(expected, found, strict=True)
    return max(float(mx.abs(a - b).max() / mx.maximum(mx.abs(a).max(), 1e-12)) for a, b in pairs)


def bench(columns: int, rounds: int) -> dict[str, dict[str, Any]]:
    """All comparisons at one vocabulary."""
    out: dict[str, dict[str, Any]] = {}
    for forms in (head_forms, learning_forms, step_forms):
        out |= measured(forms(columns), rounds)
        mx.clear_cache()
    step = out["step"]
    step["bytes_a_token"] = round(step["peak_bytes"] / STEP_TOKENS)
    step["dense_bytes_a_token"] = round(step["dense_peak_bytes"] / STEP_TOKENS)
    step["peer_bytes_a_token"] = PEER_COPIES * 4 * columns
    return out


def failures(
    results: Mapping[str, Mapping[str, Any]], targets: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The targets that fail, and results that differ."""
    out = []
    for vocabulary, comparisons in results.items():
        for name, found in comparisons.items():
            limits = {**targets.get(name, {}), "difference": TOLERANCE}
            out += [
                f"{vocabulary} {name}: {quantity} {found[quantity]:.4g}, at most {limit:.4g}"
                for quantity, limit in limits.items()
                if quantity in found and found[quantity] > limit
            ]
    return out


def setting(seconds: float, rounds: int) -> dict[str, Any]:
    """Where and how it was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "device": str(mx.default_device()),
        "commit": commit.stdout.strip(),
        "rounds": rounds,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one round at 16,384 columns; nothing is written"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "loss.json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    vocabularies = {"quick": 16_384} if arguments.quick else VOCABULARIES
    rounds = 1 if arguments.quick else arguments.rounds
    results: dict[str, Any] = {}
    for name, columns in vocabularies.items():
        results[name] = bench(columns, rounds)
        for comparison, found in results[name].items():
            figures = {key: f"{value:.3g}" for key, value in found.items() if not isinstance(value, list)}
            print(f"{name} ({columns:,}) {comparison}: {figures}", flush=True)
    failed = failures(results, {} if arguments.quick else TARGETS)
    if not arguments.quick:
        document = {"setting": setting(time.perf_counter() - start, rounds), "targets": TARGETS}
        arguments.out.write_text(
            json.dumps({**document, "failed": failed, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
    for line in failed:
        print(f"target missed: {line}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
