"""Writing the shards of a checkpoint in bounded memory, hashed while they are written, and resumable by
shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np

from mlx_distill.models.checkpoint.safetensors import INDEX
from mlx_distill.models.checkpoint.tensor_job import (
    ErrorSums,
    Output,
    TensorJob,
    TensorRow,
    row_blocks,
    run_block,
    table_row,
)
from mlx_distill.models.quantization import TensorAction
from mlx_distill.storage import digest, fsync_folder, os_errors, read_json, sha256, write_json

MAX_SHARD_BYTES = 2 << 30
# Blocks of rows that fit the processor's cache are the fastest: of 4 to 256 MiB, 32 took the least time.
MEMORY_BYTES = 32 << 20
# Copies of a block at the same time: as read, twice in float32, quantized, dequantized, and those in the
# queue.
_COPIES = 8
_QUEUE = 2  # blocks that wait to be written and hashed
_PIECE_BYTES = 1 << 20  # written at a time: whole blocks of 4 MiB cost half as much system time again
OnBytes = Callable[[int], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: its hash, its size and the report of its tensors."""

    name: str
    sha256: str
    size: int
    rows: tuple[TensorRow, ...]
    resumed: bool = False


def write_shards(
    jobs: Sequence[TensorJob],
    folder: Path,
    *,
    metadata: dict[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    salt: str = "",
    notes: Path | None = None,
    on_bytes: OnBytes | None = None,
) -> list[ShardResult]:
    """Write the outputs of the jobs as ``model-*.safetensors`` with their index into ``folder``.

    Args:
        jobs: In the order of writing.
        folder: A partial folder. Shards that an earlier run finished there are kept.
        metadata: Of the safetensors headers.
        max_shard_bytes: Largest shard; a larger tensor has a shard of its own.
        memory_bytes: Bound on the working buffers.
        salt: Anything else that the result depends on, such as the hash of an adapter: a finished shard is
            kept only if it is equal.
        notes: Folder for the records of finished shards, ``folder/scratch`` by default; not part of the
            result.
        on_bytes: Called with the source bytes that were processed since the last call.

    Raises:
        ModelError: a damaged source, or values that are not finite.
        FileError: a failed write.
    """
    groups = split_into_shards(
        jobs, lambda job: sum(output.nbytes for output in job.outputs), max_shard_bytes
    )
    notes = notes or folder / "scratch"
    with os_errors():
        folder.mkdir(parents=True, exist_ok=True)
        notes.mkdir(parents=True, exist_ok=True)
    results = []
    for number, group in enumerate(groups, 1):
        name = shard_name(number, len(groups))
        key, note = _key(group, salt), notes / f"{name}.json"
        result = _finished_shard(folder / name, note, key)
        if result is None:
            result = _write_shard(
                folder / name, group, metadata or {"format": "mlx"}, memory_bytes // _COPIES, on_bytes
            )
            rows = [asdict(row) for row in result.rows]
            write_json(note, {"key": key, "sha256": result.sha256, "size": result.size, "rows": rows})
        elif on_bytes:
            on_bytes(sum(job.tensor.nbytes for job in group))
        results.append(result)
    for stale in set(folder.glob("model*.safetensors")) - {folder / r.name for r in results}:
        stale.unlink()
    outputs = [{output.name: output.nbytes for job in group for output in job.outputs} for group in groups]
    write_index(folder, outputs)
    return results


def split_into_shards(items: Iterable[Item], nbytes: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Split items, in order, into groups of at most ``limit`` bytes; an item is never split.

    >>> split_into_shards([3, 4, 9, 1], lambda size: size, 8)
    [[3, 4], [9], [1]]
    """
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + nbytes(item) > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes(item)
    return groups


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, counted from 1.

    >>> shard_name(1, 2)
    'model-00001-of-00002.safetensors'
    """
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Mapping[str, int]]) -> None:
    """Write ``model.safetensors.index.json`` for shards that hold tensors of these names and bytes."""
    weight_map = {name: shard_name(i, len(shards)) for i, shard in enumerate(shards, 1) for name in shard}
    total = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def _key(group: Sequence[TensorJob], salt: str) -> str:
    """What a finished shard is valid for: its source files, and what is done with each tensor."""
    files = {source.file for job in group for source in job.tensor.sources}
    stats = {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)}
    jobs = [
        [
            job.tensor.name,
            job.tensor.rule,
            [source.name for source in job.tensor.sources],
            _action_key(job.action),
            job.update is not None,
        ]
        for job in group
    ]
    return digest([salt, stats, jobs])


def _action_key(action: TensorAction) -> dict[str, Any]:
    """An action in the form that the records of finished shards have had since the first version."""
    q = action.quantization
    return {
        "kind": "keep" if action.keeps_bits else "quantize" if q else "cast",
        "dtype": action.dtype,
        "mode": q.mode if q else "",
        "bits": q.bits if q else 0,
        "group_size": q.group_size if q else 0,
        "why": action.reason,
        "again": action.requantized,
    }


def _finished_shard(path: Path, note: Path, key: str) -> ShardResult | None:
    """The shard of an earlier run, if it is whole and has this key."""
    if not (path.is_file() and note.is_file()):
        return None
    raw = read_json(note)
    if raw.get("key") != key or path.stat().st_size != raw["size"] or sha256(path) != raw["sha256"]:
        return None
    rows = tuple(TensorRow(**{**row, "shape": tuple(row["shape"])}) for row in raw["rows"])
    return ShardResult(path.name, raw["sha256"], raw["size"], rows, resumed=True)


def _header(outputs: Sequence[Output], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _ShardFile:
    """A file that is written in one thread and hashed in another, while the next blocks are computed."""

    def __init__(self, path: Path) -> None:
        self.path, self.hash = path, hashlib.sha256()
        self.file = open(path, "wb", buffering=0)
        self.writer, self.hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.pending: list[Future[None]] = []

    def put(self, block: np.ndarray | bytes) -> None:
        """Add a block to the end of the file; waits while the queue is full."""
        while len(self.pending) >= 2 * _QUEUE:
            self.pending.pop(0).result()
        data = block if isinstance(block, bytes) else np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        self.pending.append(self.writer.submit(self._write, data))
        self.pending.append(self.hasher.submit(self.hash.update, data))

    def _write(self, data: bytes | np.ndarray) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += self.file.write(view[done : done + _PIECE_BYTES]) or 0

    def finish(self) -> str:
        """Wait for all blocks, sync the file, and return its hash."""
        while self.pending:
            self.pending.pop(0).result()
        os.fsync(self.file.fileno())
        return self.hash.hexdigest()

    def close(self) -> None:
        """Stop the threads and close the file, also after an error."""
        for thread in (self.writer, self.hasher):
            thread.shutdown(wait=True, cancel_futures=True)
        self.file.close()


def _write_shard(
    path: Path,
    group: Sequence[TensorJob],
    metadata: dict[str, str],
    block_bytes: int,
    on_bytes: OnBytes | None,
) -> ShardResult:
    outputs = [output for job in group for output in job.outputs]
    temporary = path.with_name(f".{path.name}.tmp")
    with os_errors(path):
        file = _ShardFile(temporary)
        try:
            file.put(_header(outputs, metadata))
            rows = tuple(_write_job(job, file, block_bytes, on_bytes) for job in group)
            sha = file.finish()
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            file.close()
            temporary.unlink(missing_ok=True)
        return ShardResult(path.name, sha, path.stat().st_size, rows)


def _write_job(job: TensorJob, file: _ShardFile, block_bytes: int, on_bytes: OnBytes | None) -> TensorRow:
    errors = ErrorSums()
    with ExitStack() as stack:
        # Scales and biases follow the whole weight in the file. Until then they are in temporary files, since
        # their size grows with the tensor.
        later = [stack.enter_context(TemporaryFile(dir=file.path.parent)) for _ in job.outputs[1:]]
        for start, stop in row_blocks(job, block_bytes):
            weight, *others = run_block(job, start, stop, errors)
            file.put(weight)
            for temporary, block in zip(later, others, strict=True):
                temporary.write(np.ascontiguousarray(block).data)
            if on_bytes:
                on_bytes(job.tensor.nbytes * (stop - start) // max(job.tensor.rows, 1))
        for temporary in later:
            temporary.seek(0)
            while data := temporary.read(_PIECE_BYTES):
                file.put(data)
    return table_row(job, errors)
