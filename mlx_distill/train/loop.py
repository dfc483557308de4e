"""The one training loop: SFT, distillation and refinement differ in the objective and in where batches come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.config import keyed
from mlx_distill.errors import ConfigError
from mlx_distill.optim.schedules import scheduled_steps
from mlx_distill.progress import counted
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import StopFlag, reset_peak_memory, stop_on_signal
from mlx_distill.train import checkpoint
from mlx_distill.train.distributed import Ranks, current_ranks
from mlx_distill.train.events import MetricsLog
from mlx_distill.train.grad_checkpoint import recomputed_layers
from mlx_distill.train.hooks import Hook as Hook
from mlx_distill.train.length import total_steps as total_steps
from mlx_distill.train.objective import Objective
from mlx_distill.train.preflight import check_settings
from mlx_distill.train.randomness import set_random_key
from mlx_distill.train.source import BatchSource
from mlx_distill.train.steps import Run, Setup, go
from mlx_distill.train.stopwatch import Stopwatch
from mlx_distill.train.trunk_head import make_trunk


@dataclass(frozen=True)
class TrainResult:
    """What a finished training came to.

    ``steps`` optimizer steps; ``metrics`` the last step's row of metrics.jsonl; ``best`` the folder of the best weights (None without
    validation rows), with their ``best_step`` and ``best_loss``; ``seconds`` and ``tokens`` over all parts of an interrupted run;
    ``resumed`` the step it went on from, 0 for a fresh start.
    """

    steps: int
    metrics: Mapping[str, Any]
    best: Path | None = None
    best_step: int | None = None
    best_loss: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    resumed: int = 0
    stopped_early: bool = False


def train(
    model: nn.Module,
    batches: BatchSource,
    objective: Objective,
    optimizer: optim.Optimizer,
    settings: TrainConfig,
    *,
    folder: Path,
    valid: Sequence[Batch] = (),
    hooks: Sequence[Hook] = (),
    stop: StopFlag | None = None,
    watch: Stopwatch | None = None,
    identity: str = "",
) -> TrainResult:
    r"""Train ``model``'s trainable parameters in place; go on from ``folder/checkpoints`` where there are some.

    One step takes ``accumulate`` micro-batches a rank: see :func:`~mlx_distill.train.updates.window_gradients`. The gradient is
    clipped by its global norm, a loss or norm that is not finite ends the run before the weights are touched, and a run that
    was killed anywhere goes on bitwise as if it had not been. A step whose batches have nothing to train on counts and moves nothing, and
    the schedule waits for the next.

    Args:
        model: Only what is not frozen moves. On return it holds the last weights, or with ``settings.use_best`` the best ones.
        batches: An endless stream with a position; ``len`` is the micro-batches of an epoch.
        objective: Terms of the loss.
        optimizer: An ``mlx.optimizers.Optimizer``; its schedule lives in it.
        settings: Accumulation, clipping, length, intervals, patience and seed.
        folder: Gets ``checkpoints/`` and ``metrics.jsonl``.
        valid: A fixed set of batches, looked at every ``evaluate_every`` steps and at the end.
        hooks: Called after each step with its row: see :mod:`~mlx_distill.train.hooks`.
        stop: Looked at after each step; by default the first SIGINT or SIGTERM.
        watch: Takes the time of each part; see :class:`~mlx_distill.train.profiling.Profile`.
        identity: Of model and data; a checkpoint of another identity is refused.

    Raises:
        Interrupted: stopped on request, after a checkpoint.
        DistillError: another rank was lost; the last checkpoint stands.
        DataError: the loss became NaN, or there is nothing to train on.
        ConfigError, ModelError: the checkpoints are of other settings, another model or other data.
    """
    ranks = current_ranks()
    steps = total_steps(settings, int(ranks.largest(len(batches))))
    _check(model, optimizer, settings, steps, ranks, bool(valid))
    if settings.compile and objective.cut is None:
        raise ConfigError("compile: true for an objective in one piece", fix="make it with read_objective, or leave compile out")
    checked = {**keyed(settings), "identity": identity}
    with ExitStack() as stack:
        flag = stop if stop is not None else stack.enter_context(stop_on_signal())
        stack.enter_context(_training(model))
        run, position = _start(folder, model, optimizer, batches, checked, settings.seed, ranks)
        if settings.grad_checkpoint:
            stack.enter_context(recomputed_layers(model))
        log = MetricsLog(folder / "metrics.jsonl" if ranks.rank == 0 else None, position)
        stack.callback(log.close)
        trunk = make_trunk(model, compiled=True) if settings.compile else None
        watch = watch or Stopwatch()
        setup = Setup(model, batches, objective, optimizer, settings, folder, valid, steps, ranks, log, checked, watch, trunk)
        resumed = run.step
        try:
            stopped_early = go(setup, run, flag, hooks)
        except RuntimeError as error:
            if lost := ranks.lost(error):
                raise lost from error
            raise
    best = folder / "checkpoints" / "best"
    if settings.use_best and run.best_step is not None:
        if ranks.rank == 0:
            checkpoint.load_weights(best, model)
        _share(ranks, model)
    return TrainResult(
        run.step, run.last, best if run.best_step is not None else None, run.best_step, run.best_loss,
        run.seconds, run.tokens, resumed, stopped_early,
    )  # fmt: skip


def _check(model: nn.Module, optimizer: optim.Optimizer, settings: TrainConfig, steps: int, ranks: Ranks, looks: bool) -> None:
    """Refuse what cannot come to anything."""
    if not tree_flatten(model.trainable_parameters()):
        raise ConfigError("no weight of the model is trainable", fix="check target_modules")
    laid_out = scheduled_steps(optimizer)
    if laid_out not in (None, steps):
        raise ConfigError(f"a schedule over {laid_out} steps for a run of {steps}", fix=f"make_optimizer(settings, {steps})")
    if (settings.patience or settings.use_best) and not looks:
        name = "patience" if settings.patience else "use_best"
        raise ConfigError(f"{name} without a validation row to look at", fix="raise data.valid_fraction, or leave it out")
    check_settings(settings, ranks.size)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    mode = model.training
    model.train()
    try:
        yield
    finally:
        model.train(mode)


def _start(
    folder: Path, model: nn.Module, optimizer: optim.Optimizer, batches: BatchSource, settings: Mapping[str, Any], seed: int, ranks: Ranks
) -> tuple[Run, int]:
    """Restore the newest checkpoint, or begin; return the run and the length of metrics.jsonl that belongs to it.

    Rank 0's disk alone is read: the other ranks may be other machines, and get what it holds.
    """
    optimizer.init(model.trainable_parameters())
    path = checkpoint.latest(folder / "checkpoints") if ranks.rank == 0 else None
    state = json.loads(ranks.tell(json.dumps(checkpoint.read_state(path) if path else None)))
    reset_peak_memory()
    if state is None:
        # Ranks drop different units; rank 0 draws what a run of one rank draws.
        mx.random.seed(seed + 1_000_003 * ranks.rank)
        return Run(), 0
    where, old = folder / "checkpoints", state["settings"]
    changed = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
    if changed == ["identity"]:
        raise ConfigError(
            f"{where}: checkpoints of other rows or of another base model (their identity differs)",
            fix=f"restore them, or delete {where} and start again",
        )
    if changed:
        raise ConfigError(
            f"{where}: checkpoints of other settings ({', '.join(changed)})", fix=f"restore them, or delete {where} and start again"
        )
    if len(state["random"]) != ranks.size:
        raise ConfigError(
            f"{where}: checkpoints of {counted(len(state['random']), 'rank')}, not {ranks.size}",
            fix=f"launch as many as before, or delete {where} and start again",
        )
    if path is not None:
        checkpoint.load_weights(path, model)
        checkpoint.load_optimizer(path, model, optimizer)
    _share(ranks, model, optimizer)
    batches.restore(state["data"])
    set_random_key(state["random"][ranks.rank])
    return Run(**state["run"]), int(state["metrics_bytes"])


def _share(ranks: Ranks, model: nn.Module, optimizer: optim.Optimizer | None = None) -> None:
    """Give every rank the weights of rank 0, and the state of its optimizer."""
    if ranks.size == 1:
        return
    model.update(tree_unflatten(list(ranks.spread(dict(tree_flatten(model.trainable_parameters()))).items())))
    if optimizer is not None:
        optimizer.state = tree_unflatten(list(ranks.spread(dict(tree_flatten(optimizer.state))).items()))
        optimizer.init(model.trainable_parameters())
