"""Out again: to the Hugging Face layout, by the same rules backwards, and LoRA adapters to PEFT's format and
from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import ConfigError
from mlx_distill.models.checkpoint.layout import backward_plan, wildcard_name
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import DTYPE_BYTES, Source
from mlx_distill.models.checkpoint.tensor_job import Errors, TensorJob, TensorRow, run_block, table_row
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES, MEMORY_BYTES
from mlx_distill.models.config_files import adapter_base, is_adapter, read_object
from mlx_distill.models.convert import stream, update_lost
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import copy_tokenizer, resolve
from mlx_distill.models.peft import Card, from_peft, peft_weights, to_peft, write_peft
from mlx_distill.models.quantization import QuantSpec
from mlx_distill.models.quantize import adapter_updates, plan_jobs, reopen
from mlx_distill.progress import Progress
from mlx_distill.storage import write_json, write_text
from mlx_distill.text import counted, size

_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor of ours that is made while it is read: merged, unpacked, packed again, or of another layout.

    Stands in for a :class:`TensorInfo`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    job: TensorJob
    index: int
    errors: Errors

    @property
    def nbytes(self) -> int:
        """Bytes when written."""
        return int(np.prod(self.shape)) * DTYPE_BYTES[self.dtype]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}: tensor {self.name!r}"

    def read(self, start: int = 0, stop: int | None = None, *, columns: int | None = None) -> np.ndarray:
        """Rows, as :meth:`TensorInfo.read` gives them."""
        width = self.shape[-1]
        columns = columns or width
        stop = int(np.prod(self.shape)) // columns if stop is None else stop
        first, last = start * columns // width, -(-stop * columns // width)
        block = run_block(self.job, first, last, self.errors)[self.index].reshape(-1)
        skip = start * columns - first * width
        return block[skip : skip + (stop - start) * columns].reshape(-1, columns)

    def read_block(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """A block, as :meth:`TensorInfo.read_block` gives it."""
        return self.read(*rows)[:, slice(*columns)]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    ``changed`` has a line for each tensor whose values are not bit for bit those of the folder; ``kept``
    counts the modules of the adapter that stands beside.
    """

    source: str
    destination: str
    model_type: str
    tensors: int
    stored_bytes: int
    changed: tuple[TensorRow, ...]
    kept: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The sums, for a manifest."""
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
        """What changed, layers folded together, and what else is to know where the folder lies by then."""
        groups: dict[tuple[str, str], list[float]] = {}
        for row in self.changed:
            groups.setdefault((wildcard_name(row.name), row.note), []).append(row.error)
        out = [
            f"{name}: {counted(len(e), 'tensor')}, {note}, relative error at most {max(e):.1e}"
            for (name, note), e in groups.items()
        ]
        if not self.changed:
            out.append("every tensor bit for bit")
        if self.kept:
            out.append(f"the adapter of {counted(self.kept, 'module')} beside it, in adapter/, for PEFT")
        return [*out, *update_lost(self.changed)]

    def lines(self) -> list[str]:
        """The notes, then the sum."""
        total = f"{self.model_type}: {counted(self.tensors, 'tensor')}, {size(self.stored_bytes)} written to {self.destination}"
        return [*self.notes(), total]


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
    """Write a folder of ours in the Hugging Face layout: what transformers loads, with the same logits.

    Unquantized tensors and MXFP4 experts come out byte for byte as they once came in. Weights packed in a way
    that the layout has no room for are unpacked to the type of their scales (bfloat16 where these are bytes),
    which rounds each value once.

    Args:
        model: A model folder, or an adapter folder of ours.
        destination: The folder to make.
        adapter: ``merge`` adds it to the weights (MXFP4 experts that it changes are packed again, with the
            error stated); ``keep`` leaves the base untouched and puts the adapter beside it, in PEFT's format
            in ``destination/adapter``.
        card: Writes the model card (README.md); see :func:`~mlx_distill.report.model_card.card_text`.
        max_shard_bytes: Largest file.
        memory_bytes: Bound on the working buffers.
        progress: Where to say how far it is.

    Raises:
        ConfigError: another way with the adapter.
        ModelError: a damaged folder, or an adapter to keep that PEFT has no place for.
        FileError: the disk refused, or the destination holds something else.
    """
    began = time.perf_counter()
    if adapter not in ("merge", "keep"):
        raise ConfigError(f"adapter: {adapter!r} is not merge or keep", fix="choose one of them")
    folder, destination = resolve(model), Path(destination)
    adapted = is_adapter(folder)
    beside = peft_weights(folder) if adapted and adapter == "keep" else {}
    plan = plan_checkpoint(adapter_base(folder) if adapted else folder)
    sources, changed = _sources(plan, adapter_updates(folder) if adapted and not beside else {})
    jobs = [TensorJob(p) for p in backward_plan(plan.architecture, sources)]
    settings: dict[str, Any] = {"layout": "hf", "adapter": adapter, "max_shard_bytes": max_shard_bytes}
    key = source_key(folder)
    with staged_folder(destination, folder, "export", settings, {"source": key}) as work:
        shards = stream(
            jobs,
            work.folder,
            "export",
            max_shard_bytes=max_shard_bytes,
            memory_bytes=memory_bytes,
            metadata={"format": "pt"},
            salt=key,
            progress=progress,
        )
        copy_tokenizer(plan.folder, work.folder, others=True)
        if adapted:
            copy_tokenizer(folder, work.folder)
        write_json(work.folder / "config.json", hf_config(plan, {job.tensor.name for job in jobs}))
        kept = write_peft(folder, work.folder / "adapter", beside, destination.name) if beside else []
        out = ExportReport(
            str(model),
            str(destination),
            plan.architecture.model_type,
            len(jobs),
            sum(job.tensor.nbytes for job in jobs),
            tuple(table_row(job, errors, job.outputs) for job, errors in changed),
            len(kept),
            time.perf_counter() - began,
        )
        if card is not None:
            write_text(work.folder / "README.md", card(destination.name, folder, plan, out.notes()))
        work.hashes.update({s.name: s.sha256 for s in shards})
        work.recorded.update(source=str(model), **out.facts())
    return out


def _sources(
    plan: CheckpointPlan, updates: Mapping[str, Any]
) -> tuple[dict[str, Source], list[tuple[TensorJob, Errors]]]:
    """Our tensors by name; those that change are computed while they are read."""
    planned = {p.name: p for p in plan.tensors}
    foreign = {path for path, packing in plan.quantization.items() if not _native(plan, path, packing)}
    sources: dict[str, Source] = {}
    changed: list[tuple[TensorJob, Errors]] = []
    for job in plan_jobs(plan, dict(updates), None):
        path, _, leaf = job.tensor.name.rpartition(".")
        if path in foreign and leaf in ("scales", "biases"):
            continue
        if path in foreign and leaf == "weight":
            packing, kept = plan.quantization[path], planned[f"{path}.scales"].dtype
            plain, _ = reopen(planned[job.tensor.name], planned, packing)
            job = TensorJob(
                plain,
                QuantSpec("cast", kept if kept != "U8" else "BF16", why=f"unpacked from {packing.mode}"),
                job.update,
            )
        if job.action.kind == "keep" and job.tensor.rule == "same":
            sources[job.tensor.name] = job.tensor.sources[0]
            continue
        errors = Errors()
        for i, output in enumerate(job.outputs):
            sources[output.name] = ComputedTensor(
                output.name, output.dtype, output.shape, job.tensor.sources[0].file, job, i, errors
            )
        if job.action.kind != "keep":
            changed.append((job, errors))
    return sources, changed


def _native(plan: CheckpointPlan, path: str, packing: QuantSpec) -> bool:
    """Whether the Hugging Face layout of this architecture has room for the packed module as it is."""
    return plan.architecture.model_type == "gpt_oss" and ".experts." in path and packing.mode == "mxfp4"


def hf_config(plan: CheckpointPlan, names: set[str]) -> dict[str, Any]:
    """config.json without what conversion added to it."""
    config = dict(read_object(plan.folder / "config.json"))
    config.pop("quantization", None)
    if config.get("rope_parameters"):
        config.pop("rope_theta", None)
        config.pop("rope_scaling", None)
    if "num_local_experts" in config and plan.architecture.model_type == "qwen3_moe":
        config.pop("num_experts", None)
    if any(name.endswith("_blocks") for name in names):
        if (config.get("quantization_config") or {}).get("quant_method") != "mxfp4":
            config["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": _NOT_CONVERTED,
            }
    else:
        config.pop("quantization_config", None)
    return config


__all__ = ["ComputedTensor", "ExportReport", "from_peft", "hf_config", "to_hf", "to_peft"]
