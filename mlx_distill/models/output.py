"""What is written around the shards: config, tokenizer, and the table that accounts for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_distill.models.checkpoint.plan import Prepared
from mlx_distill.models.checkpoint.tensor_job import Errors, Job, TensorRow, table_row
from mlx_distill.models.checkpoint.writer import ShardResult, write_shards
from mlx_distill.models.config_files import read_object
from mlx_distill.models.folder import FORMAT
from mlx_distill.models.quantization import SAFETENSORS
from mlx_distill.models.tokenizer_files import copy_tokenizer
from mlx_distill.progress import Progress
from mlx_distill.storage import write_json

TABLE = "tensors.json"


def tensor_table(rows: Sequence[TensorRow]) -> list[str]:
    """Aligned lines: tensor, shape, from, to, bits per weight, what else is to say."""
    cells = [
        (r.name, "x".join(map(str, r.shape)) or "1", r.source_dtype, r.stored, f"{r.bits:.2f}" if r.parameters else "", r.note)
        for r in rows
    ]
    cells.insert(0, ("tensor", "shape", "from", "to", "bits", ""))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return ["  ".join([*(row[i].ljust(widths[i]) for i in range(5)), row[5]]).rstrip() for row in cells]


def update_lost(rows: Sequence[TensorRow]) -> list[str]:
    """A line where rounding ate a tenth or more of an adapter's update: the user may want to keep it beside instead."""
    shares = [row.error / row.update for row in rows if row.update]
    if max(shares, default=0.0) < 0.1:
        return []
    return [f"rounding costs as much as {max(shares):.0%} of the adapter's update; kept beside its base (adapter: keep) it loses nothing"]


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
    rows = []
    for job in jobs:
        row = measured.get(job.planned.name) or table_row(job, Errors(), job.outputs)
        path = job.planned.name.removesuffix(".weight")
        if job.planned.dtype == "U32" and path in ready.packings:
            count, stored = ready.parameters(job.planned), ready.packed_bytes(path)
            row = replace(row, parameters=count, bits=round(8 * stored / count, 4), stored=ready.packings[path].label, note="bit for bit")
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


def shard_hashes(folder: Path) -> dict[str, str]:
    """The hashes that :func:`finish_folder` left in the folder's table, by the shards' names."""
    return {row["name"]: row["sha256"] for row in read_object(folder / TABLE)["shards"]}


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
        name = next(name for name, stored in SAFETENSORS.items() if stored in types)
        config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    packed = {job.planned.name.removesuffix(".weight"): job.treatment.config for job in jobs if job.treatment.kind == "quantize"}
    packed |= {path: packing.config for path, packing in ready.packings.items() if path not in packed}
    return with_quantization(config, packed)


def with_quantization(config: Mapping[str, Any], packed: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The config with ``quantization`` as mlx-lm reads it: the commonest settings on top, and every module that differs by its path.

    Args:
        config: Of the model or of what it came from.
        packed: ``group_size``, ``bits`` and ``mode`` by the paths of the packed modules; empty where none is.
    """
    out = {key: value for key, value in config.items() if key != "quantization"}
    method = (out.get("quantization_config") or {}).get("quant_method")
    if all(settings["mode"] != method for settings in packed.values()):  # ours, or of weights that are packed no more
        out.pop("quantization_config", None)
    if not packed:
        return out
    kinds = [tuple(settings.values()) for settings in packed.values()]
    common = max(sorted(set(kinds)), key=kinds.count)
    top = dict(zip(("group_size", "bits", "mode"), common, strict=True))
    out["quantization"] = {**top, **{path: settings for path, settings in packed.items() if settings != top}}
    return {"quantization_config": out["quantization"], **out}
