"""What both ways of refinement share: settings, what is learned of a module, its optimizer, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_distill.models.grid_layers import GridWeight, packed_grid_layer, trained_values
from mlx_distill.models.grids import quantize, stored_scales
from mlx_distill.models.modules import dequantized_weight
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.refined import Refined
from mlx_distill.optim.adamw import AdamW
from mlx_distill.optim.schedules import make_schedule
from mlx_distill.optim.sign_descent import SignDescent
from mlx_distill.progress import NullProgress, Progress
from mlx_distill.recipe import TrainConfig
from mlx_distill.runtime import StopFlag
from mlx_distill.storage import digest


@dataclass(frozen=True)
class RefineSettings:
    """How a quantized student is refined.

    Args:
        steps: Optimizer steps, of each block where blocks are trained one after the other.
        batch_size: Rows a step, on average.
        learning_rate: Of Adam on latent weights, falling linearly to 0. It is in the units of the weights:
            ten times as much diverges.
        seed: Of the order of rows.
        memory_bytes: What the training may use; 0: 70 % of the machine's memory.
        checkpoint_every: Steps between checkpoints.
        grad_checkpoint: Recompute activations in the backward pass.
    """

    steps: int = 50
    batch_size: int = 4
    learning_rate: float = 1.5e-4
    seed: int = 0
    memory_bytes: int = 0
    checkpoint_every: int = 25
    grad_checkpoint: bool = False

    def keyed(self) -> dict[str, Any]:
        """What changes the result."""
        return {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate", "seed")}


DEFAULTS = RefineSettings()


@dataclass(frozen=True)
class RefineJob:
    """A student whose quantized weights are to be trained, and what with.

    Args:
        student: The unquantized model, its adapter merged. At the end it is as before, but frozen.
        quantizations: Of each module to quantize, by path: linear layers, embeddings, stacks of experts.
        start: The results of calibration: the scales, and the latent weights to start at. Modules that it has
            not start at their own weights, on the scales that are best without data.
        weighted: The results with weighted scales alone, whose scales fit the unquantized weights and not
            corrected ones: with offsets, which begin there, modules have these. Those of ``start`` where it
            lacks one.
        rows: Token ids of whole chats.
        folder: Gets the targets, the checkpoints, ``metrics.jsonl`` and ``refine.json``.
        settings: Length, rates, memory.
        identity: Of the student's weights and of ``start``; checkpoints and targets of another are not used.
        progress: Shows the steps, and why blocks are trained one after the other.
        stop: Checked after each step.
    """

    student: Any
    quantizations: Mapping[str, Quantization]
    start: Mapping[str, Refined]
    rows: Sequence[Sequence[int]]
    folder: Path
    settings: RefineSettings = DEFAULTS
    identity: str = ""
    progress: Progress = field(default_factory=NullProgress)
    stop: StopFlag | None = None
    weighted: Mapping[str, Refined] = field(default_factory=dict)

    def begin(self, path: str) -> Refined | None:
        """What a module starts from when all are trained at once."""
        q = self.quantizations[path]
        return (self.weighted.get(path) if q.mode == "affine" else None) or self.start.get(path)

    @property
    def key(self) -> str:
        """Names the weights and the grids, which a checkpoint must have been made with."""
        return digest([self.identity, {path: q.config for path, q in self.quantizations.items()}])


def started(module: Any, found: Refined | None, quantization: Quantization) -> Refined:
    """What calibration found for a module, or without it (an embedding that is not the head has no inputs to
    measure) the scales that are best without data.
    """
    if found is not None:
        return found
    weight = dequantized_weight(module)
    return Refined(quantize(weight, quantization), weight)


def grid_weight(
    module: Any, start: Refined, quantization: Quantization, *, latent: bool = False
) -> GridWeight:
    """What is learned of a module: an offset in the affine modes, or with ``latent`` and in all other modes
    the latent weight.
    """
    scales = stored_scales(start.parts, quantization)
    if quantization.mode == "affine" and not latent:
        weight = dequantized_weight(module) if "scales" in module else module.weight
        return GridWeight(weight, scales, quantization, learns_offset=True)
    return GridWeight(start.latent, scales, quantization)


def refined_layer(layer: Any) -> Refined:
    """The tensors of a trained layer."""
    parts = packed_grid_layer(layer)
    mx.eval(parts)
    return Refined(parts, trained_values(layer))


def grid_optimizer(weights: Mapping[str, GridWeight], settings: RefineSettings) -> optim.Optimizer:
    """Adam for latent weights, signed gradient descent for offsets; the rates fall linearly to 0."""
    steps = settings.steps
    adam = AdamW(make_schedule("linear", settings.learning_rate, steps))
    signs = SignDescent(make_schedule("linear", 1.0 / steps, steps))
    kinds = {weight.learns_offset for weight in weights.values()}
    if kinds == {True, False}:
        return optim.MultiOptimizer([adam, signs], [lambda path, _: not path.endswith(".offset")])
    return signs if kinds == {True} else adam


def train_settings(settings: RefineSettings) -> TrainConfig:
    """The settings of the training loop."""
    return TrainConfig(
        method="full",
        learning_rate=settings.learning_rate,
        schedule="linear",
        warmup=0.0,
        clip_norm=0.0,
        batch_size=settings.batch_size,
        accumulate=1,
        steps=settings.steps,
        evaluate_every=0,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=1,
        grad_checkpoint=settings.grad_checkpoint,
        seed=settings.seed,
    )
