"""Training a quantized student towards the unquantized one: ``quantize.refine: distill``.

The forward pass sees the weights as they will be stored, rounded to the grid of their mode; the backward pass
sees the weights themselves. What is learned depends on the mode:

- ``mxfp4``, ``nvfp4``, ``mxfp8``: the *latent* weights that are rounded, from GPTQ's compensated weights on,
  with Adam (quantization-aware distillation: NVIDIA 2026, arXiv 2601.20088);
- affine: an offset of at most half a step for each weight, added before it is rounded, by signed gradient
  descent (SignRound: Cheng et al. 2023, arXiv 2309.05516), from the unquantized weights on, on scales that
  were chosen for them.

Scales are fixed, as are all parameters that are not quantized. The loss is KL(unquantized || quantized) over
all real tokens. Where latents, gradients and Adam's moments of all weights together do not fit the memory,
each block is trained against its own output instead, one after the other:
:mod:`~mlx_distill.distill.refine_blocks`. Weights that are in none of the given quantizations, such as a
published checkpoint's MXFP4 experts, keep their bits.
"""

from __future__ import annotations

from dataclasses import asdict

from mlx_distill.distill.refine_blocks import FACTS, refine_blocks
from mlx_distill.distill.refine_estimate import RefineEstimate, estimate_refine
from mlx_distill.distill.refine_targets import check_rows, student_targets
from mlx_distill.distill.refine_training import RefineJob as RefineJob
from mlx_distill.distill.refine_training import RefineSettings as RefineSettings
from mlx_distill.distill.refine_training import (
    grid_optimizer,
    grid_weight,
    refined_layer,
    started,
    train_settings,
)
from mlx_distill.models.forward import compute_dtype
from mlx_distill.models.grid_layers import grid_layers
from mlx_distill.models.refined import Refined
from mlx_distill.runtime import total_memory
from mlx_distill.storage import read_jsonl, write_json
from mlx_distill.text import size
from mlx_distill.train.diagnostics import diagnose_curve
from mlx_distill.train.loop import train

_MEMORY_SHARE = 0.7  # of the machine's memory, where the settings name no limit


def refine(job: RefineJob) -> dict[str, Refined]:
    """Train what is rounded so that the quantized student answers as the unquantized one.

    A killed call that is repeated with the same job goes on from its last checkpoint, and gives the same bits
    as an uninterrupted one.

    Args:
        job: The student, its grids and rows, and the folder.

    Returns:
        The tensors of each quantized module, exactly on the grid: never quantize them again.

    Raises:
        DataError: the loss became NaN or infinite, or there is no row to learn from.
        Interrupted: stopped on request, after a checkpoint.
    """
    check_rows(job.rows)
    settings, lengths = job.settings, [len(row) for row in job.rows]
    estimate = estimate_refine(job.student, job.quantizations, lengths, settings.batch_size)
    budget = settings.memory_bytes or int(_MEMORY_SHARE * total_memory())
    if budget and estimate.end_to_end_bytes > budget:
        job.progress.note(
            f"refine: block by block, since end to end needs {size(estimate.end_to_end_bytes)} "
            f"of {size(budget)}"
        )
        return refine_blocks(job)
    return _end_to_end(job, estimate)


def _end_to_end(job: RefineJob, estimate: RefineEstimate) -> dict[str, Refined]:
    """All weights at once, against the distributions of the unquantized student."""
    student, settings, folder = job.student, job.settings, job.folder
    targets = student_targets(
        student, job.rows, folder / "targets", identity=job.identity, progress=job.progress
    )
    modules = dict(student.named_modules())
    weights = {
        path: grid_weight(modules[path], started(modules[path], job.begin(path), q), q)
        for path, q in job.quantizations.items()
    }
    config = train_settings(settings)
    batches = targets.dataset(config).train_batches(config.batch_size, config.seed)
    with (
        grid_layers(student, weights, compute_dtype(student)) as layers,
        job.progress.task("refine", total=settings.steps, unit="step") as bar,
    ):
        result = train(
            student,
            batches,
            targets.objective(),
            grid_optimizer(weights, settings),
            config,
            folder=folder,
            hooks=[lambda row: bar.update(row["step"], loss=row["loss"])],
            stop=job.stop,
            identity=job.key,
        )
        refined = {path: refined_layer(layer) for path, layer in layers.items()}
    metrics = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    for warning in diagnose_curve(metrics):
        job.progress.note(f"refine: {warning}")
    facts = {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "estimate": asdict(estimate),
    }
    write_json(folder / FACTS, {"by": "end to end", **facts})
    return refined
