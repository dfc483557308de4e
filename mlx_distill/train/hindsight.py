"""What the curve of a finished training says against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_ROSE = 1.05  # a loss this much above another is no accident of the order of the rows
_LEAPT = 2.0  # one this much above all the first ones threw the weights away
_CURE = "lower the learning rate"


def doubts(rows: Iterable[Mapping[str, Any]], *, use_best: bool = False) -> list[str]:
    """Reasons not to trust a training's result, each with the cure; none where its losses fell.

    Args:
        rows: Of ``metrics.jsonl``, in order. A step that had nothing to train on (loss and gradient 0) says nothing.
        use_best: The result is the weights with the lowest validation loss.

    >>> doubts({"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate((2.5, 800.0), 1))
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
        out.append(f"the loss rose from {first:.4g} to {highest['loss']:.4g} at step {highest['step']}: {_CURE}")
    elif last > _ROSE * first:
        out.append(f"the loss ended at {last:.4g}, above the {first:.4g} that it began with: {_CURE}")
    if not rows[-1]["grad_norm"]:
        still = next(row["step"] for row in reversed(rows) if row["grad_norm"]) if any(row["grad_norm"] for row in rows) else 0
        out.append(f"the gradient has been 0 since step {still + 1}, so nothing was learned any more: {_CURE}")
    looks = [(row["valid_loss"], row["step"]) for row in rows if "valid_loss" in row]
    if looks and not use_best:
        best, step = min(looks)
        if looks[-1][0] > _ROSE * best:
            cure = "use_best: true keeps that one, fewer epochs or a lower learning rate do better"
            out.append(f"the validation loss rose from {best:.4g} at step {step} to {looks[-1][0]:.4g} at the end: {cure}")
    return out
