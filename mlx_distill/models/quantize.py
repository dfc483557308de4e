"""Quantize a model, or an adapter on its base: what is packed already passes through bit for bit, everything
else is measured.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.adapters import LoraSettings, adapter_settings
from mlx_distill.models.checkpoint.layout import TensorPlan
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import Source, read_header
from mlx_distill.models.checkpoint.tensor_job import (
    LowRankUpdate,
    Replacement,
    TensorJob,
    TensorRow,
    from_raw,
    to_raw,
)
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES, MEMORY_BYTES
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_base,
    is_adapter,
    read_object,
)
from mlx_distill.models.convert import (
    finish_folder,
    shard_hashes,
    shard_rows,
    stream,
    tensor_table,
    update_lost,
)
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import copy_tokenizer, resolve
from mlx_distill.models.quantization import QuantSpec, quantization_policy
from mlx_distill.progress import Progress
from mlx_distill.storage import atomic_path, sha256, write_json


@dataclass(frozen=True)
class QuantizeReport:
    """A line a tensor and the sums. ``adapter`` says what became of it: ``none``, ``merged`` or ``kept``."""

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

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter of the base."""
        return 8 * self.stored_bytes / max(self.parameters, 1)

    @property
    def stayed(self) -> tuple[str, ...]:
        """Weights that were wished for and not packed as wished, with the reason."""
        return tuple(
            f"{row.name}: {row.note}"
            for row in self.rows
            if row.note and "packed" not in row.note and row.note != "bit for bit"
        )

    @property
    def largest_error(self) -> float:
        """The worst relative error of a tensor."""
        return max((row.error for row in self.rows), default=0.0)

    def facts(self) -> dict[str, Any]:
        """The sums, for a manifest."""
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
        """The table, then the sums."""
        adapter = {
            "none": "",
            "merged": ", the adapter merged",
            "kept": f", and the adapter beside it ({self.adapter_bytes / 1e6:,.1f} MB)",
        }
        total = f"{self.bits_per_weight:.2f} bits per weight, {self.stored_bytes / 1e6:,.1f} MB of {self.source_bytes / 1e6:,.1f} MB"
        return [
            *tensor_table(self.rows),
            f"{self.mode}: {total}{adapter[self.adapter]}",
            f"largest relative error of a tensor: {self.largest_error:.2e}",
            *update_lost(self.rows),
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
    """Quantize a model folder or an adapter folder into ``destination``: whole or not at all, resumable, in
    bounded memory.

    Args:
        source: A folder of ours, a Hugging Face folder, a Hub id, or an adapter folder.
        destination: The folder to make. :func:`mlx_distill.models.load.load` reads it either way.
        mode: ``affine1`` to ``affine8``, ``mxfp4``, ``nvfp4``, ``mxfp8``, or a mixed recipe. Weights that are
            packed already stay so.
        group_size: Weights that share a scale; 0 is the mode's own. Where it does not divide a row, a smaller
            one is taken, or the weight stays.
        adapter: ``merge`` adds it to the weights before they are packed (packed weights that it changes are
            unpacked and packed again the same way, with the error stated); ``keep`` leaves it in floating
            point beside the packed base: the adapter in ``destination``, its base in ``destination/base``.
        keep: Parts of module names that keep their type.
        max_shard_bytes: Largest file.
        memory_bytes: Bound on the working buffers.
        progress: Where to say how far it is.

    Raises:
        ConfigError: an unknown mode or group size.
        ModelError: a damaged source, or an adapter that does not fit its base.
        FileError: the disk refused, or the destination holds something else.
    """
    folder, destination = resolve(source), Path(destination)
    settings = {
        "mode": mode,
        "group_size": group_size,
        "adapter": adapter,
        "keep": list(keep),
        "max_shard_bytes": max_shard_bytes,
    }
    with staged_folder(destination, folder, "quantize", settings, {"source": source_key(folder)}) as work:
        report = quantize_into(
            folder,
            work.folder,
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
        work.hashes.update({base + name: hash for name, hash in shard_hashes(work.folder / base).items()})
        work.recorded.update(source=str(source), **report.facts(), seconds=report.seconds)
    return report


def quantize_into(
    source: str | Path,
    folder: str | Path,
    mode: str,
    group_size: int = 0,
    adapter: str = "merge",
    keep: Sequence[str] = ("router",),
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> QuantizeReport:
    """The same into a folder that somebody else publishes: a stage's partial one. Finished shards are kept on
    a second run.
    """
    began = time.perf_counter()
    source, folder = resolve(source), Path(folder)
    if adapter not in ("merge", "keep"):
        raise ConfigError(f"adapter: {adapter!r} is not merge or keep", fix="choose one of them")
    adapted = is_adapter(source)
    plan = plan_checkpoint(adapter_base(source) if adapted else source)
    merges = adapted and adapter == "merge"
    updates = adapter_updates(source) if merges else {}
    jobs = plan_jobs(plan, updates, mode, group_size, keep)
    into = folder / "base" if adapted and not merges else folder
    salt = sha256(source / ADAPTER_FILE) if merges else ""
    shards = stream(
        jobs,
        into,
        "quantize",
        max_shard_bytes=max_shard_bytes,
        memory_bytes=memory_bytes,
        salt=salt,
        notes=folder / "scratch",
        progress=progress,
    )
    finish_folder(into, plan, jobs, shards)
    if adapted:
        copy_tokenizer(source, folder)
    if into != folder:
        _copy_adapter(source, folder)
    rows = shard_rows(plan, jobs, shards)
    state = "merged" if merges else "kept" if adapted else "none"
    return QuantizeReport(
        str(source),
        str(folder),
        mode,
        state,
        rows,
        sum(r.parameters for r in rows),
        plan.checkpoint.nbytes,
        sum(o.nbytes for job in jobs for o in job.outputs),
        (source / ADAPTER_FILE).stat().st_size if adapted else 0,
        time.perf_counter() - began,
        sum(s.resumed for s in shards),
    )


def _copy_adapter(source: Path, folder: Path) -> None:
    with atomic_path(folder / ADAPTER_FILE) as path:
        shutil.copyfile(source / ADAPTER_FILE, path)
    write_json(folder / ADAPTER_CONFIG, {**read_object(source / ADAPTER_CONFIG), "base": "base"})


def adapter_updates(folder: Path) -> dict[str, LowRankUpdate | Replacement]:
    """The updates of an adapter folder, by the name of the tensor that they change.

    Raises:
        ModelError: a matrix without its counterpart: with file and tensor.
    """
    settings: LoraSettings = adapter_settings(folder)
    infos, _ = read_header(folder / ADAPTER_FILE)
    weights = mx.load(str(folder / ADAPTER_FILE))
    updates: dict[str, LowRankUpdate | Replacement] = {}
    for name, info in infos.items():
        path, leaf = name.rsplit(".", 1)
        if leaf in ("weight", "bias"):
            updates[name] = Replacement(weights[name])
        if leaf != "lora_a":
            continue
        if f"{path}.lora_b" not in weights:
            raise ModelError(f"{info.where} has no lora_b beside it", fix="train the adapter again")
        a, b = weights[name].astype(mx.float32), weights[f"{path}.lora_b"].astype(mx.float32)
        if a.ndim == 2:  # mlx-lm keeps the matrices of linear layers as [in, r] and [r, out]
            a, b = a.T, b.T
        updates[f"{path}.weight"] = LowRankUpdate(a, b, settings.scale, weights.get(f"{path}.m"))
    return updates


def plan_jobs(
    plan: CheckpointPlan,
    updates: dict[str, LowRankUpdate | Replacement],
    mode: str | None,
    group_size: int = 0,
    keep: Sequence[str] = ("router",),
) -> list[TensorJob]:
    """What happens to each tensor: packed weights stay, unless an update changes them: then they are packed
    again the same way.

    Raises:
        ModelError: an update for a weight that the base does not have, or of another shape.
    """
    planned = {p.name: p for p in plan.tensors}
    decide = quantization_policy(plan.architecture, plan.quantizable, mode, group_size=group_size, keep=keep)
    jobs: list[TensorJob] = []
    reopened: set[str] = set()
    for name in updates:
        path = name.removesuffix(".weight")
        if name not in planned:
            raise ModelError(
                f"the adapter changes {path}, which the base model does not have",
                fix="check base in adapter_config.json",
            )
        if planned[name].dtype == "U32":
            reopened |= {f"{path}.scales", f"{path}.biases"}
    for p in plan.tensors:
        if p.name in reopened:
            continue
        update = updates.get(p.name)
        if update is not None and p.dtype == "U32":
            plain, action = reopen(p, planned, plan.quantization[p.name.removesuffix(".weight")])
            jobs.append(_fitting(TensorJob(plain, action, update)))
        else:
            jobs.append(_fitting(TensorJob(p, decide(p), update)))
    return jobs


def _fitting(job: TensorJob) -> TensorJob:
    if job.update is not None:
        if job.update.shape != job.tensor.shape:
            raise ModelError(
                f"{job.tensor.where}: the adapter's update has the shape {list(job.update.shape)}",
                fix="check base in adapter_config.json",
            )
        if job.action.kind == "keep":
            return replace(job, action=QuantSpec("cast", job.tensor.dtype, why=job.action.why))
    return job


def reopen(p: TensorPlan, planned: dict[str, TensorPlan], packing: QuantSpec) -> tuple[TensorPlan, QuantSpec]:
    """Packed weights as float32 rows, and how they were packed."""
    path = p.name.removesuffix(".weight")
    parts = [
        planned[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases") if f"{path}.{leaf}" in planned
    ]
    sources: tuple[Source, ...] = tuple(info for part in parts for info in part.sources)
    shape = (*p.shape[:-1], p.columns * 32 // packing.bits)

    def read(start: int, stop: int) -> np.ndarray:
        weight, *rest = (from_raw(part.read(start, stop), part.dtype) for part in parts)
        rest = [r.astype(mx.float32) if mx.issubdtype(r.dtype, mx.floating) else r for r in rest]
        biases = rest[1] if len(rest) > 1 else None
        return to_raw(
            mx.dequantize(
                weight, rest[0], biases, packing.group_size, packing.bits, packing.mode, dtype=mx.float32
            )
        )

    kept = parts[1].dtype if packing.mode == "affine" else "BF16"
    action = replace(packing, dtype=kept, why="packed again", again=True)
    return TensorPlan(p.name, "F32", shape, sources, "dequantize", read), action
