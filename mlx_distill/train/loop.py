"""The one training loop: SFT, distillation and refinement differ in the objective and in where batches come
from.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from mlx_distill.train.objective import Objective, trained_tokens
from mlx_distill.train.preflight import check_settings
from mlx_distill.train.profiling import Stopwatch
from mlx_distill.train.trunk_head import Trunk, make_trunk
from mlx_distill.train.updates import (
    Compress,
    Window,
    apply_update,
    clip_scale,
    evaluate,
    frozen,
    global_norm,
    refresh_bases_in_groups,
    streamed_step,
    window_gradients,
)


@dataclass
class TrainProgress:
    """Where a run stands; all of it is in each checkpoint."""

    step: int = 0
    micro: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    bad_evals: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainProgress:
        """From a checkpoint; ``waiting`` is an older name of ``bad_evals``."""
        values = dict(values)
        if "waiting" in values:
            values["bad_evals"] = values.pop("waiting")
        return cls(**values)


@dataclass(frozen=True)
class TrainState:
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


def run_steps(setup: TrainState, run: TrainProgress, flag: StopFlag, hooks: Sequence[Hook]) -> bool:
    """Step until the end; True where patience ended it first."""
    patience = setup.settings.patience
    if 0 < patience <= run.bad_evals:
        return True
    estimate, every = Estimate(setup.steps, run.step), setup.settings.checkpoint_every
    setup.watch.take()
    while run.step < setup.steps:
        row = _step(setup, run)
        with setup.watch.part("validate"):
            out_of_patience = _validate(setup, run, row)
        run.last = row
        setup.log.write(row)
        told = {
            "steps": setup.steps,
            "terms": {k: row[k] for k in setup.objective.coefficients},
            "eta_s": estimate.left(run.step),
        }
        told["timing"] = setup.watch.take()
        with setup.watch.part("hooks"):
            for hook in hooks:
                hook({**row, **told})
        stopping = bool(setup.ranks.max(float(bool(flag))))
        if stopping or out_of_patience or run.step == setup.steps or run.step % every == 0:
            with setup.watch.part("save"):
                _save(setup, run)
        if out_of_patience:
            return True
        if stopping and run.step < setup.steps:
            raise Interrupted(
                f"stopped after step {run.step} of {setup.steps}",
                fix="run the same command again: it goes on from there",
            )
    return False


def _step(setup: TrainState, run: TrainProgress) -> dict[str, Any]:
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


def _move(setup: TrainState, run: TrainProgress, window: Sequence[Batch]) -> tuple[Window, float]:
    """Differentiate, clip, update; what the window gave and the gradient's norm."""

    def guard(result: Window, norm: float, moved: bool = False) -> None:
        if not (math.isfinite(norm) and math.isfinite(result.loss)):
            stop_on_nan(setup.folder, run.step + 1, window, result, norm, setup.ranks.rank, moved=moved)

    model, objective, optimizer, watch, limit = (
        setup.model,
        setup.objective,
        setup.optimizer,
        setup.watch,
        setup.settings.clip_norm,
    )
    low = hasattr(optimizer, "enter")  # it takes gradients into a subspace, and those are small
    if setup.settings.stream_gradients and not low:
        return streamed_step(model, window[0], objective, optimizer, limit, guard, watch, setup.trunk)
    # At once into the subspace where there is nothing to add up.
    alone = setup.settings.accumulate == 1 and setup.ranks.size == 1
    compress: Compress | None = getattr(optimizer, "enter" if alone else "compress", None)
    entered: dict[str, mx.array] = {}
    if low and not alone:
        entered = refresh_bases_in_groups(
            model, optimizer, lambda: window_gradients(model, window, objective, setup.ranks, compress, watch)
        )
    with frozen(model, entered):
        # A compiled trunk holds what does not move as constants, so it serves only where all of them move
        # that did.
        result = window_gradients(
            model, window, objective, setup.ranks, compress, watch, None if entered else setup.trunk
        )
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


def _window(setup: TrainState, run: TrainProgress) -> list[Batch]:
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
    if not setup.ranks.max(len(window)):
        raise DataError(
            f"the batches ran out at step {run.step + 1}", fix="a source of batches goes on epoch after epoch"
        )
    run.micro += len(window)
    return window


def _validate(setup: TrainState, run: TrainProgress, row: dict[str, Any]) -> bool:
    """Validation where it is due; True where ``patience`` is out."""
    every = setup.settings.evaluate_every
    if not setup.valid or not every or (run.step % every and run.step != setup.steps):
        return False
    found = evaluate(setup.model, setup.valid, setup.objective, setup.ranks)
    if not all(map(math.isfinite, found.values())):
        stop_on_weights(setup.folder, run.step, "the validation loss is not a number")
    row |= {f"valid_{name}": value for name, value in found.items()}
    if run.best_loss is None or found["loss"] < run.best_loss:
        run.best_step, run.best_loss, run.bad_evals = run.step, found["loss"], 0
        if setup.ranks.rank == 0:
            checkpoint.save_best(
                setup.folder / "checkpoints", {"step": run.step, "valid_loss": found["loss"]}, setup.model
            )
    else:
        run.bad_evals += 1
    return 0 < setup.settings.patience <= run.bad_evals


def _save(setup: TrainState, run: TrainProgress) -> None:
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
        checkpoint.save(
            setup.folder / "checkpoints",
            state,
            setup.model,
            setup.optimizer,
            keep=setup.settings.keep_checkpoints,
        )
    setup.ranks.barrier()


@dataclass(frozen=True)
class TrainResult:
    """What a finished training came to.

    ``steps`` optimizer steps; ``metrics`` the last step's row of metrics.jsonl; ``best`` the folder of the
    best weights (None without validation rows), with their ``best_step`` and ``best_loss``; ``seconds`` and
    ``tokens`` over all parts of an interrupted run; ``resumed`` the step it went on from, 0 for a fresh
    start.
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
    r"""Train ``model``'s trainable parameters in place; go on from ``folder/checkpoints`` where there are
    some.

    One step takes ``accumulate`` micro-batches a rank: see
    :func:`~mlx_distill.train.updates.window_gradients`. The gradient is clipped by its global norm, a loss or
    norm that is not finite ends the run before the weights are touched, and a run that was killed anywhere
    goes on bitwise as if it had not been. A step whose batches have nothing to train on counts and moves
    nothing, and the schedule waits for the next.

    Args:
        model: Only what is not frozen moves. On return it holds the last weights, or with
            ``settings.use_best`` the best ones.
        batches: An endless stream with a position; ``len`` is the micro-batches of an epoch.
        objective: Terms of the loss.
        optimizer: An ``mlx.optimizers.Optimizer``; its schedule lives in it.
        settings: Accumulation, clipping, length, intervals, patience and seed.
        folder: Gets ``checkpoints/`` and ``metrics.jsonl``.
        valid: A fixed set of batches, looked at every ``evaluate_every`` steps and at the end.
        hooks: Called after each step with its row: see :mod:`~mlx_distill.train.events`.
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
    steps = total_steps(settings, int(ranks.max(len(batches))))
    _check(model, optimizer, settings, steps, ranks, bool(valid))
    if settings.compile and objective.head_split is None:
        raise ConfigError(
            "compile: true for an objective in one piece",
            fix="make it with read_objective, or leave compile out",
        )
    checked = {**keyed(settings), "identity": identity}
    with ExitStack() as stack:
        flag = stop if stop is not None else stack.enter_context(stop_on_signal())
        stack.enter_context(_training(model))
        run, position = _start(folder, model, optimizer, batches, checked, settings.seed, ranks)
        if settings.grad_checkpoint:
            stack.enter_context(checkpointed_layers(model))
        log = MetricsLog(folder / "metrics.jsonl" if ranks.rank == 0 else None, position)
        stack.callback(log.close)
        trunk = make_trunk(model, compiled=True) if settings.compile else None
        watch = watch or Stopwatch()
        setup = TrainState(
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
            checked,
            watch,
            trunk,
        )
        resumed = run.step
        try:
            stopped_early = run_steps(setup, run, flag, hooks)
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
        run.step,
        run.last,
        best if run.best_step is not None else None,
        run.best_step,
        run.best_loss,
        run.seconds,
        run.tokens,
        resumed,
        stopped_early,
    )


def _check(
    model: nn.Module, optimizer: optim.Optimizer, settings: TrainConfig, steps: int, ranks: Ranks, looks: bool
) -> None:
    """Refuse what cannot come to anything."""
    if not tree_flatten(model.trainable_parameters()):
        raise ConfigError("no weight of the model is trainable", fix="check target_modules")
    laid_out = scheduled_steps(optimizer)
    if laid_out not in (None, steps):
        raise ConfigError(
            f"a schedule over {laid_out} steps for a run of {steps}", fix=f"make_optimizer(settings, {steps})"
        )
    if (settings.patience or settings.use_best) and not looks:
        name = "patience" if settings.patience else "use_best"
        raise ConfigError(
            f"{name} without a validation row to look at", fix="raise data.valid_fraction, or leave it out"
        )
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
    folder: Path,
    model: nn.Module,
    optimizer: optim.Optimizer,
    batches: BatchSource,
    settings: Mapping[str, Any],
    seed: int,
    ranks: Ranks,
) -> tuple[TrainProgress, int]:
    """Restore the newest checkpoint, or begin; return the run and the length of metrics.jsonl that belongs to
    it.

    Rank 0's disk alone is read: the other ranks may be other machines, and get what it holds.
    """
    optimizer.init(model.trainable_parameters())
    path = checkpoint.latest(folder / "checkpoints") if ranks.rank == 0 else None
    state = json.loads(ranks.broadcast_text(json.dumps(checkpoint.read_state(path) if path else None)))
    reset_peak_memory()
    if state is None:
        # Ranks drop different units; rank 0 draws what a run of one rank draws.
        mx.random.seed(seed + 1_000_003 * ranks.rank)
        return TrainProgress(), 0
    where, old = folder / "checkpoints", state["settings"]
    changed = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
    if changed == ["identity"]:
        raise ConfigError(
            f"{where}: checkpoints of other rows or of another base model (their identity differs)",
            fix=f"restore them, or delete {where} and start again",
        )
    if changed:
        raise ConfigError(
            f"{where}: checkpoints of other settings ({', '.join(changed)})",
            fix=f"restore them, or delete {where} and start again",
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
    return TrainProgress.from_json(state["run"]), int(state["metrics_bytes"])


def _share(ranks: Ranks, model: nn.Module, optimizer: optim.Optimizer | None = None) -> None:
    """Give every rank the weights of rank 0, and the state of its optimizer."""
    if ranks.size == 1:
        return
    model.update(
        tree_unflatten(list(ranks.broadcast(dict(tree_flatten(model.trainable_parameters()))).items()))
    )
    if optimizer is not None:
        optimizer.state = tree_unflatten(list(ranks.broadcast(dict(tree_flatten(optimizer.state))).items()))
        optimizer.init(model.trainable_parameters())
