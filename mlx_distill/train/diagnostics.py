"""The guard against NaN: stop before the weights are touched, name the rows, keep the batch; and never keep
weights that are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.errors import DataError
from mlx_distill.records import Batch
from mlx_distill.storage import atomic_path, write_json
from mlx_distill.train import checkpoint
from mlx_distill.train.updates import Window

_UNTOUCHED = "the weights are those of the step before"
_SAVED = ("inputs", "labels", "mask", "segments")


def stop_on_nan(
    folder: Path,
    step: int,
    window: Sequence[Batch],
    result: Window,
    norm: float,
    rank: int = 0,
    *,
    moved: bool = False,
) -> NoReturn:
    """Save the window's micro-batches and end the run.

    ``folder/nan.safetensors`` holds ``N.inputs``, ``N.labels``, ``N.mask`` and, where rows share lines,
    ``N.segments`` of micro-batch N, ``folder/nan.json`` the step, the rows and the losses; each rank writes
    its own (``nan-1.json``, ...).

    ``moved`` says that weights were updated before it showed.

    Raises:
        DataError: always, naming the rows of the micro-batches whose loss is not finite, or of all where only
            the gradient is.
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
    shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
    raise DataError(
        f"step {step}: the {what} is not a number (rows {shown or 'unknown'}); the batch is in {folder / name}.safetensors",
        fix=f"look at those rows, or lower the learning rate; {'the last checkpoint stands' if moved else _UNTOUCHED}",
    )


def check_weights(model: nn.Module, folder: Path, step: int) -> None:
    """Refuse to keep trained weights of which one is NaN or infinite: a finite gradient can still throw them
    out of a small type's range.

    Raises:
        DataError: naming the first such weight.
    """
    for path, weight in tree_flatten(model.trainable_parameters()):
        if not mx.isfinite(weight).all().item():
            stop_on_weights(folder, step, f"{path} holds numbers that are not finite")


def stop_on_weights(folder: Path, step: int, what: str) -> NoReturn:
    """End a run whose weights are spoilt already.

    Raises:
        DataError: always, saying which checkpoint stands.
    """
    last = checkpoint.latest(folder / "checkpoints")
    stands = f"the checkpoint {last} stands" if last else "there is no checkpoint yet"
    raise DataError(f"after step {step} {what}", fix=f"lower the learning rate and start again; {stands}")


_ROSE = 1.05  # a loss this much above another is no accident of the order of the rows
_LEAPT = 2.0  # one this much above all the first ones threw the weights away
_CURE = "lower the learning rate"


def diagnose_curve(rows: Iterable[Mapping[str, Any]], *, use_best: bool = False) -> list[str]:
    """Reasons not to trust a training's result, each with the cure; none where its losses fell.

    Args:
        rows: Of ``metrics.jsonl``, in order. A step that had nothing to train on (loss and gradient 0) says
            nothing.
        use_best: The result is the weights with the lowest validation loss.

    >>> diagnose_curve({"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate((2.5, 800.0), 1))
    ['the loss rose from 2.5 to 800 at step 2: lower the learning rate']
    """
    rows = [row for row in rows if row["loss"] or row["grad_norm"]]
    if len(rows) < 2:
        return []
    out, tenth = [], max(len(rows) // 10, 1)
    begins, ends = ([row["loss"] for row in some] for some in (rows[:tenth], rows[-tenth:]))
    first, last = sum(begins) / tenth, sum(ends) / tenth
    highest = max(rows, key=lambda row: row["loss"])
    if highest["loss"] > _LEAPT * max(begins):
        out.append(
            f"the loss rose from {first:.4g} to {highest['loss']:.4g} at step {highest['step']}: {_CURE}"
        )
    elif last > _ROSE * first:
        out.append(f"the loss ended at {last:.4g}, above the {first:.4g} that it began with: {_CURE}")
    if not rows[-1]["grad_norm"]:
        still = (
            next(row["step"] for row in reversed(rows) if row["grad_norm"])
            if any(row["grad_norm"] for row in rows)
            else 0
        )
        out.append(
            f"the gradient has been 0 since step {still + 1}, so nothing was learned any more: {_CURE}"
        )
    looks = [(row["valid_loss"], row["step"]) for row in rows if "valid_loss" in row]
    if looks and not use_best:
        best, step = min(looks)
        if looks[-1][0] > _ROSE * best:
            cure = "use_best: true keeps that one, fewer epochs or a lower learning rate do better"
            out.append(
                f"the validation loss rose from {best:.4g} at step {step} to {looks[-1][0]:.4g} at the end: {cure}"
            )
    return out
