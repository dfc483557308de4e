"""Training: speed, memory and loss beside mlx_lm's own trainer, and GaLore beside AdamW.

    python benchmarks/train_bench.py                  # both parts
    python benchmarks/train_bench.py --part peer      # LoRA, against mlx_lm.tuner.trainer.train
    python benchmarks/train_bench.py --part galore    # GaLore against AdamW, both in our loop, every weight moving
    python benchmarks/train_bench.py --part rates     # the learning rates of that part, on chats of their own

Models are small, random and made here: Qwen3's trunk. The data are generated chats whose lengths are
log-normal (median 180 tokens, 95th percentile 700, cut at 1,024), the assistant's part trained only. Each way
runs in a process of its own, whose peak resident memory the kernel tells. Results go to
benchmarks/results/train_peer.json and train_galore.json.

Against the peer: the same model, adapters, optimizer and chats. It takes 8 chats a step; ours packs them into
lines of 1,024 tokens and takes two, which hold as many on average ("packed"), or takes 8, on average, of
about one length: at once ("buckets") or as four micro-batches of two ("buckets of 2"). Speed and memory are
measured with 100,352 columns, a few steps; the loss with 2,048 columns, more steps and several seeds, because
the peer's steps are slow.
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
LONGEST = 1024
BATCH = 8
# What our ways take as a micro-batch, and how many of these a step: two lines of LONGEST tokens hold as much
# as BATCH chats.
WAYS = {"packed": (2, 1), "buckets": (BATCH, 1), "buckets of 2": (2, BATCH // 2)}
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
# GaLore's rank is a quarter of the width, its scale the published one, and all that it does not project moves
# by plain AdamW.
WHOLE = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]
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
# The best of equally many, by --part rates: on a seed and on chats that nothing else is reported of.
RATES = {"adamw": 4e-3, "galore": 1e-2}
TRIED = {"adamw": (3e-3, 4e-3, 4.5e-3, 5.2e-3, 6e-3), "galore": (6e-3, 8e-3, 1e-2, 1.2e-2, 1.5e-2)}


# ---- what is trained, and on what


def make_model(columns: int, dim: int, layers: int, seed: int = 0) -> Any:
    """A Qwen3 with random weights and a tied head."""
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
    """Chats whose text is numbers of tokens: a prompt of random words, an answer that follows a chain of 256
    words.

    An answer takes a fifth to a half of its chat. Four tokens are the template's.
    """
    import numpy as np

    world, own = np.random.default_rng(7), np.random.default_rng([seed, 1])
    words = world.choice(np.arange(8, columns), 256, replace=False)
    after = world.integers(0, 256, (256, 3))
    normal = NormalDist(math.log(180), math.log(700 / 180) / 1.6449)
    lengths = [min(max(int(math.exp(normal.inv_cdf((i + 0.5) / count))), 24), LONGEST) for i in range(count)]
    chats = []
    for length in own.permutation(lengths).tolist():
        answer = int(length * own.uniform(0.2, 0.5))
        prompt = words[own.zipf(1.3, length - answer - 4) % 256]
        place, text = int(own.integers(256)), []
        for _ in range(answer):
            text.append(int(words[place]))
            place = int(after[place, own.choice(3, p=(0.8, 0.15, 0.05))])
        said = (("user", prompt.tolist()), ("assistant", text))
        chats.append({"messages": [{"role": role, "content": " ".join(map(str, t))} for role, t in said]})
    return chats


class Words:
    """A tokenizer for such chats: as much of one as ``ChatDataset`` asks for."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False, **_: Any
    ) -> list[int]:
        tokens = []
        for message in messages:
            start, end = (1, 2) if message["role"] == "user" else (3, 4)
            tokens += [start, *map(int, message["content"].split()), end]
        return [*tokens, 3] if add_generation_prompt else tokens


def pieces(chats: Sequence[dict[str, Any]]) -> list[Any]:
    import numpy as np

    from mlx_distill.data.chat import TokenizedRow

    out = []
    for chat in chats:
        tokens = Words().apply_chat_template(chat["messages"])
        begin = len(Words().apply_chat_template(chat["messages"][:-1], add_generation_prompt=True))
        out.append(TokenizedRow(np.array(tokens, np.int32), np.arange(1, len(tokens)) >= begin))
    return out


def batch_of(rows: Sequence[Any], chosen: Sequence[int]) -> Any:
    from mlx_distill.data.packing import build_batch

    return build_batch([[rows[i]] for i in chosen], 0, 16, chosen)


def held_out_loss(model: Any, chats: Sequence[dict[str, Any]]) -> float:
    """Nats a trained token on chats that no one has seen, computed by the same code for both."""
    from mlx_distill.train.objective import sft
    from mlx_distill.train.validation import evaluate

    rows = pieces(chats)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    return evaluate(model, [batch_of(rows, order[i : i + 4]) for i in range(0, len(order), 4)], sft())["loss"]


# ---- the ways to train


def train_ours(
    way: str, model: Any, chats: Sequence[dict[str, Any]], optimizer: Any, folder: Path, **settings: Any
) -> list[dict]:
    """Our loop over packed lines or length buckets; the rows of metrics."""
    from mlx_distill.data.packing import build_batch, plan_sequences
    from mlx_distill.recipe import TrainConfig
    from mlx_distill.train import RowBatches, sft, train

    rows, seed = pieces(chats), settings.get("seed", 0)
    lines = plan_sequences([len(row.tokens) for row in rows], LONGEST, seed, way == "packed")

    def collate(chosen: Sequence[int]) -> Any:
        some = lines.rows_of(chosen)
        return build_batch(
            [[rows[i] for i in line] for line in some], 0, lines.multiple, [i for line in some for i in line]
        )

    size, accumulate = WAYS[way]
    source = RowBatches(
        lines.lengths, collate, size, seed, weights=lines.sum_rows([int(row.trained.sum()) for row in rows])
    )
    config = TrainConfig(
        **{
            "accumulate": accumulate,
            "clip_norm": 0.0,
            "evaluate_every": 0,
            "checkpoint_every": 10**9,
            **settings,
        }
    )
    seen: list[dict] = []
    train(model, source, sft(), optimizer, config, folder=folder, hooks=[seen.append])
    return seen


def train_theirs(
    model: Any, chats: Sequence[dict[str, Any]], optimizer: Any, steps: int, folder: Path, seed: int
) -> list[dict]:
    """mlx_lm's trainer with its own data sets and batches; what it reports a step."""
    import numpy as np
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train

    seen: list[dict] = []

    class Watch(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            seen.append({"loss": info["train_loss"], "tokens_per_second": info["tokens_per_second"]})

    np.random.seed(seed)
    data = CacheDataset(ChatDataset(list(chats), Words(), mask_prompt=True))
    args = TrainingArgs(
        batch_size=BATCH,
        iters=steps,
        steps_per_report=1,
        steps_per_save=10**9,
        max_seq_length=LONGEST + 1,
        adapter_file=str(folder / "adapters.safetensors"),
    )
    train(model, optimizer, data, None, args, training_callback=Watch())
    return seen


def child_peer(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """One LoRA training: the same model, adapters and optimizer whoever trains."""
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
        began = time.perf_counter()
        if way == "mlx_lm":
            seen = train_theirs(
                model, chats, optimizer, epochs * options["chats"] // BATCH, Path(folder), seed
            )
        else:
            seen = train_ours(way, model, chats, optimizer, Path(folder), seed=seed, epochs=float(epochs))
        seconds = time.perf_counter() - began
    rows = pieces(chats)
    trained, tokens = (
        epochs * sum(int(row.trained.sum()) for row in rows),
        epochs * sum(len(row.tokens) for row in rows),
    )
    return {
        "seconds": seconds,
        "steps": len(seen),
        "trained_tokens": trained,
        "trained_tokens_per_second": trained / seconds,
        "tokens_per_second": tokens / seconds,
        "own_tokens_per_second": median(row["tokens_per_second"] for row in seen),
        "peak_mlx": mx.get_peak_memory(),
        "weights": weight_bytes(model),
        "loss_before": before,
        "loss": held_out_loss(model, held),
    }


def child_memory(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """A few steps of a wider model on short chats: what lies above the weights. Activations are recomputed in
    all ways.
    """
    import mlx.core as mx

    from mlx_distill.optim import state_bytes

    settings = {
        **training(way, options),
        "clip_norm": 0.0,
        "grad_checkpoint": True,
        "stream_gradients": way == "adamw streamed",
    }
    model, optimizer, watch = made(settings, options)
    base = mx.get_active_memory()
    with tempfile.TemporaryDirectory() as folder:
        chats = shorter(make_chats(options["chats"], options["columns"], 0), options["longest"])
        seen = train_ours("buckets", model, chats, optimizer, Path(folder), **settings)
    times = [b["seconds"] - a["seconds"] for a, b in pairwise(seen)]
    found = {
        "weights": weight_bytes(model),
        "state": state_bytes(optimizer),
        "peak_above_weights": mx.get_peak_memory() - base,
    }
    found["state_of_projected"] = state_bytes(optimizer, lambda path, _: "_proj." in path)
    return {
        **found,
        "step_seconds": median(times),
        "refresh_seconds": watch["seconds"],
        "refreshes": watch["count"],
    }


def child_learn(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """300 steps on chats of up to 256 tokens; the loss on chats that no one has seen."""
    settings = {**training(way, options), "clip_norm": 1.0}
    model, optimizer, watch = made(settings, options)
    columns = options["columns"]
    chats = shorter(make_chats(options["chats"], columns, options["seed"]), 256)
    held = shorter(make_chats(options["held_out"], columns, options["of"]), 256)
    with tempfile.TemporaryDirectory() as folder:
        seen = train_ours("buckets", model, chats, optimizer, Path(folder), **settings)
    seconds = seen[-1]["seconds"]
    return {
        "loss": held_out_loss(model, held),
        "seconds": seconds,
        "refresh_share": watch["seconds"] / seconds,
    }


def training(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training in which every weight moves."""
    name = way.split()[0]
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
        "modules_to_save": WHOLE,
    }


def made(settings: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """A fresh model, what trains it, and the time that refreshing its bases takes."""
    import mlx.core as mx

    from mlx_distill.optim import make_optimizer
    from mlx_distill.recipe import TrainConfig
    from mlx_distill.train import make_trainable

    config = TrainConfig(**settings)
    model = make_model(options["columns"], options["dim"], options["layers"], options["seed"])
    make_trainable(model, config)
    optimizer, watch = make_optimizer(config, options["steps"]), {"seconds": 0.0, "count": 0.0}
    refresh = getattr(optimizer, "_refresh", None)

    def timed(path: str, gradient: Any, state: dict) -> None:
        mx.eval(gradient, state)
        began = time.perf_counter()
        refresh(path, gradient, state)
        mx.eval(state)
        watch["seconds"] += time.perf_counter() - began
        watch["count"] += 1

    if refresh is not None:
        optimizer._refresh = timed
    return model, optimizer, watch


def shorter(chats: Sequence[dict[str, Any]], longest: int) -> list[dict[str, Any]]:
    """The chats with prompts of a quarter and answers of half their words, none above ``longest`` tokens."""
    out = []
    for chat in chats:
        (_, prompt), (_, answer) = ((m["role"], m["content"].split()) for m in chat["messages"])
        prompt, answer = (
            prompt[: min(max(len(prompt) // 4, 4), longest // 3)],
            answer[: min(max(len(answer) // 2, 4), longest // 2)],
        )
        said = (("user", prompt), ("assistant", answer))
        out.append({"messages": [{"role": role, "content": " ".join(words)} for role, words in said]})
    return out


def weight_bytes(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


CHILDREN = {"peer": child_peer, "memory": child_memory, "learn": child_learn}


# ---- measuring


def measure(child: str, way: str, options: dict[str, Any], threads: int = 0) -> dict[str, Any]:
    """What one process found, with its peak resident bytes; with ``threads``, of so many of BLAS."""
    command = [sys.executable, __file__, "--child", child, "--way", way, "--options", json.dumps(options)]
    environment = {**os.environ, **({"OPENBLAS_NUM_THREADS": str(threads)} if threads else {})}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{child} {way} failed ({status}):\n{errors[-3000:]}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        **json.loads(out.splitlines()[-1]),
        "peak_rss": usage.ru_maxrss * kilobyte,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def shown(name: str, run: dict[str, Any]) -> dict[str, Any]:
    kept = {
        k: v
        for k, v in run.items()
        if k in ("loss", "trained_tokens_per_second", "peak_mlx", "peak_rss", "peak_above_weights", "seconds")
    }
    print(f"{name:28}", "  ".join(f"{k} {v:.4g}" for k, v in kept.items()), flush=True)
    return run


def in_pairs(child: str, runs: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Losses of several trainings, two at a time with one thread of BLAS each: there the losses count, and
    not the time.
    """
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(
                lambda run: shown(f"loss {run[0]} {run[1]['seed']}", measure(child, *run, threads=1)), runs
            )
        )


def part_peer(options: argparse.Namespace) -> dict[str, Any]:
    ways = (*WAYS, "mlx_lm")
    speed = {way: shown(f"speed {way}", measure("peer", way, SPEED)) for way in ways}
    # The slow ones first.
    runs = [(way, {**LOSS, "seed": seed}) for way in reversed(ways) for seed in range(options.seeds)]
    loss: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for (way, _), run in zip(runs, in_pairs("peer", runs), strict=True):
        loss[way].append(run)
    ratios: dict[str, Any] = {}
    for way in WAYS:
        for key in ("trained_tokens_per_second", "peak_mlx", "peak_rss"):
            ratios[f"{key} {way}"] = speed[way][key] / speed["mlx_lm"][key]
        each = [ours["loss"] / theirs["loss"] for ours, theirs in zip(loss[way], loss["mlx_lm"], strict=True)]
        ratios |= {f"loss {way}": mean(each), f"loss {way}, least": min(each), f"loss {way}, most": max(each)}
    return {
        "settings": {"speed": SPEED, "loss": LOSS, "lora": LORA, "ways": WAYS},
        "speed": speed,
        "loss": loss,
        "of_mlx_lm": ratios,
    }


def part_galore(options: argparse.Namespace) -> dict[str, Any]:
    memory = {
        way: shown(f"memory {way}", measure("memory", way, MEMORY))
        for way in ("adamw", "adamw streamed", "galore")
    }
    ratios = {
        key: memory["galore"][key] / memory["adamw"][key]
        for key in ("state", "state_of_projected", "peak_above_weights")
    }
    ratios["peak_above_weights of streamed"] = (
        memory["galore"]["peak_above_weights"] / memory["adamw streamed"]["peak_above_weights"]
    )
    seeds = range(options.seeds)
    runs = in_pairs(
        "learn", [(way, {**LEARN, "seed": seed}) for seed in seeds for way in ("adamw", "galore")]
    )
    learn = {"adamw": runs[::2], "galore": runs[1::2]}
    for seed in seeds:
        ratios[f"loss, seed {seed}"] = learn["galore"][seed]["loss"] / learn["adamw"][seed]["loss"]
    ratios["loss"] = mean(run["loss"] for run in learn["galore"]) / mean(
        run["loss"] for run in learn["adamw"]
    )
    # Each matrix once a gap; the first step of the run made every basis once.
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
    """The losses by rate from which RATES were taken."""
    runs = [
        (way, {**LEARN, "seed": 10, "of": 2000, "rate": rate})
        for way, rates in TRIED.items()
        for rate in rates
    ]
    losses = {
        f"loss {way} {run['rate']:g}": found["loss"]
        for (way, run), found in zip(runs, in_pairs("learn", runs), strict=True)
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
        "--seeds", type=int, default=4, help="trainings of each kind where losses are compared"
    )
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(CHILDREN[options.child](options.way, options.options)))
        return
    for name in [options.part] if options.part else ["peer", "galore"]:
        began = time.perf_counter()
        out = PARTS[name](options)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        out |= {
            "seconds": time.perf_counter() - began,
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
