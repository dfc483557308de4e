"""Convert a checkpoint: streamed in bounded memory, verified by reading back, whole or not at all, resumable.

Every weight keeps its own type unless told otherwise, MXFP4 experts pass through bit for bit, and every tensor is accounted for: where
it came from, by which rule, what it became, and how far it is from what it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.files import digest, lock_folder, open_partial, partial_folder, recover, stage_key, write_json
from mlx_distill.models.checkpoint import Checkpoint, open_checkpoint
from mlx_distill.models.folder import FORMAT, check_destination, is_current, publish, source_key
from mlx_distill.models.hub import commit_of, resolve
from mlx_distill.models.jobs import Errors, Job, TensorRow, table_row
from mlx_distill.models.load import ADAPTER_CONFIG, check_tensors, load_config, packing, prepare_quantized, read_object
from mlx_distill.models.registry import architecture_of, build_model
from mlx_distill.models.rules import Architecture, Planned, forward_plan
from mlx_distill.models.tokenizer_files import copy_tokenizer
from mlx_distill.models.treatments import decider
from mlx_distill.models.writer import MAX_SHARD_BYTES, MEMORY_BYTES, ShardResult, write_shards
from mlx_distill.progress import Progress

TABLE = "tensors.json"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do: a line a tensor, and the sums.

    ``left_out`` names source tensors that are not needed, with the reason; ``resumed`` counts shards that an earlier run had finished.
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
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows], "bits_per_weight": self.bits_per_weight}

    def lines(self) -> list[str]:
        """The table, then the sums."""
        out = tensor_table(self.rows) if self.dry_run else []
        out += [f"left out: {name} ({reason})" for name, reason in self.left_out]
        verb = "would be" if self.dry_run else "written to"
        out.append(
            f"{self.model_type}: {self.parameters:,} parameters, {self.bits_per_weight:.2f} bits per weight, "
            f"{self.stored_bytes / 1e6:,.1f} MB {verb} {self.destination}"
            + ("" if self.dry_run else f" in {self.seconds:.1f} s, read back and compared")
        )
        if self.largest_error:
            out.append(f"largest relative error of a tensor: {self.largest_error:.2e}")
        return [*out, self.note] if self.note else out


def tensor_table(rows: Sequence[TensorRow]) -> list[str]:
    """Aligned lines: tensor, shape, from, to, bits per weight, what else is to say."""
    cells = [
        (r.name, "x".join(map(str, r.shape)) or "1", r.source_dtype, r.stored, f"{r.bits:.2f}" if r.parameters else "", r.note)
        for r in rows
    ]
    cells.insert(0, ("tensor", "shape", "from", "to", "bits", ""))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return ["  ".join([*(row[i].ljust(widths[i]) for i in range(5)), row[5]]).rstrip() for row in cells]


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first byte is written."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    checkpoint: Checkpoint
    planned: list[Planned]
    left_out: list[tuple[str, str]]
    model: Any

    @property
    def quantizable(self) -> dict[str, Any]:
        """Module paths that can be packed and are not."""
        return {path: m for path, m in self.model.named_modules() if hasattr(m, "to_quantized")}


def prepare(folder: Path) -> Prepared:
    """Read headers and config, make the plan, and check every tensor's name and shape against the config."""
    config = load_config(folder)
    architecture = architecture_of(config, str(folder / "config.json"))
    checkpoint = open_checkpoint(folder)
    planned, left_out = forward_plan(architecture, checkpoint.tensors, config)
    model = build_model(config, str(folder / "config.json"))
    prepare_quantized(model, config, {p.name: p for p in planned})
    check_tensors(checkpoint, config, model, planned)
    return Prepared(folder, config, architecture, checkpoint, planned, [(info.name, why) for info, why in left_out], model)


def convert(
    source: str | Path,
    destination: str | Path,
    quantize: str | None = None,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint (or one of ours) to a folder of ours.

    Args:
        source: A Hub id or a folder.
        destination: The folder to make. A killed conversion goes on where it stopped when the same command runs again.
        quantize: ``affine2`` to ``affine8``, ``mxfp4``, ``nvfp4``, ``mxfp8``, or a mixed recipe such as ``mixed4``; None keeps the weights.
        dtype: ``float32``, ``bfloat16`` or ``float16`` for floating-point tensors; None keeps each tensor's own.
        revision: Commit, tag or branch of a Hub model.
        max_shard_bytes: Largest file.
        memory_bytes: Bound on the working buffers.
        dry_run: Make the table and write nothing.
        progress: Where to say how far it is.

    Raises:
        ModelError: the source is damaged or not supported; the destination is untouched.
        FileError: the disk refused, or the destination holds something else.
    """
    folder, destination = resolve(source, revision), Path(destination)
    ready, jobs = _plan(folder, quantize, dtype)
    if dry_run:
        return _report(str(source), destination, ready, jobs, [], 0.0, dry_run=True)
    settings = {"quantize": quantize, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    parents = {"source": source_key(folder)}
    key = stage_key("convert", FORMAT, settings, parents)
    recover(destination)
    check_destination(destination, folder)
    if is_current(destination, key):
        return _as_written(str(source), destination, ready)
    with lock_folder(open_partial(destination, digest([key, str(folder.resolve())])) / "scratch"):
        partial = partial_folder(destination)
        report = _write(str(source), destination, partial, ready, jobs, max_shard_bytes, memory_bytes, progress)
        hashes = {row["name"]: row["sha256"] for row in read_object(partial / TABLE)["shards"]}
        recorded = {"source": str(source), "commit": revision or commit_of(folder), **report.facts(), "seconds": report.seconds}
        publish(destination, "convert", settings, parents, recorded, hashes)
    return report


def _as_written(source: str, destination: Path, ready: Prepared) -> ConversionReport:
    """The report of a conversion that stands there already."""
    table = read_object(destination / TABLE)
    rows = tuple(TensorRow(**{**row, "shape": tuple(row["shape"])}) for row in table["tensors"])
    report = _report(source, destination, ready, [], [], 0.0)
    stored = open_checkpoint(destination).nbytes
    return replace(report, rows=rows, parameters=sum(r.parameters for r in rows), stored_bytes=stored, resumed=len(table["shards"]))


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
) -> ConversionReport:
    """The same into a folder that somebody else publishes: a stage's partial one. Finished shards are kept on a second run."""
    folder = Path(folder)
    ready, jobs = _plan(resolve(source, revision), quantize, dtype)
    return _write(str(source), folder, folder, ready, jobs, max_shard_bytes, memory_bytes, progress)


def _plan(folder: Path, quantize: str | None, dtype: str | None) -> tuple[Prepared, list[Job]]:
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, not a model", fix="use mlx-distill quantize or export, which merge it")
    ready = prepare(folder)
    decide = decider(ready.architecture, ready.quantizable, quantize, dtype=dtype)
    return ready, [Job(p, decide(p)) for p in ready.planned]


def _write(
    source: str, destination: Path, into: Path, ready: Prepared, jobs: Sequence[Job], max_shard_bytes: int,
    memory_bytes: int, progress: Progress | None,
) -> ConversionReport:  # fmt: skip
    began = time.perf_counter()
    shards = stream(jobs, into, "convert", max_shard_bytes=max_shard_bytes, memory_bytes=memory_bytes, progress=progress)
    finish_folder(into, ready, jobs, shards)
    return _report(source, destination, ready, jobs, shards, time.perf_counter() - began)


def _report(
    source: str,
    destination: Path,
    ready: Prepared,
    jobs: Sequence[Job],
    shards: Sequence[ShardResult],
    seconds: float,
    *,
    dry_run: bool = False,
) -> ConversionReport:
    rows = shard_rows(ready, jobs, shards)
    return ConversionReport(
        source, str(destination), ready.architecture.model_type, rows, tuple(ready.left_out), sum(r.parameters for r in rows),
        ready.checkpoint.nbytes, sum(o.nbytes for job in jobs for o in job.outputs), seconds, sum(s.resumed for s in shards),
        ready.architecture.stock_differs(ready.config), dry_run,
    )  # fmt: skip


def stream(jobs: Sequence[Job], into: Path, name: str, *, progress: Progress | None = None, **options: Any) -> list[ShardResult]:
    """Write the shards, telling ``progress`` the megabytes of source that are done."""
    done = 0
    with progress.task(name, total=sum(job.planned.nbytes for job in jobs) / 1e6, unit="MB") if progress else nullcontext() as bar:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if bar is not None:
                bar.update(done / 1e6)

        return write_shards(jobs, into, on_bytes=on_bytes, **options)


def shard_rows(ready: Prepared, jobs: Sequence[Job], shards: Sequence[ShardResult]) -> tuple[TensorRow, ...]:
    """The table's lines: as measured where shards were written, else as planned; packed words that came in count as their weights."""
    measured = {row.name: row for shard in shards for row in shard.rows}
    planned = {p.name: p for p in ready.planned}
    modules = dict(ready.model.named_modules())
    rows = []
    for job in jobs:
        row = measured.get(job.planned.name) or table_row(job, Errors(), job.outputs, 0)
        path = job.planned.name.removesuffix(".weight")
        if job.planned.dtype == "U32" and f"{path}.scales" in planned:
            module = modules[path]
            count = job.planned.rows * job.planned.columns * 32 // module.bits
            stored = sum(planned[f"{path}.{leaf}"].nbytes for leaf in ("weight", "scales", "biases") if f"{path}.{leaf}" in planned)
            label = f"{module.mode} {module.bits} bits, groups of {module.group_size}"
            row = TensorRow(
                **{**asdict(row), "parameters": count, "bits": round(8 * stored / count, 4), "stored": label, "note": "bit for bit"}
            )
        rows.append(row)
    return tuple(rows)


def finish_folder(into: Path, ready: Prepared, jobs: Sequence[Job], shards: Sequence[ShardResult]) -> None:
    """Config, tokenizer, and the table of tensors with the shards' hashes."""
    copy_tokenizer(ready.folder, into, others=True)
    write_json(into / "config.json", our_config(ready, jobs))
    rows = shard_rows(ready, jobs, shards)
    table = {
        "format": FORMAT,
        "shards": [{"name": s.name, "sha256": s.sha256, "size": s.size} for s in shards],
        "left_out": [list(pair) for pair in ready.left_out],
        "tensors": [row.to_dict() for row in rows],
    }
    write_json(into / TABLE, table)


def our_config(ready: Prepared, jobs: Sequence[Job]) -> dict[str, Any]:
    """HF's keys, what stock mlx-lm needs besides, and ``quantization`` as mlx-lm writes it."""
    config = dict(read_object(ready.folder / "config.json"))
    arguments = ready.architecture.arguments(ready.config)
    rope = config.get("rope_parameters")
    if rope and "rope_theta" not in config:
        config |= {"rope_theta": arguments["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    if ready.architecture.model_type == "qwen3_moe" and "num_experts" not in config:
        config["num_experts"] = arguments["num_experts"]
    types = {job.treatment.dtype for job in jobs if job.treatment.dtype}
    if len(types) == 1:
        name = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[types.pop()]
        config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    packed = {job.planned.name.removesuffix(".weight"): job.treatment.config for job in jobs if job.treatment.kind == "quantize"}
    planned = {p.name: p for p in ready.planned}
    modules = dict(ready.model.named_modules())
    for path in sorted({job.planned.name.removesuffix(".weight") for job in jobs if job.planned.dtype == "U32"}):
        if f"{path}.scales" in planned:
            module = modules[path]
            packed[path] = packing(planned, path, job_columns(planned[f"{path}.weight"], module.bits))
    if packed:
        config["quantization"] = _quantization(packed)
        config.setdefault("quantization_config", config["quantization"])
        if "quant_method" not in config["quantization_config"]:
            config["quantization_config"] = config["quantization"]
    return config


def job_columns(planned: Planned, bits: int) -> int:
    """Columns of the plain weight behind packed words."""
    return planned.columns * 32 // bits


def _quantization(packed: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The commonest settings on top, and every module that differs by its path."""
    kinds = [tuple(settings.values()) for settings in packed.values()]
    common = max(sorted(set(kinds)), key=kinds.count)
    top = dict(zip(("group_size", "bits", "mode"), common, strict=True))
    return {**top, **{path: settings for path, settings in packed.items() if settings != top}}
