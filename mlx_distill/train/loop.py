"""The one training loop: SFT, distillation and refinement differ in the objective and in where batches come from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_distill.config import keyed
from mlx_distill.errors import ConfigError, DataError, Interrupted
from mlx_distill.progress import Estimate
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import StopFlag, peak_memory, reset_peak_memory, stop_on_signal
from mlx_distill.train import checkpoint
from mlx_distill.train.gradients import apply_update, clip_scale, evaluate, global_norm, window_gradients
from mlx_distill.train.guard import stop_on_nan
from mlx_distill.train.length import epoch_batches
from mlx_distill.train.length import total_steps as total_steps
from mlx_distill.train.metrics import MetricsLog
from mlx_distill.train.objectives import Objective, trained_tokens
from mlx_distill.train.randomness import random_key, set_random_key
from mlx_distill.train.ranks import Ranks, current_ranks
from mlx_distill.train.recompute import recomputed_layers
from mlx_distill.train.source import BatchSource

Hook = Callable[[dict[str, Any]], None]


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


@dataclass
class _Run:
    """Where a run stands; all of it is in each checkpoint."""

    step: int = 0
    micro: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    waiting: int = 0
    last: dict[str, Any] = field(default_factory=dict)


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
    keep: str = "last",
    patience: int = 0,
    identity: str = "",
) -> TrainResult:
    r"""Train ``model``'s trainable parameters in place; go on from ``folder/checkpoints`` where there are some.

    One step takes ``accumulate`` micro-batches a rank: see :func:`~mlx_distill.train.gradients.window_gradients`. The gradient is
    clipped by its global norm, a loss or norm that is not finite ends the run before the weights are touched, and a run that
    was killed anywhere goes on bitwise as if it had not been.

    Args:
        model: Only what is not frozen moves. On return it holds the last weights, or the best ones with ``keep="best"``.
        batches: An endless stream with a position; ``len`` is the micro-batches of an epoch.
        objective: Terms of the loss.
        optimizer: An ``mlx.optimizers.Optimizer``; its schedule lives in it.
        settings: Accumulation, clipping, length, intervals and seed.
        folder: Gets ``checkpoints/`` and ``metrics.jsonl``.
        valid: A fixed set of batches, looked at every ``evaluate_every`` steps and at the end.
        hooks: Called after each step with its row, and ``steps``, ``terms`` and ``eta_s`` besides.
        stop: Looked at after each step; by default the first SIGINT or SIGTERM.
        keep: ``last`` or ``best``: which weights the model is left with.
        patience: Looks at the validation rows without a new best after which the run ends; 0 for never.
        identity: Of model and data; a checkpoint of another identity is refused.

    Raises:
        Interrupted: stopped on request, after a checkpoint.
        DataError: the loss became NaN, or there is nothing to train on.
        ConfigError, ModelError: the checkpoints are of other settings, another model or other data.
    """
    ranks = current_ranks()
    steps = total_steps(settings, int(ranks.largest(len(batches))))
    if not tree_flatten(model.trainable_parameters()):
        raise ConfigError("no weight of the model is trainable", fix="check target_modules")
    checked = {**keyed(settings), "identity": identity}
    with ExitStack() as stack:
        flag = stop if stop is not None else stack.enter_context(stop_on_signal())
        stack.enter_context(_training(model))
        run, position = _start(folder, model, optimizer, batches, checked, settings.seed, ranks)
        if settings.grad_checkpoint:
            stack.enter_context(recomputed_layers(model))
        log = MetricsLog(folder / "metrics.jsonl" if ranks.rank == 0 else None, position)
        stack.callback(log.close)
        setup = _Setup(model, batches, objective, optimizer, settings, folder, valid, steps, ranks, log, checked)
        resumed = run.step
        stopped_early = _go(setup, run, flag, hooks, patience)
    best = folder / "checkpoints" / "best"
    if keep == "best" and run.best_step is not None:
        checkpoint.load_weights(best, model)
    return TrainResult(
        run.step, run.last, best if run.best_step is not None else None, run.best_step, run.best_loss,
        run.seconds, run.tokens, resumed, stopped_early,
    )  # fmt: skip


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
) -> tuple[_Run, int]:
    """Restore the newest checkpoint, or begin; return the run and the length of metrics.jsonl that belongs to it."""
    optimizer.init(model.trainable_parameters())
    path = checkpoint.latest(folder / "checkpoints")
    reset_peak_memory()
    if path is None:
        # Ranks drop different units; rank 0 draws what a run of one rank draws.
        mx.random.seed(seed + 1_000_003 * ranks.rank)
        return _Run(), 0
    state = checkpoint.read_state(path)
    old = state["settings"]
    changed = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
    if changed:
        raise ConfigError(
            f"{path}: a checkpoint of other settings ({', '.join(changed)})", fix=f"restore them, or delete {path.parent} and start again"
        )
    if len(state["random"]) != ranks.size:
        raise ConfigError(f"{path}: a checkpoint of {len(state['random'])} ranks, not {ranks.size}", fix="launch as many as before")
    checkpoint.load_weights(path, model)
    checkpoint.load_optimizer(path, model, optimizer)
    batches.restore(state["data"])
    set_random_key(state["random"][ranks.rank])
    return _Run(**state["run"]), int(state["metrics_bytes"])


@dataclass(frozen=True)
class _Setup:
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


def _go(setup: _Setup, run: _Run, flag: StopFlag, hooks: Sequence[Hook], patience: int) -> bool:
    """Step until the end; True where patience ended it first."""
    estimate, every = Estimate(setup.steps, run.step), setup.settings.checkpoint_every
    while run.step < setup.steps:
        row = _step(setup, run)
        tired = _look(setup, run, row, patience)
        run.last = row
        setup.log.write(row)
        told = {"steps": setup.steps, "terms": {k: row[k] for k in setup.objective.coefficients}, "eta_s": estimate.left(run.step)}
        for hook in hooks:
            hook({**row, **told})
        stopping = bool(setup.ranks.largest(float(bool(flag))))
        if stopping or tired or run.step == setup.steps or run.step % every == 0:
            _save(setup, run)
        if tired:
            return True
        if stopping and run.step < setup.steps:
            raise Interrupted(f"stopped after step {run.step} of {setup.steps}", fix="run the same command again: it goes on from there")
    return False


def _step(setup: _Setup, run: _Run) -> dict[str, Any]:
    """One optimizer step; its row of metrics."""
    began = time.perf_counter()
    window = _window(setup, run)
    result = window_gradients(setup.model, window, setup.objective, setup.ranks, getattr(setup.optimizer, "compress", None))
    norm = 0.0
    if result.gradients:
        norm = global_norm(result.gradients)
        if not (math.isfinite(norm) and math.isfinite(result.loss)):
            stop_on_nan(setup.folder, run.step + 1, window, result, norm, setup.ranks.rank)
        norm = _update(setup, result.gradients, norm)
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


def _update(setup: _Setup, gradients: dict[str, mx.array], norm: float) -> float:
    """Clip and apply. What an optimizer keeps in a subspace is measured there: the norm is that of what moves the weights."""
    if hasattr(setup.optimizer, "enter"):
        for path in list(gradients):
            gradients[path] = setup.optimizer.enter(path, gradients[path])
            mx.eval(gradients[path])
        norm = global_norm(gradients)
    apply_update(setup.model, setup.optimizer, gradients, clip_scale(norm, setup.settings.clip_norm))
    return norm


def _window(setup: _Setup, run: _Run) -> list[Batch]:
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


def _look(setup: _Setup, run: _Run, row: dict[str, Any], patience: int) -> bool:
    """Validation where it is due; True where ``patience`` is out."""
    every = setup.settings.evaluate_every
    if not setup.valid or not every or (run.step % every and run.step != setup.steps):
        return False
    found = evaluate(setup.model, setup.valid, setup.objective, setup.ranks)
    row |= {f"valid_{name}": value for name, value in found.items()}
    if run.best_loss is None or found["loss"] < run.best_loss:
        run.best_step, run.best_loss, run.waiting = run.step, found["loss"], 0
        if setup.ranks.rank == 0:
            checkpoint.save_best(setup.folder / "checkpoints", {"step": run.step, "valid_loss": found["loss"]}, setup.model)
    else:
        run.waiting += 1
    return 0 < patience <= run.waiting


def _save(setup: _Setup, run: _Run) -> None:
    """Write a checkpoint; every rank takes part, rank 0 writes."""
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
        checkpoint.save(setup.folder / "checkpoints", state, setup.model, setup.optimizer)
    setup.ranks.barrier()
