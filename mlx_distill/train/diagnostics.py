"""Diagnostics of a training: losses and weights that are not finite stop it, and a loss curve is checked for
signs that the training went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.errors import NotFiniteError
from mlx_distill.records import Batch
from mlx_distill.storage import atomic_path, write_json
from mlx_distill.train import checkpoint
from mlx_distill.train.gradients import WindowGradients

_SAVED = ("inputs", "labels", "mask", "segments")
_ROWS_SHOWN = 16


def stop_on_nan(
    folder: Path,
    step: int,
    window: Sequence[Batch],
    result: WindowGradients,
    norm: float,
    rank: int = 0,
    *,
    updated: bool = False,
) -> NoReturn:
    """Save the window's micro-batches and end the run.

    ``folder/nan.safetensors`` holds ``N.inputs``, ``N.labels``, ``N.mask`` and, for packed rows,
    ``N.segments`` of micro-batch N, ``folder/nan.json`` the step, the rows and the losses; each rank writes
    its own files (``nan-1.json``, ...).

    Args:
        folder: Gets the files.
        step: Number of the step.
        window: This rank's micro-batches.
        result: Their loss.
        norm: Of the gradient.
        rank: Of this process.
        updated: Whether weights were updated before the norm was known.

    Raises:
        NotFiniteError: always, naming the rows of the micro-batches whose loss is not finite, or all rows
            where only the gradient is not.
    """
    bad = [i for i, loss in enumerate(result.losses) if not math.isfinite(loss)] or list(range(len(window)))
    rows = sorted({row for i in bad for row in window[i].rows})
    arrays = {f"{i}.{name}": getattr(batch, name) for i, batch in enumerate(window) for name in _SAVED}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    name = f"nan-{rank}" if rank else "nan"
    if arrays:
        with atomic_path(folder / f"{name}.safetensors") as path:
            mx.save_safetensors(str(path), arrays)
    notes = {
        "step": step,
        "loss": repr(result.loss),
        "grad_norm": repr(norm),
        "suspects": bad,
        "micro_batches": [
            {"rows": list(b.rows), "loss": repr(loss)} for b, loss in zip(window, result.losses, strict=True)
        ],
    }
    write_json(folder / f"{name}.json", notes)
    what = "loss" if not math.isfinite(result.loss) else "gradient"
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN])) + (", ..." if len(rows) > _ROWS_SHOWN else "")
    left = "the last checkpoint is intact" if updated else "the weights are those of the step before"
    raise NotFiniteError(
        f"step {step}: the {what} is not a number (rows {shown or 'unknown'}); "
        f"the batch is in {folder / name}.safetensors",
        reason=f"the {what} of step {step} is not a number",
        fix=f"check those rows, or lower the learning rate; {left}",
    )


def check_weights(model: nn.Module, folder: Path, step: int) -> None:
    """Refuse to save trained weights of which one is NaN or infinite: with a finite gradient too, an update
    can exceed the range of a 16-bit type.

    Raises:
        NotFiniteError: naming the first such parameter.
    """
    for path, weight in tree_flatten(model.trainable_parameters()):
        if not mx.isfinite(weight).all().item():
            stop_on_weights(folder, step, f"{path} holds numbers that are not finite")


def stop_on_weights(folder: Path, step: int, what: str) -> NoReturn:
    """End a run whose weights already hold numbers that are not finite.

    Raises:
        NotFiniteError: always, saying which checkpoint is intact.
    """
    last = checkpoint.latest(folder / "checkpoints")
    left = f"the checkpoint {last} is intact" if last else "there is no checkpoint yet"
    told = f"after step {step} {what}"
    raise NotFiniteError(told, reason=told, fix=f"lower the learning rate and start again; {left}")


_INCREASE = 1.05  # ratio of two losses that is more than the noise of the rows' order
_DIVERGENCE = 2.0  # ratio of a loss to the first ones that shows a divergence
_LOWER_RATE = "lower the learning rate"


def diagnose_curve(rows: Iterable[Mapping[str, Any]], *, use_best: bool = False) -> list[str]:
    """Warnings about a training's result, each with what to do; none where the losses fell.

    Args:
        rows: Of ``metrics.jsonl``, in order. Steps without a trained token (loss and gradient 0) are ignored.
        use_best: The result is the weights with the lowest validation loss.

    >>> diagnose_curve({"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate((2.5, 800.0), 1))
    ['the loss rose from 2.5 to 800 at step 2: lower the learning rate']
    """
    rows = [row for row in rows if row["loss"] or row["grad_norm"]]
    if len(rows) < 2:
        return []
    warnings = [_training_warning(rows), _gradient_warning(rows)]
    if not use_best:
        warnings.append(_validation_warning(rows))
    return [warning for warning in warnings if warning]


def _training_warning(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """About the training loss; the means of the first and the last tenth are compared."""
    tenth = max(len(rows) // 10, 1)
    start = [row["loss"] for row in rows[:tenth]]
    first, last = sum(start) / tenth, sum(row["loss"] for row in rows[-tenth:]) / tenth
    highest = max(rows, key=lambda row: row["loss"])
    if highest["loss"] > _DIVERGENCE * max(start):
        step = highest["step"]
        return f"the loss rose from {first:.4g} to {highest['loss']:.4g} at step {step}: {_LOWER_RATE}"
    if last > _INCREASE * first:
        return f"the loss ended at {last:.4g}, above the {first:.4g} of the start: {_LOWER_RATE}"
    return None


def _gradient_warning(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """About a gradient that was 0 until the end."""
    if rows[-1]["grad_norm"]:
        return None
    step = next((row["step"] for row in reversed(rows) if row["grad_norm"]), 0)
    return f"the gradient has been 0 since step {step + 1}, so nothing was learned any more: {_LOWER_RATE}"


def _validation_warning(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """About a validation loss that rose after its lowest value."""
    losses = [(row["valid_loss"], row["step"]) for row in rows if "valid_loss" in row]
    if not losses:
        return None
    best, step = min(losses)
    last = losses[-1][0]
    if last <= _INCREASE * best:
        return None
    return (
        f"the validation loss rose from {best:.4g} at step {step} to {last:.4g} at the end: "
        "use_best: true keeps the best weights; fewer epochs or a lower learning rate train better ones"
    )
