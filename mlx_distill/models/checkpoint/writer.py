"""Shards written in bounded memory: streamed, hashed on the way, read back, renamed; a kill costs at most the
shard it hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from mlx_distill.errors import FileError
from mlx_distill.models.checkpoint.safetensors import INDEX
from mlx_distill.models.checkpoint.tensor_job import (
    Errors,
    Output,
    TensorJob,
    TensorRow,
    row_blocks,
    run_block,
    table_row,
)
from mlx_distill.storage import digest, fsync_folder, os_errors, read_json, sha256, write_json

MAX_SHARD_BYTES = 2 << 30
# Slabs that fit the processor's cache are the fastest as well: of 4 to 256 MiB, 32 took the least time.
MEMORY_BYTES = 32 << 20
_COMPARED = 1 << 20  # bytes written, hashed and compared at a time
# Copies of a slab that exist at once: as read, in float32 twice, packed and unpacked again, and two in the
# writer's queue.
_COPIES = 8
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: its hash, its size and the lines of its tensors."""

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
    """Write the jobs' outputs as ``model-*.safetensors`` and their index into ``folder``.

    Args:
        jobs: In the order of writing.
        folder: A partial folder.
        max_shard_bytes: Largest shard, except that a tensor is never cut.
        memory_bytes: Bound on the working buffers.
        salt: What the result depends on besides the sources (an adapter's hash): finished shards are only
            kept if it is the same.
        notes: Where notes of finished shards go, ``folder/scratch`` if not given; not part of the result.
        on_bytes: Called with the bytes of source done since the last call.

    Raises:
        ModelError: damaged or not finite sources.
        FileError: the disk refused, or what was written does not read back.
    """
    groups = plan_shards(jobs, max_shard_bytes)
    notes = notes or folder / "scratch"
    with os_errors():
        folder.mkdir(parents=True, exist_ok=True)
        notes.mkdir(parents=True, exist_ok=True)
    results = []
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        key = _key(group, salt)
        note = notes / f"{name}.json"
        done = _finished(folder / name, note, key)
        if done is None:
            done = _write_shard(
                folder / name, group, metadata or {"format": "mlx"}, memory_bytes // _COPIES, on_bytes
            )
            write_json(
                note,
                {
                    "key": key,
                    "sha256": done.sha256,
                    "size": done.size,
                    "rows": [asdict(row) for row in done.rows],
                },
            )
        elif on_bytes:
            on_bytes(sum(job.tensor.nbytes for job in group))
        results.append(done)
    for stale in set(folder.glob("model*.safetensors")) - {folder / r.name for r in results}:
        stale.unlink()
    _write_index(folder, groups, results)
    return results


def plan_shards(jobs: Sequence[TensorJob], max_shard_bytes: int) -> list[list[TensorJob]]:
    """Cut the jobs, in order, into shards; a job's outputs stay together."""
    groups: list[list[TensorJob]] = [[]]
    size = 0
    for job in jobs:
        nbytes = sum(output.nbytes for output in job.outputs)
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += nbytes
    return groups


def _key(group: Sequence[TensorJob], salt: str) -> str:
    files = {info.file for job in group for info in job.tensor.sources}
    stats = {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)}
    jobs = [
        [
            job.tensor.name,
            job.tensor.rule,
            [s.name for s in job.tensor.sources],
            asdict(job.action),
            job.update is not None,
        ]
        for job in group
    ]
    return digest([salt, stats, jobs])


def _finished(path: Path, note: Path, key: str) -> ShardResult | None:
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


class _Sink:
    """Writes, reads back and compares in one thread and hashes in another, two slabs behind at most."""

    def __init__(self, path: Path) -> None:
        self.path, self.hash, self.size = path, hashlib.sha256(), 0
        self.file = open(path, "wb+", buffering=0)
        self.pool, self.hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.pending: list[Future[None]] = []
        self.mirror = bytearray(_COMPARED)

    def put(self, block: np.ndarray | bytes) -> None:
        data = (
            block
            if isinstance(block, bytes)
            else memoryview(np.ascontiguousarray(block)).cast("B")
            if block.size
            else b""
        )
        while len(self.pending) >= 4:
            self.pending.pop(0).result()
        self.pending += [self.pool.submit(self._write, data), self.hashing.submit(self.hash.update, data)]

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _COMPARED):
            piece = view[start : start + _COMPARED]
            done = 0
            while done < len(piece):
                done += self.file.write(piece[done:]) or 0
            count = os.preadv(self.file.fileno(), [memoryview(self.mirror)[: len(piece)]], self.size)
            # A bytearray compares with memcmp, a memoryview byte by byte.
            if count != len(piece) or (self.mirror if count == _COMPARED else self.mirror[:count]) != piece:
                raise FileError(
                    f"{self.path}: what was written does not read back the same",
                    fix="check the disk, then run the same command again",
                )
            self.size += len(piece)

    def close(self) -> str:
        """Wait for everything, sync, and return the hash."""
        while self.pending:
            self.pending.pop(0).result()
        os.fsync(self.file.fileno())
        return self.hash.hexdigest()

    def release(self) -> None:
        """Let go of the thread and the file, whatever happened."""
        for pool in (self.pool, self.hashing):
            pool.shutdown(wait=True, cancel_futures=True)
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
        sink = _Sink(temporary)
        try:
            sink.put(_header(outputs, metadata))
            rows = tuple(_write_job(job, sink, block_bytes, on_bytes) for job in group)
            written = sink.close()
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            sink.release()
            temporary.unlink(missing_ok=True)
        return ShardResult(path.name, written, path.stat().st_size, rows)


def _write_job(job: TensorJob, sink: _Sink, block_bytes: int, on_bytes: OnBytes | None) -> TensorRow:
    errors, outputs = Errors(), job.outputs
    with ExitStack() as files:
        # Scales and biases come after the whole weight in the file; until then they wait on the disk, since
        # they grow with the tensor.
        later = [files.enter_context(TemporaryFile(dir=sink.path.parent)) for _ in outputs[1:]]
        for start, stop in row_blocks(job, block_bytes):
            weight, *rest = run_block(job, start, stop, errors)
            sink.put(weight)
            for file, block in zip(later, rest, strict=True):
                file.write(np.ascontiguousarray(block).data)
            if on_bytes:
                on_bytes(job.tensor.nbytes * (stop - start) // max(job.tensor.rows, 1))
        for file in later:
            file.seek(0)
            while piece := file.read(_COMPARED):
                sink.put(piece)
    return table_row(job, errors, outputs)


def _write_index(folder: Path, groups: Sequence[Sequence[TensorJob]], results: Sequence[ShardResult]) -> None:
    weight_map, total = {}, 0
    for group, result in zip(groups, results, strict=True):
        for job in group:
            for output in job.outputs:
                weight_map[output.name] = result.name
                total += output.nbytes
    write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
