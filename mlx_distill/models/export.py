"""Exporting a model to the Hugging Face layout, by the rules of its conversion applied backwards."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.models.adapter_import import check_lines
from mlx_distill.models.checkpoint.layout import backward_plan, wildcard_name
from mlx_distill.models.checkpoint.plan import CheckpointPlan
from mlx_distill.models.checkpoint.safetensors import Source
from mlx_distill.models.checkpoint.tensor_job import (
    ErrorSums,
    TensorJob,
    TensorRow,
    Update,
    output_plans,
    table_row,
)
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES, MEMORY_BYTES
from mlx_distill.models.config_files import is_adapter
from mlx_distill.models.convert import source_config, stream_shards, update_loss_note
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import copy_tokenizer, replace_tokenizer, resolve
from mlx_distill.models.peft import Card, from_peft, peft_weights, to_peft, write_peft
from mlx_distill.models.quantization import TensorAction
from mlx_distill.models.quantize import dequantized_plan, plan_jobs, plan_with_adapter
from mlx_distill.models.trained_on import replace_trained_on
from mlx_distill.progress import Progress
from mlx_distill.storage import write_json, write_text
from mlx_distill.text import counted, size


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    ``changed`` has a line for each tensor whose bits differ from the source's; ``kept`` is the number of
    modules of the adapter that was written beside the model, ``source_notes`` are those of how the source
    was read, and ``artifact`` is the check of the folder (:mod:`mlx_distill.evaluate.artifact`).
    """

    source: str
    destination: str
    model_type: str
    tensors: int
    stored_bytes: int
    changed: tuple[TensorRow, ...]
    kept: int
    seconds: float
    source_notes: tuple[str, ...] = ()
    artifact: Mapping[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """Totals, for a manifest."""
        return {
            "model_type": self.model_type,
            "tensors": self.tensors,
            "stored_bytes": self.stored_bytes,
            "changed": [r.name for r in self.changed],
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "changed": [row.to_dict() for row in self.changed]}

    def notes(self) -> list[str]:
        """What changed, with one line for all layers, and what the model card has to say."""
        groups: dict[tuple[str, str], list[float]] = {}
        for row in self.changed:
            groups.setdefault((wildcard_name(row.name), row.note), []).append(row.error)
        out = [
            f"{name}: {counted(len(errors), 'tensor')}, {note}, relative error at most {max(errors):.1e}"
            for (name, note), errors in groups.items()
        ]
        if not self.changed:
            out.append("every tensor bit for bit")
        if self.kept:
            out.append(f"the adapter of {counted(self.kept, 'module')} beside it, in adapter/, for PEFT")
        return [*out, *update_loss_note(self.changed), *self.source_notes]

    def lines(self) -> list[str]:
        """The report in lines of text: the notes, then the total."""
        what = f"{self.model_type}: {counted(self.tensors, 'tensor')}, {size(self.stored_bytes)}"
        return [*self.notes(), f"{what} written to {self.destination}", *check_lines(self.artifact)]


def to_hf(
    model: str | Path,
    destination: str | Path,
    *,
    adapter: str = "merge",
    card: Card | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model folder in the Hugging Face layout, which transformers loads with the same logits.

    Unquantized tensors and natively quantized experts (MXFP4 in gpt-oss) have the bytes that they had before
    conversion. Weights that are quantized in a way that the layout has no place for are dequantized to the
    type of their scales (bfloat16 if those are bytes), which rounds each value once.

    Args:
        model: A model folder, or an adapter folder, in the MLX layout.
        destination: The folder to write.
        adapter: ``merge`` adds it to the weights (natively quantized experts that it changes are quantized
            again, with the error in the report); ``keep`` does not change the base model and writes the
            adapter in PEFT's format to ``destination/adapter``.
        card: Writes the model card (README.md); see :func:`~mlx_distill.report.model_card.card_text`.
        max_shard_bytes: Largest file; a larger tensor has a file of its own.
        memory_bytes: Bound on the working buffers.
        progress: Shows the progress.

    Raises:
        ConfigError: another value of ``adapter``.
        ModelError: a damaged folder, or an adapter to keep that PEFT's format has no place for.
        FileError: a failed write, or a destination that holds something else.
    """
    began = time.perf_counter()
    if adapter not in ("merge", "keep"):
        raise ConfigError(f"adapter: {adapter!r} is not merge or keep", fix="choose one of them")
    folder, destination = resolve(model), Path(destination)
    has_adapter = is_adapter(folder)
    kept_weights = peft_weights(folder) if has_adapter and adapter == "keep" else {}
    plan, updates = plan_with_adapter(folder, merges=adapter == "merge")
    tensors, changed = apply_updates(plan, updates)
    jobs = [TensorJob(tensor) for tensor in backward_plan(plan.architecture, tensors)]
    settings: dict[str, Any] = {"layout": "hf", "adapter": adapter, "max_shard_bytes": max_shard_bytes}
    key = source_key(folder)
    with staged_folder(destination, folder, "export", settings, {"source": key}) as staged:
        shards = stream_shards(
            jobs,
            staged.folder,
            "export",
            max_shard_bytes=max_shard_bytes,
            memory_bytes=memory_bytes,
            metadata={"format": "pt"},
            salt=key,
            progress=progress,
        )
        copy_tokenizer(plan.folder, staged.folder, others=True)
        if has_adapter:
            replace_tokenizer(folder, staged.folder)
            replace_trained_on(folder, staged.folder)
        write_json(staged.folder / "config.json", hf_config(plan, {job.tensor.name for job in jobs}))
        kept = (
            write_peft(folder, staged.folder / "adapter", kept_weights, destination.name)
            if kept_weights
            else []
        )
        out = ExportReport(
            str(model),
            str(destination),
            plan.architecture.model_type,
            len(jobs),
            sum(job.tensor.nbytes for job in jobs),
            tuple(table_row(job, errors) for job, errors in changed),
            len(kept),
            time.perf_counter() - began,
            plan.notes,
        )
        if card is not None:
            write_text(staged.folder / "README.md", card(destination.name, folder, plan, out.notes()))
        staged.hashes.update({s.name: s.sha256 for s in shards})
        staged.recorded.update(source=str(model), **out.facts())
    return out


def apply_updates(
    plan: CheckpointPlan, updates: Mapping[str, Update]
) -> tuple[dict[str, Source], list[tuple[TensorJob, ErrorSums]]]:
    """The tensors to export, in the MLX layout: with an adapter merged, and dequantized where necessary.

    Returns:
        The tensors by name, computed while they are read, and the jobs that change values, each with its
        errors, which are complete once all tensors were read.
    """
    tensors: dict[str, Source] = {}
    changed: list[tuple[TensorJob, ErrorSums]] = []
    for job in _export_jobs(plan, updates):
        if job.action.keeps_bits and job.tensor.rule == "same":
            tensors[job.tensor.name] = job.tensor.sources[0]
            continue
        errors = ErrorSums()
        tensors |= {output.name: output for output in output_plans(job, errors)}
        if not job.action.keeps_bits:
            changed.append((job, errors))
    return tensors, changed


def _export_jobs(plan: CheckpointPlan, updates: Mapping[str, Update]) -> Iterator[TensorJob]:
    """What is done with each tensor: what the Hugging Face layout has no place for is dequantized."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    foreign = {
        path: quantization
        for path, quantization in plan.quantization.items()
        if not plan.architecture.holds_natively(path, quantization.mode)
    }
    for job in plan_jobs(plan, updates, None):
        path, _, leaf = job.tensor.name.rpartition(".")
        if path not in foreign or leaf not in ("weight", "scales", "biases"):
            yield job
        elif leaf == "weight":
            scales = tensors[f"{path}.scales"]
            dtype = "BF16" if scales.dtype == "U8" else scales.dtype
            action = TensorAction(dtype, reason=f"dequantized from {foreign[path].mode}")
            yield TensorJob(dequantized_plan(tensors, path, foreign[path]), action, job.update)


def hf_config(plan: CheckpointPlan, names: Collection[str]) -> dict[str, Any]:
    """config.json without what conversion added to it.

    Args:
        plan: Of the model.
        names: Of the exported tensors.
    """
    config = source_config(plan)
    config.pop("quantization", None)
    if config.get("rope_parameters"):
        config.pop("rope_theta", None)
        config.pop("rope_scaling", None)
    for stock, original in plan.architecture.config_aliases.items():
        if original in config:
            config.pop(stock, None)
    native = plan.architecture.native_quantization
    if native is None or not any(plan.architecture.is_quantized_source(name) for name in names):
        config.pop("quantization_config", None)
    elif (config.get("quantization_config") or {}).get("quant_method") != native.mode:
        config["quantization_config"] = {
            "quant_method": native.mode,
            "modules_to_not_convert": list(native.not_converted),
        }
    return config


__all__ = ["ExportReport", "apply_updates", "from_peft", "hf_config", "to_hf", "to_peft"]
