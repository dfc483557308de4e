"""What the curve of a finished training says against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_ROSE = 1.05  # a loss this much above another is no accident of the order of the rows


def doubts(rows: Iterable[Mapping[str, Any]], *, use_best: bool = False) -> list[str]:
    """Reasons not to trust a training's result, each with the cure; none where its losses fell.

    Args:
        rows: Of ``metrics.jsonl``, in order.
        use_best: The result is the weights with the lowest validation loss.

    >>> doubts([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 800.0}])
    ['the loss ended at 800, above the 2.5 that it began with: lower the learning rate']
    """
    losses, looks = [], []
    for row in rows:
        losses.append(row["loss"])
        if "valid_loss" in row:
            looks.append((row["valid_loss"], row["step"]))
    out = []
    tenth = max(len(losses) // 10, 1)
    first, last = (sum(some) / tenth for some in (losses[:tenth], losses[-tenth:]))
    if len(losses) > 1 and last > _ROSE * first:
        out.append(f"the loss ended at {last:.4g}, above the {first:.4g} that it began with: lower the learning rate")
    if looks and not use_best:
        best, step = min(looks)
        if looks[-1][0] > _ROSE * best:
            cure = "use_best: true keeps that one, fewer epochs or a lower learning rate do better"
            out.append(f"the validation loss rose from {best:.4g} at step {step} to {looks[-1][0]:.4g} at the end: {cure}")
    return out
