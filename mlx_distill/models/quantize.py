"""Quantizing a model, or an adapter with its base model.

Weights that are quantized already keep their bits; the error of every other weight is in the report.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.adapter_import import check_adapter
from mlx_distill.models.adapters import SAVED_LEAVES, adapter_settings
from mlx_distill.models.checkpoint.layout import TensorPlan
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import Source, read_header
from mlx_distill.models.checkpoint.tensor_job import (
    LowRankUpdate,
    Replacement,
    TensorJob,
    TensorRow,
    Update,
    from_raw,
    safetensors_type,
    to_raw,
)
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES, MEMORY_BYTES
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_base,
    is_adapter,
    read_object,
    with_vocabulary,
)
from mlx_distill.models.convert import (
    shard_hashes,
    stream_shards,
    tensor_rows,
    tensor_table,
    update_loss_note,
    write_other_files,
)
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import replace_tokenizer, resolve
from mlx_distill.models.quantization import Quantization, TensorAction, quantization_policy
from mlx_distill.models.refined import Refined
from mlx_distill.models.trained_on import replace_trained_on
from mlx_distill.progress import Progress
from mlx_distill.storage import atomic_path, sha256, write_json


@dataclass(frozen=True)
class QuantizeReport:
    """A line for each tensor, and totals.

    ``adapter`` is ``none``, ``merged`` or ``kept``; ``notes`` say how the source was read.
    """

    source: str
    destination: str
    mode: str
    adapter: str
    rows: tuple[TensorRow, ...]
    parameters: int
    source_bytes: int
    stored_bytes: int
    adapter_bytes: int
    seconds: float
    resumed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter of the base model."""
        return 8 * self.stored_bytes / max(self.parameters, 1)

    @property
    def stayed(self) -> tuple[str, ...]:
        """Weights that were not quantized as requested, with the reason."""
        return tuple(
            f"{row.name}: {row.note}"
            for row in self.rows
            if row.note and "quantized" not in row.note and row.note != "bit for bit"
        )

    @property
    def largest_error(self) -> float:
        """The largest relative error of a tensor."""
        return max((row.error for row in self.rows), default=0.0)

    def facts(self) -> dict[str, Any]:
        """Totals, for a manifest."""
        return {
            "mode": self.mode,
            "adapter": self.adapter,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "adapter_bytes": self.adapter_bytes,
            "largest_error": self.largest_error,
            "stayed": list(self.stayed),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "rows": [row.to_dict() for row in self.rows],
            "bits_per_weight": self.bits_per_weight,
        }

    def lines(self) -> list[str]:
        """The report in lines of text: the table, then totals."""
        adapter = {
            "none": "",
            "merged": ", the adapter merged",
            "kept": f", and the adapter beside it ({self.adapter_bytes / 1e6:,.1f} MB)",
        }
        sizes = f"{self.stored_bytes / 1e6:,.1f} MB of {self.source_bytes / 1e6:,.1f} MB"
        total = f"{self.bits_per_weight:.2f} bits per weight, {sizes}"
        return [
            *tensor_table(self.rows),
            f"{self.mode}: {total}{adapter[self.adapter]}",
            f"largest relative error of a tensor: {self.largest_error:.2e}",
            *update_loss_note(self.rows),
            *self.notes,
        ]


def quantize_folder(
    source: str | Path,
    destination: str | Path,
    mode: str,
    group_size: int = 0,
    adapter: str = "merge",
    keep: Sequence[str] = ("router",),
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a model folder or an adapter folder, in bounded memory, resumable, never half-written.

    Args:
        source: A folder in the MLX or the Hugging Face layout, a Hub id, or an adapter folder.
        destination: The folder to write; :func:`mlx_distill.models.load.load` reads it.
        mode: ``affine1`` to ``affine8``, ``mxfp4``, ``nvfp4``, ``mxfp8``, or a mixed recipe. Weights that are
            quantized already are not changed.
        group_size: Weights that share a scale; 0 for the default of the mode. If it does not divide a row, a
            smaller one is used, or the weight is not quantized.
        adapter: ``merge`` adds it to the weights before they are quantized (quantized weights that it changes
            are dequantized and quantized again in the same mode, with the error in the report). ``keep`` does
            not quantize it: it is written to ``destination``, and its quantized base to ``destination/base``.
        keep: Parts of the names of modules that are not quantized.
        max_shard_bytes: Largest file; a larger tensor has a file of its own.
        memory_bytes: Bound on the working buffers.
        progress: Shows the progress.

    Raises:
        ConfigError: an unknown mode or group size.
        ModelError: a damaged source, or an adapter that does not fit its base.
        FileError: a failed write, or a destination that holds something else.
    """
    folder, destination = resolve(source), Path(destination)
    settings = {
        "mode": mode,
        "group_size": group_size,
        "adapter": adapter,
        "keep": list(keep),
        "max_shard_bytes": max_shard_bytes,
    }
    with staged_folder(destination, folder, "quantize", settings, {"source": source_key(folder)}) as staged:
        report = quantize_into(
            folder,
            staged.folder,
            mode,
            group_size,
            adapter,
            keep,
            max_shard_bytes=max_shard_bytes,
            memory_bytes=memory_bytes,
            progress=progress,
        )
        report = replace(report, source=str(source), destination=str(destination))
        base = "base/" if report.adapter == "kept" else ""
        hashes = shard_hashes(staged.folder / base)
        staged.hashes.update({base + name: sha for name, sha in hashes.items()})
        staged.recorded.update(source=str(source), **report.facts(), seconds=report.seconds)
    return report


def quantize_into(
    source: str | Path,
    folder: str | Path,
    mode: str,
    group_size: int = 0,
    adapter: str = "merge",
    keep: Sequence[str] = ("router",),
    *,
    chosen: Mapping[str, Quantization] | None = None,
    refined: Mapping[str, Refined] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize into the partial folder of a stage, which the caller publishes.

    The arguments are those of :func:`quantize_folder`; ``chosen`` are quantizations of some modules instead
    of the mode's, by path, and ``refined`` the tensors of modules that are not rounded. Shards that an
    earlier call finished are kept.

    Raises:
        ModelError: a refined tensor of another type or shape than its quantization has.
    """
    began = time.perf_counter()
    source, folder = resolve(source), Path(folder)
    if adapter not in ("merge", "keep"):
        raise ConfigError(f"adapter: {adapter!r} is not merge or keep", fix="choose one of them")
    has_adapter = is_adapter(source)
    merges = has_adapter and adapter == "merge"
    plan, updates = plan_with_adapter(source, merges)
    jobs = plan_jobs(plan, updates, mode, group_size, keep, chosen)
    if refined:
        jobs = [_with_refined(job, refined.get(job.tensor.name.removesuffix(".weight"))) for job in jobs]
    model_folder = folder / "base" if has_adapter and not merges else folder
    salt = sha256(source / ADAPTER_FILE) if merges else ""
    if refined:
        salt += _content(refined)
    shards = stream_shards(
        jobs,
        model_folder,
        "quantize",
        max_shard_bytes=max_shard_bytes,
        memory_bytes=memory_bytes,
        salt=salt,
        notes=folder / "scratch",
        progress=progress,
    )
    write_other_files(model_folder, plan, jobs, shards)
    if has_adapter:
        replace_tokenizer(source, folder)
        replace_trained_on(source, folder)
    if model_folder != folder:
        _copy_adapter(source, folder)
    rows = tensor_rows(plan, jobs, shards)
    state = "merged" if merges else "kept" if has_adapter else "none"
    return QuantizeReport(
        str(source),
        str(folder),
        mode,
        state,
        rows,
        sum(r.parameters for r in rows),
        plan.checkpoint.nbytes,
        sum(o.nbytes for job in jobs for o in job.outputs),
        (source / ADAPTER_FILE).stat().st_size if has_adapter else 0,
        time.perf_counter() - began,
        sum(s.resumed for s in shards),
        plan.notes,
    )


def _copy_adapter(source: Path, folder: Path) -> None:
    with atomic_path(folder / ADAPTER_FILE) as path:
        shutil.copyfile(source / ADAPTER_FILE, path)
    write_json(folder / ADAPTER_CONFIG, {**read_object(source / ADAPTER_CONFIG), "base": "base"})


def plan_with_adapter(folder: Path, merges: bool) -> tuple[CheckpointPlan, dict[str, Update]]:
    """The plan of a model, or of the base model of an adapter folder, and the updates to merge into it.

    If the adapter stores an embedding with another number of rows, those of the base get as many.
    """
    if not is_adapter(folder):
        return plan_checkpoint(folder), {}
    plan = plan_checkpoint(adapter_base(folder))
    if not merges:
        return plan, {}
    check_adapter(folder, plan)
    return _resized(plan, folder), adapter_updates(folder)


def _resized(plan: CheckpointPlan, adapter: Path) -> CheckpointPlan:
    config, names = with_vocabulary(plan.config, adapter), plan.architecture.modules
    rows = config["vocab_size"]
    if rows == plan.config["vocab_size"]:
        return plan
    paths = (names.embedding, names.head)
    tensors = [_with_rows(t, rows) if t.name.rpartition(".")[0] in paths else t for t in plan.tensors]
    return replace(plan, config=config, tensors=tensors)


def _with_rows(tensor: TensorPlan, rows: int) -> TensorPlan:
    """A matrix cut to a number of rows, or filled up with zeros, which a stored embedding then replaces."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        first = min(start, tensor.rows)
        block = tensor.read(first, min(stop, tensor.rows))
        return np.pad(block, [(0, stop - start - len(block)), (0, 0)])

    shape = (rows, *tensor.shape[1:])
    return TensorPlan(tensor.name, tensor.dtype, shape, tensor.sources, "resize", read_rows)


def adapter_updates(folder: Path) -> dict[str, Update]:
    """The updates of an adapter folder, by the name of the tensor that each changes.

    Raises:
        ModelError: a ``lora_a`` without ``lora_b``: with file and tensor.
    """
    settings = adapter_settings(folder)
    infos, _ = read_header(folder / ADAPTER_FILE)
    weights = mx.load(str(folder / ADAPTER_FILE))
    updates: dict[str, Update] = {}
    for name, info in infos.items():
        path, leaf = name.rsplit(".", 1)
        if leaf in SAVED_LEAVES:
            updates[name] = Replacement(weights[name])
        if leaf != "lora_a":
            continue
        if f"{path}.lora_b" not in weights:
            raise ModelError(f"{info.where} has no lora_b", fix="train the adapter again")
        a, b = weights[name].astype(mx.float32), weights[f"{path}.lora_b"].astype(mx.float32)
        if a.ndim == 2:  # mlx-lm stores the matrices of linear layers as [in, r] and [r, out]
            a, b = a.T, b.T
        updates[f"{path}.weight"] = LowRankUpdate(a, b, settings.scale, weights.get(f"{path}.m"))
    return updates


def plan_jobs(
    plan: CheckpointPlan,
    updates: Mapping[str, Update],
    mode: str | None,
    group_size: int = 0,
    keep: Sequence[str] = ("router",),
    chosen: Mapping[str, Quantization] | None = None,
    dtype: str | None = None,
) -> list[TensorJob]:
    """Decide what is done with each tensor; see :func:`~mlx_distill.models.quantization.quantization_policy`.

    Quantized weights keep their bits, unless an update changes them: those are quantized again in their mode.

    Raises:
        ModelError: an update of a weight that the base model does not have, or of another shape.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for name in updates:
        if name not in tensors:
            raise ModelError(
                f"the adapter changes {name.removesuffix('.weight')}, which the base model does not have",
                fix="check base in adapter_config.json",
            )
    requantized = {
        name.removesuffix(".weight"): plan.quantization[name.removesuffix(".weight")]
        for name in updates
        if tensors[name].dtype == "U32"
    }
    policy = quantization_policy(
        plan.architecture,
        plan.quantizable,
        mode,
        dtype=dtype,
        group_size=group_size,
        keep=keep,
        chosen=chosen,
    )
    jobs: list[TensorJob] = []
    for tensor in plan.tensors:
        path, _, leaf = tensor.name.rpartition(".")
        update = updates.get(tensor.name)
        if path not in requantized or leaf not in ("weight", "scales", "biases"):
            jobs.append(_with_update(TensorJob(tensor, policy(tensor)), update))
        elif leaf == "weight":
            quantization, scales = requantized[path], tensors[f"{path}.scales"]
            dtype = scales.dtype if quantization.mode == "affine" else "BF16"
            action = TensorAction(dtype, quantization, reason="requantized", requantized=True)
            jobs.append(
                _with_update(TensorJob(dequantized_plan(tensors, path, quantization), action), update)
            )
    return jobs


def _with_refined(job: TensorJob, refined: Refined | None) -> TensorJob:
    if refined is None or not job.tensor.name.endswith(".weight"):
        return job
    parts = list(refined.parts.values())
    fits = job.action.quantization is not None and [(o.dtype, o.shape) for o in job.outputs] == [
        (safetensors_type(part), part.shape) for part in parts
    ]
    if not fits:
        raise ModelError(
            f"{job.tensor.where}: refined as {[(str(part.dtype), list(part.shape)) for part in parts]}, "
            f"planned as {job.action.label}",
            fix="quantize again from the beginning",
        )
    return replace(job, refined=refined.parts)


def _content(refined: Mapping[str, Refined]) -> str:
    """A hash of refined tensors, which the finished shards of an interrupted call depend on."""
    found = hashlib.sha256()
    for path, one in sorted(refined.items()):
        for name, part in one.parts.items():
            found.update(f"{path}.{name}".encode())
            found.update(to_raw(part).tobytes())
    return found.hexdigest()


def _with_update(job: TensorJob, update: Update | None) -> TensorJob:
    if update is None:
        return job
    if update.shape != job.tensor.shape:
        raise ModelError(
            f"{job.tensor.where}: the adapter's update has the shape {list(update.shape)}",
            fix="check base in adapter_config.json",
        )
    if job.action.keeps_bits:
        job = replace(job, action=replace(job.action, dtype=job.tensor.dtype))
    return replace(job, update=update)


def dequantized_plan(tensors: Mapping[str, TensorPlan], path: str, quantization: Quantization) -> TensorPlan:
    """The weight of a quantized module in float32, dequantized while it is read."""
    weight = tensors[f"{path}.weight"]
    names = [f"{path}.{leaf}" for leaf in ("weight", "scales", "biases")]
    parts = [tensors[name] for name in names if name in tensors]
    sources: tuple[Source, ...] = tuple(source for part in parts for source in part.sources)

    def read_rows(start: int, stop: int) -> np.ndarray:
        words, *others = (from_raw(part.read(start, stop), part.dtype) for part in parts)
        others = [x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for x in others]
        scales, biases = others[0], others[1] if len(others) > 1 else None
        q = quantization
        return to_raw(mx.dequantize(words, scales, biases, q.group_size, q.bits, q.mode, dtype=mx.float32))

    shape = (*weight.shape[:-1], weight.columns * 32 // quantization.bits)
    return TensorPlan(weight.name, "F32", shape, sources, "dequantize", read_rows)
