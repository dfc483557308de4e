"""Converting a checkpoint to the MLX layout: streamed in bounded memory, resumable, never half-written.

Every weight keeps its type by default, and MXFP4 experts keep their bits. The report has a line for each
tensor: its source, the rule, the stored type, and the error of the stored values.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.adapter_import import AdapterReport, from_mlx_lm
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import open_checkpoint
from mlx_distill.models.checkpoint.tensor_job import ErrorSums, TensorJob, TensorRow, table_row
from mlx_distill.models.checkpoint.writer import MAX_SHARD_BYTES, MEMORY_BYTES, ShardResult, write_shards
from mlx_distill.models.config_files import is_adapter, read_object
from mlx_distill.models.folder import conversion_format, is_current, source_key, staged_folder
from mlx_distill.models.hub import commit_of, copy_tokenizer, find_local, resolve
from mlx_distill.models.peft_import import from_peft, is_peft
from mlx_distill.models.quantization import SAFETENSORS, quantization_policy, with_quantization
from mlx_distill.progress import Progress
from mlx_distill.storage import recover, stage_key, write_json
from mlx_distill.text import size


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or with ``dry_run`` would do: a line for each tensor, and totals.

    ``left_out`` are source tensors that are not needed, with the reason; ``resumed`` is the number of shards
    that an earlier run had finished; ``notes`` are those of :func:`plan_notes`.
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
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.stored_bytes / max(self.parameters, 1)

    @property
    def largest_error(self) -> float:
        """The largest relative error of a tensor; 0 if every bit is kept."""
        return max((row.error for row in self.rows), default=0.0)

    def facts(self) -> dict[str, Any]:
        """Totals, for a manifest."""
        return {
            "model_type": self.model_type,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "largest_error": self.largest_error,
            "notes": list(self.notes),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "rows": [row.to_dict() for row in self.rows],
            "bits_per_weight": self.bits_per_weight,
        }

    def lines(self) -> list[str]:
        """The report in lines of text: the table of a dry run, then totals."""
        out = tensor_table(self.rows) if self.dry_run else []
        out += [f"left out: {name} ({reason})" for name, reason in self.left_out]
        verb = "would be" if self.dry_run else "written to"
        out.append(
            f"{self.model_type}: {self.parameters:,} parameters, {self.bits_per_weight:.2f} bits per weight, "
            f"{size(self.stored_bytes)} {verb} {self.destination}"
            + ("" if self.dry_run else f" in {self.seconds:.1f} s")
        )
        if self.largest_error:
            out.append(f"largest relative error of a tensor: {self.largest_error:.2e}")
        if any("groups of" in row.stored and row.note != "bit for bit" for row in self.rows):
            out.append("quantized by rounding, without rows; quantize.refine of a run fits weights to rows")
        return [*out, *self.notes]


def convert(
    source: str | Path,
    destination: str | Path,
    quantize: str | None = None,
    dtype: str | None = None,
    *,
    group_size: int = 0,
    revision: str | None = None,
    base: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport | AdapterReport:
    """Convert a checkpoint in the Hugging Face or the MLX layout to a folder in the MLX layout, or an adapter
    of PEFT or mlx-lm to an adapter folder.

    Args:
        source: A Hub id or a folder.
        destination: The folder to write. A killed conversion is resumed by the same call.
        quantize: ``affine1`` to ``affine8``, ``mxfp4``, ``nvfp4``, ``mxfp8``, or a mixed recipe such as
            ``mixed4``; None does not quantize.
        dtype: ``float32``, ``bfloat16`` or ``float16`` for floating-point tensors; None keeps the type of
            each.
        group_size: Weights that share a scale; 0 for the default of the mode.
        revision: Commit, tag or branch of a Hub model, or of an adapter on the Hub. That of an adapter's base
            stands in its adapter_config.json.
        base: The base model of an adapter; by default the one that the adapter names.
        max_shard_bytes: Largest file; a larger tensor has a file of its own.
        memory_bytes: Bound on the working buffers; it changes no bit of the result.
        dry_run: Only return the report, write nothing.
        progress: Shows the progress.

    Raises:
        ModelError: the source is damaged or not supported; the destination is not changed.
        ConfigError: an option that an adapter cannot have, or ``base`` for a model.
        FileError: a failed write, or a destination that holds something else.
    """
    folder, destination = resolve(source, revision), Path(destination)
    if is_adapter(folder):
        changed = {
            "quantize": quantize,
            "dtype": dtype,
            "group_size": group_size,
            "max_shard_bytes": max_shard_bytes != MAX_SHARD_BYTES,
            "memory_bytes": memory_bytes != MEMORY_BYTES,
            "revision": revision and find_local(source),
        }
        return _convert_adapter(folder, destination, base, dry_run, [key for key in changed if changed[key]])
    if base is not None:
        raise ConfigError(f"base: {source} is a model, not an adapter", fix="leave it out")
    plan, jobs = _plan_jobs(folder, quantize, dtype, group_size)
    if dry_run:
        return _report(str(source), destination, plan, jobs, [], 0.0, dry_run=True)
    settings = {
        "quantize": quantize,
        "group_size": group_size,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }
    parents, format = {"source": source_key(folder)}, conversion_format(quantize)
    recover(destination)
    if is_current(destination, stage_key("convert", format, settings, parents)):
        return _finished_report(str(source), destination, plan)
    with staged_folder(destination, folder, "convert", settings, parents, format) as staged:
        report = _write(
            str(source), destination, staged.folder, plan, jobs, max_shard_bytes, memory_bytes, progress
        )
        staged.hashes.update(shard_hashes(staged.folder))
        commit = commit_of(folder) or revision
        staged.recorded.update(source=str(source), commit=commit, **report.facts(), seconds=report.seconds)
    return report


def _convert_adapter(
    folder: Path, destination: Path, base: str | Path | None, dry_run: bool, options: Sequence[str]
) -> AdapterReport:
    """Convert an adapter; ``options`` are those of a model that were given."""
    if options:
        fixes = {
            "revision": 'it is that of an adapter on the Hub; write that of the base as "revision" into '
            "adapter_config.json",
            "quantize": "convert the adapter without it, then quantize it with its base: "
            "mlx-distill export FOLDER MODEL --to hf, and convert MODEL with it",
        }
        raise ConfigError(
            f"{options[0]}: {folder} holds an adapter, which does not have this option",
            fix=fixes.get(
                options[0], "leave it out: the adapter keeps the type of its matrices, in one file"
            ),
        )
    read = from_peft if is_peft(folder) else from_mlx_lm
    return read(folder, destination, base, dry_run=dry_run)


def _finished_report(source: str, destination: Path, plan: CheckpointPlan) -> ConversionReport:
    """The report of a conversion that was finished before."""
    table = read_object(destination / TENSOR_TABLE)
    rows = tuple(_read_row(row) for row in table["tensors"])
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
    """Convert into the partial folder of a stage, which the caller publishes.

    The arguments are those of :func:`convert`; ``name`` is the title of the progress. Shards that an earlier
    call finished are kept.
    """
    folder = Path(folder)
    plan, jobs = _plan_jobs(resolve(source, revision), quantize, dtype)
    report = _write(str(source), folder, folder, plan, jobs, max_shard_bytes, memory_bytes, progress, name)
    if progress:
        for note in report.notes:
            progress.note(f"{name}: {note}")
    return report


def _plan_jobs(
    folder: Path, quantize: str | None, dtype: str | None, group_size: int = 0
) -> tuple[CheckpointPlan, list[TensorJob]]:
    if is_adapter(folder):
        raise ModelError(
            f"{folder} holds an adapter, not a model",
            fix="use mlx-distill quantize or export, which merge adapters",
        )
    plan = plan_checkpoint(folder)
    policy = quantization_policy(
        plan.architecture, plan.quantizable, quantize, dtype=dtype, group_size=group_size
    )
    return plan, [TensorJob(tensor, policy(tensor)) for tensor in plan.tensors]


def _write(
    source: str,
    destination: Path,
    folder: Path,
    plan: CheckpointPlan,
    jobs: Sequence[TensorJob],
    max_shard_bytes: int,
    memory_bytes: int,
    progress: Progress | None,
    name: str = "convert",
) -> ConversionReport:
    began = time.perf_counter()
    shards = stream_shards(
        jobs, folder, name, max_shard_bytes=max_shard_bytes, memory_bytes=memory_bytes, progress=progress
    )
    write_other_files(folder, plan, jobs, shards)
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
    rows = tensor_rows(plan, jobs, shards)
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
        plan_notes(plan),
        dry_run,
    )


def plan_notes(plan: CheckpointPlan) -> tuple[str, ...]:
    """What a user has to know of a model: how its folder was read, and where stock mlx-lm differs."""
    difference = plan.architecture.stock_difference(plan.config)
    return (*plan.notes, difference) if difference else plan.notes


TENSOR_TABLE = "tensors.json"
_TABLE_FORMAT = 1


def tensor_table(rows: Sequence[TensorRow]) -> list[str]:
    """The rows as aligned lines of text: tensor, shape, from, to, bits per weight, note."""
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


def update_loss_note(rows: Sequence[TensorRow]) -> list[str]:
    """A line of text if the error is a tenth or more of an adapter's update; else nothing."""
    shares = [row.error / row.update for row in rows if row.update]
    if max(shares, default=0.0) < 0.1:
        return []
    return [
        f"rounding costs as much as {max(shares):.0%} of the adapter's update; "
        "kept beside its base (adapter: keep) it loses nothing"
    ]


def stream_shards(
    jobs: Sequence[TensorJob], folder: Path, name: str, *, progress: Progress | None = None, **options: Any
) -> list[ShardResult]:
    """Write the shards and show how many megabytes of the source are processed.

    ``options`` are those of :func:`~mlx_distill.models.checkpoint.writer.write_shards`.
    """
    done, total = 0, sum(job.tensor.nbytes for job in jobs) / 1e6
    with progress.task(name, total=total, unit="MB") if progress else nullcontext() as bar:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if bar is not None:
                bar.update(done / 1e6)

        return write_shards(jobs, folder, on_bytes=on_bytes, **options)


def tensor_rows(
    plan: CheckpointPlan, jobs: Sequence[TensorJob], shards: Sequence[ShardResult]
) -> tuple[TensorRow, ...]:
    """The report of each tensor, measured if its shard was written, else as planned.

    The words of weights that were quantized in the source are counted as the weights that they encode.
    """
    measured = {row.name: row for shard in shards for row in shard.rows}
    rows = []
    for job in jobs:
        row = measured.get(job.tensor.name) or table_row(job, ErrorSums())
        path = job.tensor.name.removesuffix(".weight")
        if job.tensor.dtype == "U32" and path in plan.quantization:
            count, nbytes = plan.parameters(job.tensor), plan.quantized_bytes(path)
            row = replace(
                row,
                parameters=count,
                bits=round(8 * nbytes / count, 4),
                stored=plan.quantization[path].label,
                note="bit for bit",
            )
        rows.append(row)
    return tuple(rows)


def write_other_files(
    folder: Path, plan: CheckpointPlan, jobs: Sequence[TensorJob], shards: Sequence[ShardResult]
) -> None:
    """Write config.json, the tokenizer, and tensors.json with the rows and the hashes of the shards."""
    copy_tokenizer(plan.folder, folder, others=True)
    write_json(folder / "config.json", mlx_config(plan, jobs))
    rows = tensor_rows(plan, jobs, shards)
    table = {
        "format": _TABLE_FORMAT,
        "shards": [{"name": s.name, "sha256": s.sha256, "size": s.size} for s in shards],
        "left_out": [list(pair) for pair in plan.left_out],
        "tensors": [_stored_row(row) for row in rows],
    }
    write_json(folder / TENSOR_TABLE, table)


# tensors.json is part of the folder's content, which keys the stages that read it. So its notes keep the
# words of the first version: with others, a model that is converted again would make a training stale.
_STORED_NOTES = {"already quantized": "packed already", "requantized": "packed again"}


def _stored_row(row: TensorRow) -> dict[str, Any]:
    """A row as tensors.json spells it."""
    notes = [_STORED_NOTES.get(note, note) for note in row.note.split("; ")]
    return {**row.to_dict(), "note": "; ".join(notes)}


def _read_row(stored: dict[str, Any]) -> TensorRow:
    """The row of :func:`_stored_row`."""
    spelling = {old: new for new, old in _STORED_NOTES.items()}
    notes = [spelling.get(note, note) for note in stored["note"].split("; ")]
    return TensorRow(**{**stored, "shape": tuple(stored["shape"]), "note": "; ".join(notes)})


def shard_hashes(folder: Path) -> dict[str, str]:
    """The hashes of the shards in tensors.json, by file name."""
    return {shard["name"]: shard["sha256"] for shard in read_object(folder / TENSOR_TABLE)["shards"]}


def source_config(plan: CheckpointPlan) -> dict[str, Any]:
    """config.json of the source, with the tying that its tensors have and the rows that an adapter has."""
    config = read_object(plan.folder / "config.json") | {"vocab_size": plan.config["vocab_size"]}
    if "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = plan.config["tie_word_embeddings"]
    return config


def mlx_config(plan: CheckpointPlan, jobs: Sequence[TensorJob]) -> dict[str, Any]:
    """The source's config with the keys that stock mlx-lm needs, and ``quantization`` as mlx-lm writes it."""
    config = source_config(plan)
    arguments = plan.architecture.arguments(plan.config)
    if config.get("rope_parameters") and "rope_theta" not in config:
        stock_rope = plan.architecture.rope(plan.config).scaling
        config |= {
            "rope_theta": arguments["rope_theta"],
            "rope_scaling": {k: v for k, v in stock_rope.items() if k != "rope_theta"},
        }
    for key in plan.architecture.config_aliases:
        config.setdefault(key, arguments[key])
    types = {job.action.dtype for job in jobs if job.action.dtype}
    if len(types) == 1:
        name = next(name for name, stored in SAFETENSORS.items() if stored in types)
        config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    quantized = {
        job.tensor.name.removesuffix(".weight"): job.action.quantization.config
        for job in jobs
        if job.action.quantization
    }
    for path, quantization in plan.quantization.items():
        quantized.setdefault(path, quantization.config)
    return with_quantization(config, quantized)
