"""The teacher's soft targets on disk, in shards: token by token, and for the label as a whole.

A folder holds ``index.json`` and, for each shard, ``rows-NNNNN.jsonl`` (id, text, label log-probabilities,
length) and ``tokens-NNNNN.safetensors`` with the shard's rows concatenated:

    ids            [n]     int32    the teacher's tokens of the answer, its stop token last
    logprobs       [n]     float32  natural log-probability of each of them
    topk_ids       [n, k]  int32    the most probable tokens at that position, descending
    topk_logprobs  [n, k]  float16  natural, over the whole vocabulary: the remaining mass is the tail

Position ``j`` holds the distribution that token ``j`` is drawn from. 6k + 8 bytes a token. The token file of
a shard is written last and atomically, so a killed writer continues after its last complete shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.errors import FileError
from mlx_distill.storage import atomic_path, os_errors, read_json, read_jsonl, write_json, write_jsonl

FORMAT = 2
_FIX = "delete the folder and run: mlx-distill targets"


@dataclass(frozen=True)
class TeacherTargets:
    """One row's targets: the answer's text and tokens, and the teacher's log-probabilities in nats.

    Arrays as in the table above, ``topk_logprobs`` in float32; ``label_logprobs [c + 1]`` float32 is over the
    labels and all other tokens, None where the row has no label distribution.
    """

    id: str
    text: str
    label_logprobs: Float[np.ndarray, " c"] | None
    ids: Int[np.ndarray, " n"]
    logprobs: Float[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]


class TargetWriter:
    """Writes shards into a folder; continues after the shards that an interrupted run has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[int] = []
        with os_errors():
            folder.mkdir(parents=True, exist_ok=True)
            while (folder / _tokens(len(self.shards))).is_file():
                rows = sum(1 for _ in read_jsonl(folder / _rows(len(self.shards))))
                self.shards.append(rows)

    @property
    def done(self) -> int:
        """Rows of the complete shards."""
        return sum(self.shards)

    def write(self, rows: Sequence[TeacherTargets]) -> None:
        """Write one shard."""
        from safetensors.numpy import save_file

        number = len(self.shards)
        labels = (None if r.label_logprobs is None else r.label_logprobs.tolist() for r in rows)
        records = (
            {"id": r.id, "text": r.text, "label_logprobs": label, "tokens": len(r.ids)}
            for r, label in zip(rows, labels, strict=True)
        )
        write_jsonl(self.folder / _rows(number), records)
        tensors: dict[str, np.ndarray] = {
            "ids": np.concatenate([r.ids for r in rows]).astype(np.int32),
            "logprobs": np.concatenate([r.logprobs for r in rows]).astype(np.float32),
            "topk_ids": np.concatenate([r.topk_ids for r in rows]).astype(np.int32),
            "topk_logprobs": np.concatenate([r.topk_logprobs for r in rows]).astype(np.float16),
        }
        with atomic_path(self.folder / _tokens(number)) as temporary:
            save_file(tensors, temporary)
        self.shards.append(len(rows))

    def finish(self, **facts: Any) -> None:
        """Write the index: the number of rows and shards, and ``facts``, such as the labels and a hash of the
        teacher's tokenizer.
        """
        write_json(
            self.folder / "index.json",
            {"format": FORMAT, "rows": self.done, "shards": len(self.shards), **facts},
        )


class TargetReader:
    """Reads a folder of targets, a shard at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        version = index.get("format") if isinstance(index, dict) else None
        if version != FORMAT:
            raise FileError(
                f"{self.folder}: soft targets of format {version}, not {FORMAT}",
                fix="make them again: mlx-distill targets",
            )
        self.index: Mapping[str, Any] = index

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of the label log-probabilities, to which one for all other tokens is added."""
        return tuple(self.index["labels"])

    def __len__(self) -> int:
        return int(self.index["rows"])

    def __iter__(self) -> Iterator[TeacherTargets]:
        for number in range(int(self.index["shards"])):
            yield from self._shard(number)

    def _shard(self, number: int) -> Iterator[TeacherTargets]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.folder / _tokens(number)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{path}: cannot be read: {error}", fix=_FIX) from error
        start = 0
        for line, row in read_jsonl(self.folder / _rows(number)):
            end = start + row["tokens"]
            if end > len(tensors["ids"]):
                raise FileError(f"{path}: fewer tokens than line {line} of its rows says", fix=_FIX)
            part = {name: value[start:end] for name, value in tensors.items()}
            labels = row["label_logprobs"]
            part["topk_logprobs"] = part["topk_logprobs"].astype(np.float32)
            yield TeacherTargets(
                row["id"],
                row["text"],
                None if labels is None else np.array(labels, dtype=np.float32),
                **part,
            )
            start = end


def _tokens(number: int) -> str:
    return f"tokens-{number:05d}.safetensors"


def _rows(number: int) -> str:
    return f"rows-{number:05d}.jsonl"
