"""Convert a checkpoint: streamed in bounded memory, verified by reading back, whole or not at all, resumable.

Every weight keeps its own type unless told otherwise, MXFP4 experts pass through bit for bit, and every
tensor is accounted for: where it came from, by which rule, what it became, and how far it is from what it
was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import open_checkpoint
from mlx_distill.models.checkpoint.tensor_job import Errors, TensorJob, TensorRow, table_row
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES, MEMORY_BYTES, ShardResult, write_shards
from mlx_distill.models.config_files import is_adapter, read_object
from mlx_distill.models.folder import FORMAT, is_current, source_key, staged_folder
from mlx_distill.models.hub import commit_of, copy_tokenizer, resolve
from mlx_distill.models.quantization import SAFETENSORS, quantization_policy, with_quantization
from mlx_distill.progress import Progress
from mlx_distill.storage import recover, stage_key, write_json
from mlx_distill.text import size


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do: a line a tensor, and the sums.

    ``left_out`` names source tensors that are not needed, with the reason; ``resumed`` counts shards that an
    earlier run had finished.
    """

    source: str
    destination: str
    model_type: str
    rows: tuple[TensorRow, ...]
    left_out: tuple[tuple[str, str], ...]
    parameters: int
    source_bytes: int
    stored_bytes: int
    seconds: float
    resumed: int = 0
    note: str | None = None
    dry_run: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter."""
        return 8 * self.stored_bytes / max(self.parameters, 1)

    @property
    def largest_error(self) -> float:
        """The worst relative error of any tensor; 0 where every bit is kept."""
        return max((row.error for row in self.rows), default=0.0)

    def facts(self) -> dict[str, Any]:
        """The sums, for a manifest."""
        return {
            "model_type": self.model_type,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "largest_error": self.largest_error,
            "note": self.note,
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
        out = tensor_table(self.rows) if self.dry_run else []
        out += [f"left out: {name} ({reason})" for name, reason in self.left_out]
        verb = "would be" if self.dry_run else "written to"
        out.append(
            f"{self.model_type}: {self.parameters:,} parameters, {self.bits_per_weight:.2f} bits per weight, "
            f"{size(self.stored_bytes)} {verb} {self.destination}"
            + ("" if self.dry_run else f" in {self.seconds:.1f} s, read back and compared")
        )
        if self.largest_error:
            out.append(f"largest relative error of a tensor: {self.largest_error:.2e}")
        return [*out, self.note] if self.note else out


def convert(
    source: str | Path,
    destination: str | Path,
    quantize: str | None = None,
    dtype: str | None = None,
    *,
    group_size: int = 0,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint (or one of ours) to a folder of ours.

    Args:
        source: A Hub id or a folder.
        destination: The folder to make. A killed conversion goes on where it stopped when the same command
            runs again.
        quantize: ``affine1`` to ``affine8``, ``mxfp4``, ``nvfp4``, ``mxfp8``, or a mixed recipe such as
            ``mixed4``; None keeps the weights.
        dtype: ``float32``, ``bfloat16`` or ``float16`` for floating-point tensors; None keeps each tensor's
            own.
        group_size: Weights that share a scale; 0 is the mode's own.
        revision: Commit, tag or branch of a Hub model.
        max_shard_bytes: Largest file, except that a tensor is never cut.
        memory_bytes: Bound on the working buffers; it changes no bit of the result.
        dry_run: Make the table and write nothing.
        progress: Where to say how far it is.

    Raises:
        ModelError: the source is damaged or not supported; the destination is untouched.
        FileError: the disk refused, or the destination holds something else.
    """
    folder, destination = resolve(source, revision), Path(destination)
    plan, jobs = _plan(folder, quantize, dtype, group_size)
    if dry_run:
        return _report(str(source), destination, plan, jobs, [], 0.0, dry_run=True)
    settings = {
        "quantize": quantize,
        "group_size": group_size,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }
    parents = {"source": source_key(folder)}
    recover(destination)
    if is_current(destination, stage_key("convert", FORMAT, settings, parents)):
        return _as_written(str(source), destination, plan)
    with staged_folder(destination, folder, "convert", settings, parents) as work:
        report = _write(
            str(source), destination, work.folder, plan, jobs, max_shard_bytes, memory_bytes, progress
        )
        work.hashes.update(shard_hashes(work.folder))
        work.recorded.update(
            source=str(source), commit=commit_of(folder) or revision, **report.facts(), seconds=report.seconds
        )
    return report


def _as_written(source: str, destination: Path, plan: CheckpointPlan) -> ConversionReport:
    """The report of a conversion that stands there already."""
    table = read_object(destination / TABLE)
    rows = tuple(TensorRow(**{**row, "shape": tuple(row["shape"])}) for row in table["tensors"])
    report = _report(source, destination, plan, [], [], 0.0)
    stored = open_checkpoint(destination).nbytes
    return replace(
        report,
        rows=rows,
        parameters=sum(r.parameters for r in rows),
        stored_bytes=stored,
        resumed=len(table["shards"]),
    )


def convert_into(
    source: str | Path,
    folder: str | Path,
    quantize: str | None = None,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
    name: str = "convert",
) -> ConversionReport:
    """The same into a folder that somebody else publishes: a stage's partial one. Finished shards are kept on
    a second run.

    ``name`` stands before what ``progress`` is told.
    """
    folder = Path(folder)
    plan, jobs = _plan(resolve(source, revision), quantize, dtype)
    report = _write(str(source), folder, folder, plan, jobs, max_shard_bytes, memory_bytes, progress, name)
    if report.note and progress:
        progress.note(f"{name}: {report.note}")
    return report


def _plan(
    folder: Path, quantize: str | None, dtype: str | None, group_size: int = 0
) -> tuple[CheckpointPlan, list[TensorJob]]:
    if is_adapter(folder):
        raise ModelError(
            f"{folder} holds an adapter, not a model",
            fix="use mlx-distill quantize or export, which merge it",
        )
    plan = plan_checkpoint(folder)
    decide = quantization_policy(
        plan.architecture, plan.quantizable, quantize, dtype=dtype, group_size=group_size
    )
    return plan, [TensorJob(p, decide(p)) for p in plan.tensors]


def _write(
    source: str,
    destination: Path,
    into: Path,
    plan: CheckpointPlan,
    jobs: Sequence[TensorJob],
    max_shard_bytes: int,
    memory_bytes: int,
    progress: Progress | None,
    name: str = "convert",
) -> ConversionReport:
    began = time.perf_counter()
    shards = stream(
        jobs, into, name, max_shard_bytes=max_shard_bytes, memory_bytes=memory_bytes, progress=progress
    )
    finish_folder(into, plan, jobs, shards)
    return _report(source, destination, plan, jobs, shards, time.perf_counter() - began)


def _report(
    source: str,
    destination: Path,
    plan: CheckpointPlan,
    jobs: Sequence[TensorJob],
    shards: Sequence[ShardResult],
    seconds: float,
    *,
    dry_run: bool = False,
) -> ConversionReport:
    rows = shard_rows(plan, jobs, shards)
    return ConversionReport(
        source,
        str(destination),
        plan.architecture.model_type,
        rows,
        tuple(plan.left_out),
        sum(r.parameters for r in rows),
        plan.checkpoint.nbytes,
        sum(o.nbytes for job in jobs for o in job.outputs),
        seconds,
        sum(s.resumed for s in shards),
        plan.architecture.stock_differs(plan.config),
        dry_run,
    )


TABLE = "tensors.json"


def tensor_table(rows: Sequence[TensorRow]) -> list[str]:
    """Aligned lines: tensor, shape, from, to, bits per weight, what else is to say."""
    cells = [
        (
            r.name,
            "x".join(map(str, r.shape)) or "1",
            r.source_dtype,
            r.stored,
            f"{r.bits:.2f}" if r.parameters else "",
            r.note,
        )
        for r in rows
    ]
    cells.insert(0, ("tensor", "shape", "from", "to", "bits", ""))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return ["  ".join([*(row[i].ljust(widths[i]) for i in range(5)), row[5]]).rstrip() for row in cells]


def update_lost(rows: Sequence[TensorRow]) -> list[str]:
    """A line where rounding ate a tenth or more of an adapter's update: the user may want to keep it beside
    instead.
    """
    shares = [row.error / row.update for row in rows if row.update]
    if max(shares, default=0.0) < 0.1:
        return []
    return [
        f"rounding costs as much as {max(shares):.0%} of the adapter's update; kept beside its base (adapter: keep) it loses nothing"
    ]


def stream(
    jobs: Sequence[TensorJob], into: Path, name: str, *, progress: Progress | None = None, **options: Any
) -> list[ShardResult]:
    """Write the shards, telling ``progress`` the megabytes of source that are done."""
    done = 0
    with (
        progress.task(name, total=sum(job.tensor.nbytes for job in jobs) / 1e6, unit="MB")
        if progress
        else nullcontext() as bar
    ):

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if bar is not None:
                bar.update(done / 1e6)

        return write_shards(jobs, into, on_bytes=on_bytes, **options)


def shard_rows(
    plan: CheckpointPlan, jobs: Sequence[TensorJob], shards: Sequence[ShardResult]
) -> tuple[TensorRow, ...]:
    """The table's lines: as measured where shards were written, else as planned; packed words that came in
    count as their weights.
    """
    measured = {row.name: row for shard in shards for row in shard.rows}
    rows = []
    for job in jobs:
        row = measured.get(job.tensor.name) or table_row(job, Errors(), job.outputs)
        path = job.tensor.name.removesuffix(".weight")
        if job.tensor.dtype == "U32" and path in plan.quantization:
            count, stored = plan.parameters(job.tensor), plan.quantized_bytes(path)
            row = replace(
                row,
                parameters=count,
                bits=round(8 * stored / count, 4),
                stored=plan.quantization[path].label,
                note="bit for bit",
            )
        rows.append(row)
    return tuple(rows)


def finish_folder(
    into: Path, plan: CheckpointPlan, jobs: Sequence[TensorJob], shards: Sequence[ShardResult]
) -> None:
    """Config, tokenizer, and the table of tensors with the shards' hashes."""
    copy_tokenizer(plan.folder, into, others=True)
    write_json(into / "config.json", our_config(plan, jobs))
    rows = shard_rows(plan, jobs, shards)
    table = {
        "format": FORMAT,
        "shards": [{"name": s.name, "sha256": s.sha256, "size": s.size} for s in shards],
        "left_out": [list(pair) for pair in plan.left_out],
        "tensors": [row.to_dict() for row in rows],
    }
    write_json(into / TABLE, table)


def shard_hashes(folder: Path) -> dict[str, str]:
    """The hashes that :func:`finish_folder` left in the folder's table, by the shards' names."""
    return {row["name"]: row["sha256"] for row in read_object(folder / TABLE)["shards"]}


def our_config(plan: CheckpointPlan, jobs: Sequence[TensorJob]) -> dict[str, Any]:
    """HF's keys, what stock mlx-lm needs besides, and ``quantization`` as mlx-lm writes it."""
    config = dict(read_object(plan.folder / "config.json"))
    arguments = plan.architecture.arguments(plan.config)
    rope = config.get("rope_parameters")
    if rope and "rope_theta" not in config:
        config |= {
            "rope_theta": arguments["rope_theta"],
            "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"},
        }
    if plan.architecture.model_type == "qwen3_moe" and "num_experts" not in config:
        config["num_experts"] = arguments["num_experts"]
    types = {job.action.dtype for job in jobs if job.action.dtype}
    if len(types) == 1:
        name = next(name for name, stored in SAFETENSORS.items() if stored in types)
        config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    packed = {
        job.tensor.name.removesuffix(".weight"): job.action.config
        for job in jobs
        if job.action.kind == "quantize"
    }
    packed |= {path: packing.config for path, packing in plan.quantization.items() if path not in packed}
    return with_quantization(config, packed)
