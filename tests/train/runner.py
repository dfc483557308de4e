"""A training in a process of its own, which the tests kill: runner.py FOLDER none | kill-N | interrupt-N | ranks."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlx_distill.runtime import load_blas

load_blas()

import mlx.core as mx
from mlx.utils import tree_flatten
from train.tiny import make_batches, make_model, make_rows, settings

from mlx_distill.errors import DistillError, Interrupted
from mlx_distill.optim import make_optimizer
from mlx_distill.train import ListBatches, make_trainable, sft, train
from mlx_distill.train.ranks import current_ranks


def main(folder: Path, script: str) -> int:
    how, _, number = script.partition("-")
    # At which steps each attempt is hit.
    hits = {"kill": [3, 6], "interrupt": [4]}.get(how, [])
    at = hits[int(number)] if int(number or 0) < len(hits) else -1

    def hook(row: dict) -> None:
        if row["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGINT)

    if how == "ranks":
        for method in ("full", "galore"):
            train_once(folder / method, method, lambda row: None)
        print("finished", flush=True)
        return lose_a_rank(folder / "lost")
    try:
        train_once(folder, "galore", hook)
    except Interrupted as error:
        return error.exit_code
    return 0


def lose_a_rank(folder: Path) -> int:
    ranks = current_ranks()

    def die(row: dict) -> None:
        if ranks.rank == 1 and row["step"] == 5:
            os._exit(7)

    if ranks.size > 1:
        try:
            train_once(folder, "full", die)
        except DistillError as error:
            print(f"told: {error}", flush=True)
    return 0


def train_once(folder: Path, method: str, hook: Any) -> None:
    ranks = current_ranks()
    batches = make_batches(make_rows(24), 2)
    config = settings(method=method, steps=8, accumulate=4 // ranks.size, evaluate_every=4, galore_update_gap=3)
    model = make_model(dropout=0.0 if ranks.size > 1 or folder.parent.name == "one" else 0.2)
    make_trainable(model, config)
    source = ListBatches(batches, rank=ranks.rank, size=ranks.size)
    optimizer = make_optimizer(config, 8)
    train(model, source, sft(), optimizer, config, folder=folder, valid=batches[:3], hooks=[hook])
    mx.save_safetensors(str(folder / f"final{f'-{ranks.rank}' if ranks.rank else ''}.safetensors"), dict(tree_flatten(model.parameters())))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
