"""Trainings in a process of its own, which the tests kill: runner.py FOLDER ranks | kill SEED N METHOD... | interrupt SEED N METHOD...

``kill`` trains by one method after the other and hits the N-th of them where the seed says: in any part of any step.
"""

from __future__ import annotations

import os
import random
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
from mlx_distill.train.stopwatch import Stopwatch


def main(folder: Path, how: str, seed: str = "", number: str = "0", *methods: str) -> int:
    if how == "ranks":
        for method in ("full", "galore"):
            train_once(folder / method, method, lambda row: None)
        print("finished", flush=True)
        return lose_a_rank(folder / "lost")
    for place, method in enumerate(methods):
        if place == int(number):
            # A run has 116 parts or more, of which the last step's are left out: after it there is nothing to go on with.
            hit_after(random.Random(f"{seed}/{place}").randrange(1, 100), signal.SIGKILL if how == "kill" else signal.SIGINT)
        try:
            train_once(folder / method, method, lambda row: None)
        except Interrupted as error:
            return error.exit_code
    return 0


def hit_after(parts: int, number: int) -> None:
    """Send this process a signal when it has begun so many parts of steps."""
    plain = Stopwatch.part

    def part(self: Stopwatch, name: str) -> Any:
        nonlocal parts
        parts -= 1
        if parts == 0:
            os.kill(os.getpid(), number)
        return plain(self, name)

    Stopwatch.part = part  # type: ignore[method-assign]


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
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
