"""Training: speed, memory and loss against mlx_lm's trainer, and GaLore against AdamW.

    python benchmarks/train_bench.py                  # peer and galore
    python benchmarks/train_bench.py --part peer      # LoRA, against mlx_lm.tuner.trainer.train
    python benchmarks/train_bench.py --part galore    # GaLore against AdamW, both in our loop, all weights
    python benchmarks/train_bench.py --part rates     # choose the learning rates of galore, on other chats

The models are small Qwen3 models with random weights. The data are generated chats of log-normal length
(median 180 tokens, 95th percentile 700, at most 1,024); only the assistant's turn is trained. Each variant
runs in its own process, whose peak resident memory the kernel reports. Results go to
benchmarks/results/train_peer.json and train_galore.json.

The peer has the same model, adapters, optimizer and chats, and takes 8 chats per step. Ours packs the chats
into sequences of 1,024 tokens and takes two of them, which hold 8 chats on average ("packed"), or it takes 8
chats of about the same length, at once ("buckets") or as four micro-batches of two ("buckets of 2"). Speed
and memory are measured with a vocabulary of 100,352 and few steps; the loss with a vocabulary of 2,048, more
steps and several seeds, because the peer's steps are slow.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, mean, median
from typing import Any

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 1024
BATCH = 8
# The size of a micro-batch and the number of micro-batches per step of each of our variants; two packed
# sequences of MAX_LENGTH tokens hold as many tokens as BATCH chats.
VARIANTS = {"packed": (2, 1), "buckets": (BATCH, 1), "buckets of 2": (2, BATCH // 2)}
LORA = {"rank": 8, "alpha": 16.0}
SPEED = {
    "columns": 100_352,
    "dim": 128,
    "layers": 4,
    "chats": 24,
    "epochs": 1,
    "held_out": 24,
    "rate": 3e-3,
    "seed": 0,
}
LOSS = {"columns": 2048, "dim": 64, "layers": 2, "chats": 64, "epochs": 4, "held_out": 64, "rate": 3e-3}
# GaLore's rank is a quarter of the hidden size, its scale the published one; AdamW trains all other weights.
NOT_PROJECTED = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]
MEMORY = {
    "columns": 1024,
    "dim": 768,
    "layers": 24,
    "chats": 8,
    "longest": 64,
    "steps": 2,
    "gap": 200,
    "seed": 0,
}
LEARN = {
    "columns": 1024,
    "dim": 128,
    "layers": 2,
    "chats": 2400,
    "steps": 300,
    "gap": 50,
    "held_out": 512,
    "of": 1000,
}
# The best of equally many candidates, by --part rates, with a seed and chats that are used for nothing else.
RATES = {"adamw": 4e-3, "galore": 1e-2}
CANDIDATES = {"adamw": (3e-3, 4e-3, 4.5e-3, 5.2e-3, 6e-3), "galore": (6e-3, 8e-3, 1e-2, 1.2e-2, 1.5e-2)}


# ---- model and data


def make_model(columns: int, dim: int, layers: int, seed: int = 0) -> Any:
    """A Qwen3 model with random weights and a tied head."""
    import mlx.core as mx
    from mlx_lm.models.qwen3 import Model, ModelArgs

    mx.random.seed(seed)
    heads = max(dim // 32, 2)
    model = Model(
        ModelArgs(
            model_type="qwen3",
            hidden_size=dim,
            num_hidden_layers=layers,
            intermediate_size=3 * dim,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 2, 1),
            head_dim=32,
            rms_norm_eps=1e-6,
            vocab_size=columns,
            max_position_embeddings=4096,
            rope_theta=1e6,
            tie_word_embeddings=True,
        )
    )
    mx.eval(model.parameters())
    return model


def make_chats(count: int, columns: int, seed: int) -> list[dict[str, Any]]:
    """Chats as text of token ids: a prompt of random words, an answer from a Markov chain over 256 words.

    The answer is a fifth to a half of the chat. Four tokens belong to the template.
    """
    import numpy as np

    shared, own = np.random.default_rng(7), np.random.default_rng([seed, 1])
    words = shared.choice(np.arange(8, columns), 256, replace=False)
    successors = shared.integers(0, 256, (256, 3))
    normal = NormalDist(math.log(180), math.log(700 / 180) / 1.6449)
    lengths = [
        min(max(int(math.exp(normal.inv_cdf((i + 0.5) / count))), 24), MAX_LENGTH) for i in range(count)
    ]
    chats = []
    for length in own.permutation(lengths).tolist():
        answer = int(length * own.uniform(0.2, 0.5))
        prompt = words[own.zipf(1.3, length - answer - 4) % 256]
        state, text = int(own.integers(256)), []
        for _ in range(answer):
            text.append(int(words[state]))
            state = int(successors[state, own.choice(3, p=(0.8, 0.15, 0.05))])
        turns = (("user", prompt.tolist()), ("assistant", text))
        chats.append({"messages": [{"role": role, "content": " ".join(map(str, t))} for role, t in turns]})
    return chats


class IdTokenizer:
    """A tokenizer of these chats, with the method that ``ChatDataset`` needs."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False, **_: Any
    ) -> list[int]:
        tokens = []
        for message in messages:
            start, end = (1, 2) if message["role"] == "user" else (3, 4)
            tokens += [start, *map(int, message["content"].split()), end]
        return [*tokens, 3] if add_generation_prompt else tokens


def tokenize(chats: Sequence[dict[str, Any]]) -> list[Any]:
    import numpy as np

    from mlx_distill.data.chat import TokenizedRow

    out = []
    for chat in chats:
        tokens = IdTokenizer().apply_chat_template(chat["messages"])
        start = len(IdTokenizer().apply_chat_template(chat["messages"][:-1], add_generation_prompt=True))
        out.append(TokenizedRow(np.array(tokens, np.int32), np.arange(1, len(tokens)) >= start))
    return out


def held_out_loss(model: Any, chats: Sequence[dict[str, Any]]) -> float:
    """Loss per trained token in nats on other chats, by the same code for ours and the peer."""
    from mlx_distill.data.packing import build_batch
    from mlx_distill.train.objective import sft
    from mlx_distill.train.validation import evaluate

    rows = tokenize(chats)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    groups = [order[i : i + 4] for i in range(0, len(order), 4)]
    batches = [build_batch([[rows[i]] for i in group], 0, 16, group) for group in groups]
    return evaluate(model, batches, sft())["loss"]


# ---- training


def train_ours(
    variant: str, model: Any, chats: Sequence[dict[str, Any]], optimizer: Any, folder: Path, **settings: Any
) -> list[dict]:
    """Train with our loop on packed sequences or length buckets; return the logged row of each step."""
    from mlx_distill.data.packing import build_batch, plan_sequences
    from mlx_distill.recipe import TrainConfig
    from mlx_distill.train import RowBatches, sft, train

    rows, seed = tokenize(chats), settings.get("seed", 0)
    plan = plan_sequences([len(row.tokens) for row in rows], MAX_LENGTH, seed, variant == "packed")

    def collate(indices: Sequence[int]) -> Any:
        sequences = plan.rows_of(indices)
        ids = [i for sequence in sequences for i in sequence]
        return build_batch([[rows[i] for i in sequence] for sequence in sequences], 0, plan.multiple, ids)

    size, accumulate = VARIANTS[variant]
    weights = plan.sum_rows([int(row.trained.sum()) for row in rows])
    source = RowBatches(plan.lengths, collate, size, seed, weights=weights)
    defaults = {
        "accumulate": accumulate,
        "clip_norm": 0.0,
        "evaluate_every": 0,
        "checkpoint_every": 10**9,
        "checkpoint_minutes": 0,
    }
    logged: list[dict] = []
    config = TrainConfig(**{**defaults, **settings})
    train(model, source, sft(), optimizer, config, folder=folder, hooks=[logged.append])
    return logged


def train_theirs(
    model: Any, chats: Sequence[dict[str, Any]], optimizer: Any, steps: int, folder: Path, seed: int
) -> list[dict]:
    """Train with mlx_lm's trainer, data sets and batches; return what it reports for each step."""
    import numpy as np
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train

    logged: list[dict] = []

    class Log(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            logged.append({"loss": info["train_loss"], "tokens_per_second": info["tokens_per_second"]})

    np.random.seed(seed)
    data = CacheDataset(ChatDataset(list(chats), IdTokenizer(), mask_prompt=True))
    args = TrainingArgs(
        batch_size=BATCH,
        iters=steps,
        steps_per_report=1,
        steps_per_save=10**9,
        max_seq_length=MAX_LENGTH + 1,
        adapter_file=str(folder / "adapters.safetensors"),
    )
    train(model, optimizer, data, None, args, training_callback=Log())
    return logged


def child_peer(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """One LoRA training, by our loop or mlx_lm's trainer, with the same model, adapters and optimizer."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from mlx_distill.models.adapters import LoraSettings, add_lora
    from mlx_distill.recipe import ATTENTION, MLP

    columns, epochs, seed = options["columns"], options["epochs"], options["seed"]
    chats, held = make_chats(options["chats"], columns, seed), make_chats(options["held_out"], columns, 1000)
    model = make_model(columns, options["dim"], options["layers"])
    add_lora(model, LoraSettings(LORA["rank"], LORA["alpha"], 0.0, ATTENTION + MLP))
    optimizer = optim.AdamW(options["rate"], bias_correction=True)
    before = held_out_loss(model, held)
    mx.clear_cache()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if variant == "mlx_lm":
            steps = epochs * options["chats"] // BATCH
            logged = train_theirs(model, chats, optimizer, steps, Path(folder), seed)
        else:
            settings = {"seed": seed, "epochs": float(epochs)}
            logged = train_ours(variant, model, chats, optimizer, Path(folder), **settings)
        seconds = time.perf_counter() - start
    rows = tokenize(chats)
    trained = epochs * sum(int(row.trained.sum()) for row in rows)
    tokens = epochs * sum(len(row.tokens) for row in rows)
    return {
        "seconds": seconds,
        "steps": len(logged),
        "trained_tokens": trained,
        "trained_tokens_per_second": trained / seconds,
        "tokens_per_second": tokens / seconds,
        "own_tokens_per_second": median(row["tokens_per_second"] for row in logged),
        "peak_mlx": mx.get_peak_memory(),
        "weights": weight_bytes(model),
        "loss_before": before,
        "loss": held_out_loss(model, held),
    }


def child_memory(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """A few steps of a wider model on short chats, with gradient checkpointing: memory above the weights."""
    import mlx.core as mx

    from mlx_distill.optim import state_bytes

    settings = {
        **train_settings(variant, options),
        "clip_norm": 0.0,
        "grad_checkpoint": True,
        "stream_gradients": variant == "adamw streamed",
    }
    model, optimizer, refreshes = prepare(settings, options)
    base = mx.get_active_memory()
    with tempfile.TemporaryDirectory() as folder:
        chats = shorten(make_chats(options["chats"], options["columns"], 0), options["longest"])
        logged = train_ours("buckets", model, chats, optimizer, Path(folder), **settings)
    peak = mx.get_peak_memory() - base
    return {
        "weights": weight_bytes(model),
        "state": state_bytes(optimizer),
        "peak_above_weights": peak,
        "state_of_projected": state_bytes(optimizer, lambda path, _: "_proj." in path),
        "step_seconds": median(b["seconds"] - a["seconds"] for a, b in pairwise(logged)),
        "refresh_seconds": refreshes["seconds"],
        "refreshes": refreshes["count"],
    }


def child_learn(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """300 steps on chats of at most 256 tokens; the loss on other chats."""
    settings = {**train_settings(variant, options), "clip_norm": 1.0}
    model, optimizer, refreshes = prepare(settings, options)
    columns = options["columns"]
    chats = shorten(make_chats(options["chats"], columns, options["seed"]), 256)
    held = shorten(make_chats(options["held_out"], columns, options["of"]), 256)
    with tempfile.TemporaryDirectory() as folder:
        logged = train_ours("buckets", model, chats, optimizer, Path(folder), **settings)
    seconds = logged[-1]["seconds"]
    return {
        "loss": held_out_loss(model, held),
        "seconds": seconds,
        "refresh_share": refreshes["seconds"] / seconds,
    }


def train_settings(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training of all weights with AdamW or GaLore."""
    name = variant.split()[0]
    shared = {
        "learning_rate": options.get("rate", RATES[name]),
        "warmup": 0.05,
        "steps": options["steps"],
        "seed": options["seed"],
    }
    if name == "adamw":
        return {**shared, "method": "full"}
    rank, gap = options["dim"] // 4, options["gap"]
    return {
        **shared,
        "method": "galore",
        "galore_rank": rank,
        "galore_update_gap": gap,
        "modules_to_save": NOT_PROJECTED,
    }


def prepare(settings: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """A new model, its optimizer, and a counter of the refreshes of GaLore's bases and their seconds."""
    import mlx.core as mx

    from mlx_distill.optim import make_optimizer
    from mlx_distill.recipe import TrainConfig
    from mlx_distill.train import make_trainable

    config = TrainConfig(**settings)
    model = make_model(options["columns"], options["dim"], options["layers"], options["seed"])
    make_trainable(model, config)
    optimizer, refreshes = make_optimizer(config, options["steps"]), {"seconds": 0.0, "count": 0.0}
    refresh = getattr(optimizer, "_refresh", None)

    def timed(path: str, gradient: Any, state: dict, **arguments: Any) -> None:
        mx.eval(gradient, state)
        start = time.perf_counter()
        refresh(path, gradient, state, **arguments)
        mx.eval(state)
        refreshes["seconds"] += time.perf_counter() - start
        refreshes["count"] += 1

    if refresh is not None:
        optimizer._refresh = timed
    return model, optimizer, refreshes


def shorten(chats: Sequence[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Chats with a quarter of each prompt and half of each answer, below ``max_length`` tokens."""
    out = []
    for chat in chats:
        (_, prompt), (_, answer) = ((m["role"], m["content"].split()) for m in chat["messages"])
        prompt = prompt[: min(max(len(prompt) // 4, 4), max_length // 3)]
        answer = answer[: min(max(len(answer) // 2, 4), max_length // 2)]
        turns = (("user", prompt), ("assistant", answer))
        out.append({"messages": [{"role": role, "content": " ".join(words)} for role, words in turns]})
    return out


def weight_bytes(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


CHILDREN = {"peer": child_peer, "memory": child_memory, "learn": child_learn}


# ---- measuring


def measure(child: str, variant: str, options: dict[str, Any], threads: int = 0) -> dict[str, Any]:
    """Run one training in a process; return its results, peak resident bytes and CPU seconds.

    ``threads`` is the number of BLAS threads; 0 for the default.
    """
    command = [
        sys.executable,
        __file__,
        "--child",
        child,
        "--variant",
        variant,
        "--options",
        json.dumps(options),
    ]
    environment = {**os.environ, **({"OPENBLAS_NUM_THREADS": str(threads)} if threads else {})}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{child} {variant} failed ({status}):\n{errors[-3000:]}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        **json.loads(out.splitlines()[-1]),
        "peak_rss": usage.ru_maxrss * kilobyte,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def print_run(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Print the main results of a run, and return it."""
    keys = ("loss", "trained_tokens_per_second", "peak_mlx", "peak_rss", "peak_above_weights", "seconds")
    print(f"{name:28}", "  ".join(f"{k} {v:.4g}" for k, v in run.items() if k in keys), flush=True)
    return run


def measure_losses(child: str, runs: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run trainings for their loss only: two at a time, with one BLAS thread each."""

    def measure_one(run: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        variant, options = run
        return print_run(f"loss {variant} {options['seed']}", measure(child, variant, options, threads=1))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(measure_one, runs))


def part_peer(options: argparse.Namespace) -> dict[str, Any]:
    variants = (*VARIANTS, "mlx_lm")
    speed = {name: print_run(f"speed {name}", measure("peer", name, SPEED)) for name in variants}
    # The slow trainings first.
    runs = [(name, {**LOSS, "seed": seed}) for name in reversed(variants) for seed in range(options.seeds)]
    loss: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for (name, _), run in zip(runs, measure_losses("peer", runs), strict=True):
        loss[name].append(run)
    ratios: dict[str, Any] = {}
    for name in VARIANTS:
        for key in ("trained_tokens_per_second", "peak_mlx", "peak_rss"):
            ratios[f"{key} {name}"] = speed[name][key] / speed["mlx_lm"][key]
        losses = zip(loss[name], loss["mlx_lm"], strict=True)
        each = [ours["loss"] / theirs["loss"] for ours, theirs in losses]
        ratios |= {
            f"loss {name}": mean(each),
            f"loss {name}, least": min(each),
            f"loss {name}, most": max(each),
        }
    return {
        "settings": {"speed": SPEED, "loss": LOSS, "lora": LORA, "ways": VARIANTS},
        "speed": speed,
        "loss": loss,
        "of_mlx_lm": ratios,
    }


def part_galore(options: argparse.Namespace) -> dict[str, Any]:
    memory = {
        name: print_run(f"memory {name}", measure("memory", name, MEMORY))
        for name in ("adamw", "adamw streamed", "galore")
    }
    ratios = {
        key: memory["galore"][key] / memory["adamw"][key]
        for key in ("state", "state_of_projected", "peak_above_weights")
    }
    ratios["peak_above_weights of streamed"] = (
        memory["galore"]["peak_above_weights"] / memory["adamw streamed"]["peak_above_weights"]
    )
    seeds = range(options.seeds)
    pairs = [(name, {**LEARN, "seed": seed}) for seed in seeds for name in ("adamw", "galore")]
    runs = measure_losses("learn", pairs)
    learn = {"adamw": runs[::2], "galore": runs[1::2]}
    for seed in seeds:
        ratios[f"loss, seed {seed}"] = learn["galore"][seed]["loss"] / learn["adamw"][seed]["loss"]
    ratios["loss"] = mean(run["loss"] for run in learn["galore"]) / mean(
        run["loss"] for run in learn["adamw"]
    )
    # Each basis is refreshed once per gap; the first step of the run computed every basis once.
    run = memory["galore"]
    ratios["refresh share, width 768"] = run["refresh_seconds"] / (MEMORY["gap"] * run["step_seconds"])
    ratios["refresh share, width 128"] = mean(r["refresh_share"] for r in learn["galore"])
    return {
        "settings": {"memory": MEMORY, "learn": LEARN, "rates": RATES},
        "memory": memory,
        "learn": learn,
        "of_adamw": ratios,
    }


def part_rates(options: argparse.Namespace) -> dict[str, Any]:
    """The loss at each candidate learning rate, from which RATES were chosen."""
    runs = [
        (name, {**LEARN, "seed": 10, "of": 2000, "rate": rate})
        for name, rates in CANDIDATES.items()
        for rate in rates
    ]
    losses = {
        f"loss {name} {run['rate']:g}": result["loss"]
        for (name, run), result in zip(runs, measure_losses("learn", runs), strict=True)
    }
    return {"settings": LEARN, "of_adamw": losses}


PARTS = {"peer": part_peer, "galore": part_galore, "rates": part_rates}


def main() -> None:
    from mlx_distill.runtime import load_blas, machine, versions

    load_blas()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), help="default: peer and galore")
    parser.add_argument(
        "--seeds", type=int, default=4, help="number of trainings of each variant whose losses are compared"
    )
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(CHILDREN[options.child](options.variant, options.options)))
        return
    for name in [options.part] if options.part else ["peer", "galore"]:
        start = time.perf_counter()
        out = PARTS[name](options)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        out |= {
            "seconds": time.perf_counter() - start,
            "machine": machine(),
            "versions": versions(),
            "commit": commit,
        }
        out["blas_threads"] = os.environ.get("OPENBLAS_NUM_THREADS", "all")
        for key, value in out["of_mlx_lm" if name == "peer" else "of_adamw"].items():
            print(f"{key:40} {value:.3f}")
        path = ROOT / "benchmarks" / "results" / f"train_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
