"""One optimizer step after the other: take a window, differentiate, clip, update, look, save."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_distill.errors import DataError, Interrupted
from mlx_distill.progress import Estimate
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import StopFlag, peak_memory
from mlx_distill.train import checkpoint
from mlx_distill.train.diagnostics import check_weights, stop_on_nan, stop_on_weights
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.events import MetricsLog
from mlx_distill.train.hooks import Hook
from mlx_distill.train.length import epoch_batches
from mlx_distill.train.objective import Objective, trained_tokens
from mlx_distill.train.randomness import random_key
from mlx_distill.train.refresh import entered_in_groups, frozen
from mlx_distill.train.source import BatchSource
from mlx_distill.train.stopwatch import Stopwatch
from mlx_distill.train.streaming import streamed_step
from mlx_distill.train.trunk_head import Trunk
from mlx_distill.train.updates import Compress, Window, apply_update, clip_scale, evaluate, global_norm, window_gradients


@dataclass
class Run:
    """Where a run stands; all of it is in each checkpoint."""

    step: int = 0
    micro: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    waiting: int = 0
    last: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What does not change over a run."""

    model: nn.Module
    batches: BatchSource
    objective: Objective
    optimizer: optim.Optimizer
    settings: TrainConfig
    folder: Path
    valid: Sequence[Batch]
    steps: int
    ranks: Ranks
    log: MetricsLog
    checked: Mapping[str, Any]
    watch: Stopwatch = field(default_factory=Stopwatch)
    trunk: Trunk | None = None


def go(setup: Setup, run: Run, flag: StopFlag, hooks: Sequence[Hook]) -> bool:
    """Step until the end; True where patience ended it first."""
    patience = setup.settings.patience
    if 0 < patience <= run.waiting:
        return True
    estimate, every = Estimate(setup.steps, run.step), setup.settings.checkpoint_every
    setup.watch.take()
    while run.step < setup.steps:
        row = _step(setup, run)
        with setup.watch.part("validate"):
            tired = _look(setup, run, row)
        run.last = row
        setup.log.write(row)
        told = {"steps": setup.steps, "terms": {k: row[k] for k in setup.objective.coefficients}, "eta_s": estimate.left(run.step)}
        told["timing"] = setup.watch.take()
        with setup.watch.part("hooks"):
            for hook in hooks:
                hook({**row, **told})
        stopping = bool(setup.ranks.largest(float(bool(flag))))
        if stopping or tired or run.step == setup.steps or run.step % every == 0:
            with setup.watch.part("save"):
                _save(setup, run)
        if tired:
            return True
        if stopping and run.step < setup.steps:
            raise Interrupted(f"stopped after step {run.step} of {setup.steps}", fix="run the same command again: it goes on from there")
    return False


def _step(setup: Setup, run: Run) -> dict[str, Any]:
    """One optimizer step; its row of metrics."""
    began = time.perf_counter()
    with setup.watch.part("data"):
        window = _window(setup, run)
        setup.watch.settle([vars(batch) for batch in window])
    result, norm = _move(setup, run, window)
    run.step += 1
    tokens = round(setup.ranks.sum([sum(trained_tokens(batch) for batch in window)])[0])
    seconds = time.perf_counter() - began
    run.tokens += tokens
    run.seconds += seconds
    return {
        "step": run.step,
        "loss": result.loss,
        **result.terms,
        "learning_rate": float(setup.optimizer.learning_rate),
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": run.seconds,
        "peak_memory_bytes": peak_memory(),
    }


def _move(setup: Setup, run: Run, window: Sequence[Batch]) -> tuple[Window, float]:
    """Differentiate, clip, update; what the window gave and the gradient's norm."""

    def guard(result: Window, norm: float, moved: bool = False) -> None:
        if not (math.isfinite(norm) and math.isfinite(result.loss)):
            stop_on_nan(setup.folder, run.step + 1, window, result, norm, setup.ranks.rank, moved=moved)

    model, objective, optimizer, watch, limit = setup.model, setup.objective, setup.optimizer, setup.watch, setup.settings.clip_norm
    low = hasattr(optimizer, "enter")  # it takes gradients into a subspace, and those are small
    if setup.settings.stream_gradients and not low:
        return streamed_step(model, window[0], objective, optimizer, limit, guard, watch, setup.trunk)
    # At once into the subspace where there is nothing to add up.
    alone = setup.settings.accumulate == 1 and setup.ranks.size == 1
    compress: Compress | None = getattr(optimizer, "enter" if alone else "compress", None)
    entered: dict[str, mx.array] = {}
    if low and not alone:
        entered = entered_in_groups(model, optimizer, lambda: window_gradients(model, window, objective, setup.ranks, compress, watch))
    with frozen(model, entered):
        # A compiled trunk holds what does not move as constants, so it serves only where all of them move that did.
        result = window_gradients(model, window, objective, setup.ranks, compress, watch, None if entered else setup.trunk)
    if not result.gradients:
        return result, 0.0
    result.gradients.update(entered)
    with watch.part("clip"):
        norm = global_norm(result.gradients)
    guard(result, norm)
    if low:
        with watch.part("project"):
            for path in list(result.gradients):
                result.gradients[path] = optimizer.enter(path, result.gradients[path])
                mx.eval(result.gradients[path])
        with watch.part("clip"):
            norm = global_norm(result.gradients)  # of what moves the weights
    with watch.part("update"):
        apply_update(model, optimizer, result.gradients, clip_scale(norm, limit))
    return result, norm


def _window(setup: Setup, run: Run) -> list[Batch]:
    """This step's micro-batches; the last window of a run by epochs is what is left."""
    count = setup.settings.accumulate
    if not setup.settings.steps:
        count = min(count, epoch_batches(setup.settings, len(setup.batches)) - run.micro)
    window = []
    for _ in range(count):
        try:
            window.append(next(setup.batches))
        except StopIteration:
            break
    if not setup.ranks.largest(len(window)):
        raise DataError(f"the batches ran out at step {run.step + 1}", fix="a source of batches goes on epoch after epoch")
    run.micro += len(window)
    return window


def _look(setup: Setup, run: Run, row: dict[str, Any]) -> bool:
    """Validation where it is due; True where ``patience`` is out."""
    every = setup.settings.evaluate_every
    if not setup.valid or not every or (run.step % every and run.step != setup.steps):
        return False
    found = evaluate(setup.model, setup.valid, setup.objective, setup.ranks)
    if not all(map(math.isfinite, found.values())):
        stop_on_weights(setup.folder, run.step, "the validation loss is not a number")
    row |= {f"valid_{name}": value for name, value in found.items()}
    if run.best_loss is None or found["loss"] < run.best_loss:
        run.best_step, run.best_loss, run.waiting = run.step, found["loss"], 0
        if setup.ranks.rank == 0:
            checkpoint.save_best(setup.folder / "checkpoints", {"step": run.step, "valid_loss": found["loss"]}, setup.model)
    else:
        run.waiting += 1
    return 0 < setup.settings.patience <= run.waiting


def _save(setup: Setup, run: Run) -> None:
    """Write a checkpoint of weights that are numbers; every rank takes part, rank 0 writes."""
    check_weights(setup.model, setup.folder, run.step)
    keys = setup.ranks.gather(random_key())
    if setup.ranks.rank == 0:
        state = {
            "step": run.step,
            "steps": setup.steps,
            "run": vars(run),
            "random": keys,
            "data": setup.batches.state(),
            "settings": setup.checked,
            "metrics_bytes": setup.log.bytes(),
        }
        checkpoint.save(setup.folder / "checkpoints", state, setup.model, setup.optimizer, keep=setup.settings.keep_checkpoints)
    setup.ranks.barrier()
