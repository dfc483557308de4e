"""The training loop, the same for SFT, distillation and refinement: they differ in the objective and in where
batches come from.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.config import keyed
from mlx_distill.errors import ConfigError, DataError, Interrupted
from mlx_distill.optim.schedules import scheduled_steps
from mlx_distill.progress import Estimate
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import (
    StopFlag,
    peak_memory,
    random_key,
    reset_peak_memory,
    set_random_key,
    stop_on_signal,
)
from mlx_distill.text import counted
from mlx_distill.train import checkpoint
from mlx_distill.train.batches import BatchSource, epoch_batches
from mlx_distill.train.batches import total_steps as total_steps
from mlx_distill.train.diagnostics import check_weights, stop_on_nan, stop_on_weights
from mlx_distill.train.distributed import Ranks, current_ranks
from mlx_distill.train.events import Hook as Hook
from mlx_distill.train.events import MetricsLog
from mlx_distill.train.grad_checkpoint import checkpointed_layers
from mlx_distill.train.gradients import WindowGradients
from mlx_distill.train.objective import Objective, trained_tokens
from mlx_distill.train.preflight import check_settings
from mlx_distill.train.profiling import Stopwatch
from mlx_distill.train.trunk_head import make_trunk
from mlx_distill.train.updates import FiniteCheck, UpdateContext, Updater, make_updater
from mlx_distill.train.validation import Measure, evaluate, is_better, measure_answers


@dataclass
class TrainProgress:
    """How far a run is; every checkpoint holds all of it."""

    step: int = 0
    micro: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    best_value: float | None = None  # of best_metric
    bad_evals: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainProgress:
        """From a checkpoint, also of versions that called ``bad_evals`` ``waiting`` and went by the loss."""
        values = {"best_value": values.get("best_loss"), **values}
        if "waiting" in values:
            values["bad_evals"] = values.pop("waiting")
        return cls(**values)


@dataclass(frozen=True)
class TrainState:
    """What a run consists of; the fields do not change over the run."""

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
    identity: Mapping[str, Any]  # the settings that change the result, and the identity of model and data
    watch: Stopwatch
    update: Updater
    measure: Measure | None = None


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a finished training.

    ``steps`` optimizer steps; ``metrics`` the last step's row of metrics.jsonl; ``best`` the folder of the
    best weights by ``best_metric`` (None without validation rows), with their ``best_step``, ``best_loss``
    (the validation loss) and ``best_value`` (that of the metric); ``seconds`` and ``tokens`` over all parts
    of an interrupted run; ``resumed`` the step of the checkpoint from which the run was resumed, 0 for a new
    run.
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
    best_value: float | None = None


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
    ranks: Ranks | None = None,
    saved: Callable[[int], None] | None = None,
    measure: Measure | None = None,
) -> TrainResult:
    r"""Train ``model``'s trainable parameters in place, resuming from ``folder/checkpoints`` where there are
    any.

    One step takes ``accumulate`` micro-batches on each rank: see
    :func:`~mlx_distill.train.gradients.window_gradients`. The gradient is clipped by its global norm, and a
    loss or norm that is not finite ends the run before the weights are updated. A run that was killed and
    resumed is bitwise equal to an uninterrupted one. A step whose batches have no trained token counts as a
    step, but updates neither weights nor schedule.

    Args:
        model: Only its trainable parameters change. On return it holds the last weights, or with
            ``settings.use_best`` the best ones.
        batches: An endless stream with a position; ``len`` is the number of micro-batches of an epoch.
        objective: Terms of the loss.
        optimizer: An ``mlx.optimizers.Optimizer`` with its schedule.
        settings: Accumulation, clipping, length, intervals, patience and seed.
        folder: Gets ``checkpoints/`` and ``metrics.jsonl``.
        valid: Validation batches, evaluated every ``evaluate_every`` steps and at the end.
        hooks: Called after each step with its row of metrics: see :mod:`~mlx_distill.train.events`.
        stop: Checked after each step; by default it is set by the first SIGINT or SIGTERM.
        watch: Gets the time of each part; see :class:`~mlx_distill.train.profiling.Profile`.
        identity: Of model and data; a checkpoint with another identity is refused.
        ranks: By default those of this process's launch.
        saved: Called with the step of every checkpoint that was written.
        measure: Gives further figures of the model at each validation, for metrics.jsonl and ``best_metric``:
            see :func:`~mlx_distill.train.validation.measure_answers`.

    Raises:
        Interrupted: stopped on request, after a checkpoint.
        DistillError: another rank was lost; the last checkpoint is intact.
        DataError: the loss became NaN, or there is nothing to train on.
        ConfigError, ModelError: the checkpoints are of other settings, another model or other data.
    """
    ranks, watch = ranks or current_ranks(), watch or Stopwatch()
    steps = total_steps(settings, int(ranks.max(len(batches))))
    _check(model, objective, optimizer, settings, steps, ranks, bool(valid))
    keyed_settings = {**keyed(settings), "identity": identity}
    with ExitStack() as stack:
        flag = stop if stop is not None else stack.enter_context(stop_on_signal())
        stack.enter_context(_train_mode(model))
        progress, log_bytes = _resume(folder, model, optimizer, batches, keyed_settings, settings.seed, ranks)
        resumed = progress.step
        if settings.grad_checkpoint:
            stack.enter_context(checkpointed_layers(model))
        path = folder / "metrics.jsonl" if ranks.rank == 0 else None
        log = stack.enter_context(closing(MetricsLog(path, log_bytes)))
        trunk = make_trunk(model, compiled=True) if settings.compile else None
        finite = _finite_check(folder, progress, ranks)
        parts = UpdateContext(model, objective, optimizer, settings.clip_norm, ranks, watch, trunk, finite)
        update = make_updater(parts, settings)
        state = TrainState(
            model,
            batches,
            objective,
            optimizer,
            settings,
            folder,
            valid,
            steps,
            ranks,
            log,
            keyed_settings,
            watch,
            update,
            measure,
        )
        with ranks.errors():
            stopped_early = run_steps(state, progress, flag, hooks, saved)
    return _result(state, progress, resumed, stopped_early)


def run_steps(
    state: TrainState,
    progress: TrainProgress,
    flag: StopFlag,
    hooks: Sequence[Hook],
    saved: Callable[[int], None] | None = None,
) -> bool:
    """Take steps until the end; True where early stopping ended the run before."""
    if 0 < state.settings.patience <= progress.bad_evals:
        return True
    estimate, every = Estimate(state.steps), state.settings.checkpoint_every
    saved_at, seconds = time.monotonic(), 60 * state.settings.checkpoint_minutes or math.inf
    state.watch.take()
    while progress.step < state.steps:
        row = _step(state, progress)
        with state.watch.part("validate"):
            out_of_patience = _validate(state, progress, row)
        progress.last = row
        state.log.write(row)
        event = {
            **row,
            "steps": state.steps,
            "terms": {name: row[name] for name in state.objective.coefficients},
            "eta_s": estimate.left(progress.step),
            "timing": state.watch.take(),
        }
        with state.watch.part("hooks"):
            for hook in hooks:
                hook(dict(event))
        # All ranks save and stop at the same step, though their clocks and signals differ.
        is_time = time.monotonic() - saved_at >= seconds
        stopping, due = map(bool, state.ranks.sum([bool(flag), is_time]))
        last = progress.step == state.steps
        if stopping or out_of_patience or last or due or progress.step % every == 0:
            with state.watch.part("save"):
                _save(state, progress)
            saved_at = time.monotonic()
            if saved is not None:
                saved(progress.step)
        if out_of_patience:
            return True
        if stopping and not last:
            raise Interrupted(
                f"stopped after step {progress.step} of {state.steps}",
                fix="run the same command again: it goes on from there",
            )
    return False


def _step(state: TrainState, progress: TrainProgress) -> dict[str, Any]:
    """One optimizer step; its row of metrics."""
    start = time.perf_counter()
    with state.watch.part("data"):
        window = _window(state, progress)
        state.watch.settle([vars(batch) for batch in window])
    result = state.update(window)
    progress.step += 1
    tokens = round(state.ranks.sum([sum(trained_tokens(batch) for batch in window)])[0])
    seconds = time.perf_counter() - start
    progress.tokens += tokens
    progress.seconds += seconds
    return {
        "step": progress.step,
        "loss": result.loss,
        **result.terms,
        "learning_rate": float(state.optimizer.learning_rate),
        "grad_norm": result.grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": progress.seconds,
        "peak_memory_bytes": peak_memory(),
    }


def _window(state: TrainState, progress: TrainProgress) -> list[Batch]:
    """This step's micro-batches; the last window of a run by epochs may be smaller."""
    count = state.settings.accumulate
    if not state.settings.steps:
        count = min(count, epoch_batches(state.settings, len(state.batches)) - progress.micro)
    window = []
    for _ in range(count):
        try:
            window.append(next(state.batches))
        except StopIteration:
            break
    if not state.ranks.max(len(window)):
        raise DataError(
            f"the batches ran out at step {progress.step + 1}",
            fix="a source of batches must go on epoch after epoch",
        )
    progress.micro += len(window)
    return window


def _finite_check(folder: Path, progress: TrainProgress, ranks: Ranks) -> FiniteCheck:
    """A check that ends the run where the loss or the gradient of the next step is not finite."""

    def check(window: Sequence[Batch], result: WindowGradients, norm: float, updated: bool) -> None:
        if not (math.isfinite(norm) and math.isfinite(result.loss)):
            stop_on_nan(folder, progress.step + 1, window, result, norm, ranks.rank, updated=updated)

    return check


def _validate(state: TrainState, progress: TrainProgress, row: dict[str, Any]) -> bool:
    """Evaluate the validation batches where that is due; True where ``patience`` is exhausted."""
    every = state.settings.evaluate_every
    if not state.valid or not every or (progress.step % every and progress.step != state.steps):
        return False
    losses = evaluate(state.model, state.valid, state.objective, state.ranks)
    if not all(map(math.isfinite, losses.values())):
        stop_on_weights(state.folder, progress.step, "the validation loss is not a number")
    figures = {} if state.measure is None else measure_answers(state.model, state.measure, state.ranks)
    figures = losses | {name: value for name, value in figures.items() if name not in losses}
    row |= {f"valid_{name}": value for name, value in figures.items()}
    metric = state.settings.best_metric
    if metric not in figures:
        raise ConfigError(f"best_metric: {metric} is not measured", fix="see evaluate_rows, or leave it out")
    if is_better(figures[metric], progress.best_value, metric):
        progress.best_step, progress.best_loss, progress.bad_evals = progress.step, losses["loss"], 0
        progress.best_value = figures[metric]
        if state.ranks.rank == 0:
            best = {"step": progress.step, f"valid_{metric}": figures[metric], "valid_loss": losses["loss"]}
            checkpoint.save_best(state.folder / "checkpoints", best, state.model)
    else:
        progress.bad_evals += 1
    return 0 < state.settings.patience <= progress.bad_evals


def _save(state: TrainState, progress: TrainProgress) -> None:
    """Write a checkpoint, if all weights are finite. Every rank calls it; rank 0 writes."""
    check_weights(state.model, state.folder, progress.step)
    keys = state.ranks.gather(random_key())
    if state.ranks.rank == 0:
        values = {
            "step": progress.step,
            "steps": state.steps,
            "run": vars(progress),
            "random": keys,
            "data": state.batches.state(),
            "settings": state.identity,
            "metrics_bytes": state.log.bytes(),
        }
        checkpoint.save(
            state.folder / "checkpoints",
            values,
            state.model,
            state.optimizer,
            keep=state.settings.keep_checkpoints,
        )
    state.ranks.barrier()


def _result(state: TrainState, progress: TrainProgress, resumed: int, stopped_early: bool) -> TrainResult:
    """The outcome; the model gets its best weights where the settings ask for them."""
    best = state.folder / "checkpoints" / "best"
    if state.settings.use_best and progress.best_step is not None:
        if state.ranks.rank == 0:
            checkpoint.load_weights(best, state.model)
        _broadcast(state.ranks, state.model)
    return TrainResult(
        progress.step,
        progress.last,
        best if progress.best_step is not None else None,
        progress.best_step,
        progress.best_loss,
        progress.seconds,
        progress.tokens,
        resumed,
        stopped_early,
        progress.best_value,
    )


def _check(
    model: nn.Module,
    objective: Objective,
    optimizer: optim.Optimizer,
    settings: TrainConfig,
    steps: int,
    ranks: Ranks,
    has_validation: bool,
) -> None:
    """Refuse a training that cannot work."""
    if not tree_flatten(model.trainable_parameters()):
        raise ConfigError("no weight of the model is trainable", fix="check target_modules")
    scheduled = scheduled_steps(optimizer)
    if scheduled not in (None, steps):
        raise ConfigError(
            f"a schedule over {scheduled} steps for a run of {steps}",
            fix=f"make_optimizer(settings, {steps})",
        )
    asked = [name for name in ("patience", "use_best", "evaluate_rows") if getattr(settings, name)]
    if asked and not has_validation:
        raise ConfigError(
            f"{asked[0]} without a validation row", fix="raise data.valid_fraction, or leave it out"
        )
    check_settings(settings, ranks.size)
    if settings.compile and objective.head_split is None:
        raise ConfigError(
            "compile: true for an objective in one piece",
            fix="make it with read_objective, or leave compile out",
        )


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    mode = model.training
    model.train()
    try:
        yield
    finally:
        model.train(mode)


def _resume(
    folder: Path,
    model: nn.Module,
    optimizer: optim.Optimizer,
    batches: BatchSource,
    identity: Mapping[str, Any],
    seed: int,
    ranks: Ranks,
) -> tuple[TrainProgress, int]:
    """Restore the newest checkpoint, or start; the progress and the length of metrics.jsonl at that point.

    Only rank 0 reads its disk, since the other ranks may be other machines. They get what it read.
    """
    optimizer.init(model.trainable_parameters())
    path = checkpoint.latest(folder / "checkpoints") if ranks.rank == 0 else None
    state = json.loads(ranks.broadcast_text(json.dumps(checkpoint.read_state(path) if path else None)))
    reset_peak_memory()
    if state is None:
        # Each rank has its own dropout; rank 0 has that of a run with one rank.
        mx.random.seed(seed + 1_000_003 * ranks.rank)
        return TrainProgress(), 0
    _check_checkpoint(folder / "checkpoints", state, identity, ranks)
    if path is not None:
        checkpoint.load_weights(path, model)
        checkpoint.load_optimizer(path, model, optimizer)
    _broadcast(ranks, model, optimizer)
    batches.restore(state["data"])
    set_random_key(state["random"][ranks.rank])
    return TrainProgress.from_json(state["run"]), int(state["metrics_bytes"])


def _check_checkpoint(
    folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any], ranks: Ranks
) -> None:
    """Refuse checkpoints of other settings, other data, another model or another number of ranks."""
    old = state["settings"]
    changed = sorted(name for name in {*old, *identity} if old.get(name) != identity.get(name))
    if changed == ["identity"]:
        raise ConfigError(
            f"{folder}: checkpoints of other rows or of another base model (their identity differs)",
            fix=f"restore them, or delete {folder} and start again",
        )
    if changed:
        raise ConfigError(
            f"{folder}: checkpoints of other settings ({', '.join(changed)})",
            fix=f"restore them, or delete {folder} and start again",
        )
    if len(state["random"]) != ranks.size:
        raise ConfigError(
            f"{folder}: checkpoints of {counted(len(state['random']), 'rank')}, not {ranks.size}",
            fix=f"launch as many as before, or delete {folder} and start again",
        )


def _broadcast(ranks: Ranks, model: nn.Module, optimizer: optim.Optimizer | None = None) -> None:
    """Give every rank the weights of rank 0, and the state of its optimizer."""
    if ranks.size == 1:
        return
    weights = ranks.broadcast(dict(tree_flatten(model.trainable_parameters())))
    model.update(tree_unflatten(list(weights.items())))
    if optimizer is not None:
        arrays = ranks.broadcast(dict(tree_flatten(optimizer.state)))
        optimizer.state = tree_unflatten(list(arrays.items()))
        optimizer.init(model.trainable_parameters())
