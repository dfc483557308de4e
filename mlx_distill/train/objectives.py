"""What a training minimizes: terms as sums, their weights from the masks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.records import Batch


@dataclass(frozen=True)
class Objective:
    """Terms of a loss.

    Args:
        weights: Each term's weight in a micro-batch, from the masks alone, on the host. A term's loss is its sum over the whole
            window divided by its weight over the whole window.
        sums: Each term's sum over a micro-batch, a differentiable scalar. Called only where a weight is above zero.
        coefficients: What each term counts in the loss; its keys are the terms.
    """

    weights: Callable[[Batch], Mapping[str, float]]
    sums: Callable[[nn.Module, Batch], Mapping[str, mx.array]]
    coefficients: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})


def trained_tokens(batch: Batch) -> float:
    """How many labels of a batch are trained on."""
    return float(np.array(batch.mask, copy=False).sum(dtype=np.float64))


def sft() -> Objective:
    """Supervised fine-tuning: cross-entropy (nats) per trained token, one term ``text``."""

    def sums(model: nn.Module, batch: Batch) -> dict[str, mx.array]:
        logits = model(batch.inputs).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, batch.labels, reduction="none")
        return {"text": mx.where(batch.mask > 0, losses * batch.mask, 0.0).sum()}

    return Objective(weights=lambda batch: {"text": trained_tokens(batch)}, sums=sums, coefficients={"text": 1.0})
