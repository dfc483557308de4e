"""The teacher's soft targets on disk, format 3: token by token, and for the label as a whole.

A folder holds ``index.json`` and shards of some rows. Shard N is ``rows-N.jsonl``, a line a row with its
``id``, ``sample`` (0, or the number of the text where the row has several), ``text`` and number of
``tokens``; where the teacher thought, what it thought (``thinking``), and of tokens that begin with it the
numbers ``thinking_tokens`` and ``answer_start``. And ``tokens-N.safetensors`` with the rows one after the
other:

    records     [n, b]      uint8    the distributions: :mod:`mlx_distill.distill.token_codec`
    labels      [r, c + 1]  float32  log-probabilities of the labels and of everything else; NaN: none

Token j of a row is in the teacher's vocabulary, the stop token last; record j holds the distribution that it
is drawn from and its length in bytes, so that no student and no tokenizer is needed to find out where in the
text it stands. The metadata of the token file names the cache that it belongs to (a hash of its layout and of
what it was made from), its number, hashes of its own tensors and of the shard's lines, and the sums that
the index adds up. The index has the fingerprints and the hash of every file. A token file is written last and
atomically, and a writer goes on behind the last shard whose hashes are right, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.distill.token_codec import TokenLayout, TokenRecords, pack_records, unpack_records
from mlx_distill.errors import DataError, FileError, ModelError
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.storage import (
    atomic_path,
    digest,
    os_errors,
    read_json,
    read_jsonl,
    sha256,
    write_json,
    write_jsonl,
)

FORMAT = 3
INDEX = "index.json"
# What each cache has fingerprints of; "system" is added where the teacher reads another system prompt.
MADE_FROM = ("weights", "adapter", "tokenizer", "template", "rows")
_AGAIN = "make them again: mlx-distill targets"
_FIX = "delete the folder and run: mlx-distill targets"
_METADATA = "teacher_cache"  # one key: the order of several is not fixed
_OPEN_SHARDS = 4


@dataclass(frozen=True)
class TeacherTargets:
    """One row's targets: the answer's text and tokens, and the teacher's log-probabilities in nats.

    Args:
        id: The row's.
        text: The answer.
        label_logprobs: ``[c + 1]`` over the labels and all other tokens, or None.
        ids: The teacher's tokens of the answer, its stop token last.
        logprobs: Of each of them.
        topk_ids: The most probable tokens at each position, descending; or of sampled targets the distinct
            samples.
        topk_logprobs: Theirs, over the whole vocabulary; or the logarithms of their shares of the samples.
        tail_logprobs: The logarithm of the mass outside of these. None: what is missing to 1.
        ends: Where in the answer's bytes each token ends; None where the tokenizer's bytes are not known.
        tempered_tails: ``[n, t]`` the logarithm of the mass outside of these at each temperature of a cache.
        thinking: What the teacher thought before it answered, or nothing.
        thinking_tokens: Of the tokens those of the thinking that is kept, the first ones.
        answer_start: The first token of the answer: behind the thinking that is kept and what marks it; 0
            where the tokens are those of the answer alone.
    """

    id: str
    text: str
    label_logprobs: Float[np.ndarray, " c"] | None
    ids: Int[np.ndarray, " n"]
    logprobs: Float[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]
    tail_logprobs: Float[np.ndarray, " n"] | None = None
    ends: Int[np.ndarray, " n"] | None = None
    tempered_tails: Float[np.ndarray, "n t"] | None = None
    thinking: str = ""
    thinking_tokens: int = 0
    answer_start: int = 0

    def answer_alone(self) -> TeacherTargets:
        """The targets of the answer's tokens, without those of the thinking before it."""
        at = slice(self.answer_start, None)
        if not self.answer_start:
            return self
        names = ("ids", "logprobs", "topk_ids", "topk_logprobs", "tail_logprobs", "ends", "tempered_tails")
        cut = {name: value[at] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **cut, thinking_tokens=0, answer_start=0)


class TargetWriter:
    """Writes shards into a folder; continues behind the whole shards of the same cache.

    Args:
        folder: Where they are written.
        layout: Of the tokens' records.
        fingerprints: What the targets are made from: names and hashes.

    Attributes:
        shards: Rows, tokens, sums of the masses and hashes of each shard that is written.
    """

    def __init__(
        self,
        folder: Path,
        layout: TokenLayout,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.layout = folder, layout
        self.fingerprints = dict(fingerprints or {})
        self.key = _cache_key(layout, self.fingerprints)
        self.shards: list[dict[str, Any]] = []
        self._last: tuple[str, int] = ("", -1)
        with os_errors():
            folder.mkdir(parents=True, exist_ok=True)
            while (shard := self._whole(len(self.shards))) is not None:
                self.shards.append(shard)
            for path in [*folder.glob("tokens-*"), *folder.glob("rows-*")]:
                if int(path.stem.partition("-")[2]) >= len(self.shards):
                    path.unlink()
        if self.shards:
            *_, (_, last) = read_jsonl(folder / _rows(len(self.shards) - 1))
            self._last = last["id"], last["sample"]

    def _whole(self, number: int) -> dict[str, Any] | None:
        """A shard that an earlier run has written whole, as it is listed in the index."""
        path = self.folder / _tokens(number)
        facts = _metadata(path)
        if facts is None or (facts["cache"], facts["number"]) != (self.key, number):
            return None
        rows = self.folder / _rows(number)
        if not rows.is_file() or sha256(rows) != facts["rows_sha256"]:
            return None
        if _content(_tensors(path) or {}) != facts["content"]:
            return None
        return {**facts["sums"], "rows_sha256": facts["rows_sha256"], "sha256": sha256(path)}

    @property
    def done(self) -> int:
        """Rows of the complete shards."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def sums(self) -> dict[str, Any]:
        """Tokens, and the mean mass of what is kept of each distribution; of the tail at each temperature."""
        tokens = sum(shard["tokens"] for shard in self.shards)
        mean = 1 / max(tokens, 1)
        kept = sum(shard["mass"] for shard in self.shards) * mean
        tails = {
            str(t): sum(shard["tails"][i] for shard in self.shards) * mean
            for i, t in enumerate(self.layout.temperatures)
        }
        return {"tokens": tokens, "kept_mass": kept, "tail_mass_at": tails}

    def write(self, rows: Sequence[TeacherTargets]) -> None:
        """Write one shard.

        Raises:
            ModelError: a row's log-probabilities are no distribution.
        """
        from safetensors.numpy import save_file

        number = len(self.shards)
        packed = np.concatenate([self._packed(row) for row in rows])
        tensors = {"records": packed, "labels": _label_table(rows)}
        write_jsonl(self.folder / _rows(number), self._lines(rows))
        sums = {"rows": len(rows), "tokens": len(packed), **self._masses(packed)}
        facts = {
            "format": FORMAT,
            "cache": self.key,
            "number": number,
            "sums": sums,
            "rows_sha256": sha256(self.folder / _rows(number)),
            "content": _content(tensors),
        }
        path = self.folder / _tokens(number)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={_METADATA: json.dumps(facts)})
        self.shards.append({**sums, "rows_sha256": facts["rows_sha256"], "sha256": sha256(path)})

    def write_all(self, shards: Iterable[Sequence[TeacherTargets]]) -> Iterator[int]:
        """Write each shard while the next one is computed.

        Args:
            shards: One is waited for in memory while another is written. An error that they raise comes after
                the shard before is on the disk.

        Yields:
            The rows that are on the disk after each shard.

        Raises:
            ModelError, FileError: of :meth:`write`, before another shard is written.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="targets") as pool:
            written: Future[None] | None = None
            for rows in shards:
                if written is not None:
                    written.result()
                    yield self.done
                written = pool.submit(self.write, rows)
            if written is not None:
                written.result()
                yield self.done

    def _lines(self, rows: Sequence[TeacherTargets]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self._last = row.id, self._last[1] + 1 if self._last[0] == row.id else 0
            line = {"id": row.id, "sample": self._last[1], "text": row.text, "tokens": len(row.ids)}
            names = ("thinking", "thinking_tokens", "answer_start")
            yield {**line, **{name: value for name in names if (value := getattr(row, name))}}

    def _packed(self, row: TeacherTargets) -> np.ndarray:
        tail = row.tail_logprobs
        if tail is None:
            rest = 1 - np.exp(row.topk_logprobs.astype(np.float64)).sum(axis=1)
            tail = np.where(rest > 1e-7, np.log(np.maximum(rest, 1e-7)), LOWEST)
        ends = np.zeros(len(row.ids), dtype=np.int64) if row.ends is None else row.ends
        lengths = np.diff(ends, prepend=0) if self.layout.length_bits else np.zeros(len(row.ids), np.int64)
        records = TokenRecords(
            row.ids, row.logprobs, row.topk_ids, row.topk_logprobs, tail, lengths, row.tempered_tails
        )
        try:
            return pack_records(self.layout, records)
        except ValueError as error:
            raise ModelError(
                f"row {row.id}: the teacher's distributions cannot be kept: {error}",
                fix="run: mlx-distill inspect --verify of the teacher; and mlx-distill targets",
            ) from error

    def _masses(self, packed: np.ndarray) -> dict[str, Any]:
        """Sums over a shard's tokens, of what will be read back."""
        records = unpack_records(self.layout, packed)
        tails = [records.tail_logprobs]
        if records.tempered_tails is not None:
            tails += list(records.tempered_tails.T)
        outside = [float(np.exp(tail.astype(np.float64)).sum()) for tail in tails]
        return {"mass": len(packed) - outside[0], "tails": outside[1:]}

    def finish(self, **facts: Any) -> None:
        """Write the index, with ``facts`` such as the labels."""
        index = {
            "format": FORMAT,
            "rows": self.done,
            "layout": asdict(self.layout),
            "record_bytes": self.layout.record_bytes,
            **self.sums,
            "fingerprints": self.fingerprints,
            "cache": self.key,
            "shards": self.shards,
            **facts,
        }
        write_json(self.folder / INDEX, {**index, "content": digest(index)})


class TargetReader:
    """The targets of a folder, in their order or by number; a file is checked when it is first read.

    Raises:
        FileError: no targets, unfinished ones, those of another format, or a damaged file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file() and any(self.folder.glob("tokens-*.safetensors")):
            raise FileError(
                f"{self.folder}: unfinished soft targets: shards without {INDEX}",
                fix="run: mlx-distill targets",
            )
        index = read_json(self.folder / INDEX)
        version = index.get("format") if isinstance(index, dict) else None
        if version != FORMAT:
            raise FileError(f"{self.folder}: soft targets of format {version}, not {FORMAT}", fix=_AGAIN)
        if index.pop("content", None) != digest(index):
            raise FileError(f"{self.folder / INDEX}: has changed since it was written", fix=_FIX)
        self.index: Mapping[str, Any] = index
        temperatures = tuple(index["layout"].get("temperatures", ()))
        if index.get("temperatures"):  # of a development version: a partition each, in other records
            raise FileError(f"{self.folder}: soft targets with partitions of temperatures", fix=_AGAIN)
        self.layout = TokenLayout(**{**index["layout"], "temperatures": temperatures})
        self._ends = np.cumsum([shard["rows"] for shard in index["shards"]]).tolist()
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of the label log-probabilities, to which one for all other tokens is added."""
        return tuple(self.index["labels"])

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse targets that were made from something else, or that do not say from what.

        Args:
            fingerprints: As they were given to the writer, of what is there now: all of :data:`MADE_FROM`,
                and others where there are any. One that only one of the two has differs.

        Raises:
            DataError: names all that differs, or is missing in the targets.
        """
        theirs = self.index["fingerprints"]
        missing = [name for name in MADE_FROM if name not in theirs]
        if missing:
            raise DataError(
                f"{self.folder}: targets without a fingerprint of {', '.join(missing)}", fix=_AGAIN
            )
        names = dict.fromkeys([*MADE_FROM, *fingerprints, *theirs])
        other = [name for name in names if theirs.get(name) != fingerprints.get(name)]
        if other:
            raise DataError(f"{self.folder}: targets of another {', another '.join(other)}", fix=_AGAIN)

    def __len__(self) -> int:
        return int(self.index["rows"])

    def __iter__(self) -> Iterator[TeacherTargets]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, row: Any) -> Any:
        """The targets of one row, or of a slice of rows."""
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        row = range(len(self))[row]
        number = bisect_right(self._ends, row)
        shard = self._open.pop(number, None) or _Shard(self.folder, number, self.index)
        self._open[number] = shard
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard.row(row - self._ends[number] + self.index["shards"][number]["rows"], self.layout)


class _Shard:
    """The checked tensors and lines of a shard."""

    def __init__(self, folder: Path, number: int, index: Mapping[str, Any]) -> None:
        listed = index["shards"][number]
        for name, expected in ((_tokens(number), "sha256"), (_rows(number), "rows_sha256")):
            _check_file(folder / name, listed[expected], str(index["cache"]))
        self.path = folder / _tokens(number)
        self.lines = [line for _, line in read_jsonl(folder / _rows(number))]
        self.ends = np.cumsum([line["tokens"] for line in self.lines])
        self.tensors = _tensors(self.path) or {}

    def row(self, number: int, layout: TokenLayout) -> TeacherTargets:
        line, end = self.lines[number], int(self.ends[number])
        at = slice(end - line["tokens"], end)
        try:
            records = unpack_records(layout, self.tensors["records"][at])
        except ValueError as error:
            raise FileError(f"{self.path}: {error}", fix=_FIX) from error
        labels = self.tensors["labels"][number]
        return TeacherTargets(
            line["id"],
            line["text"],
            None if not len(labels) or np.isnan(labels[0]) else labels,
            ids=records.ids,
            logprobs=records.logprobs,
            topk_ids=records.topk_ids,
            topk_logprobs=records.topk_logprobs,
            tail_logprobs=records.tail_logprobs,
            ends=np.cumsum(records.lengths) if layout.length_bits else None,
            tempered_tails=records.tempered_tails,
            thinking=line.get("thinking", ""),
            thinking_tokens=line.get("thinking_tokens", 0),
            answer_start=line.get("answer_start", 0),
        )


def _check_file(path: Path, expected: str, cache: str) -> None:
    if not path.is_file():
        raise FileError(f"{path}: is missing", fix=_FIX)
    if sha256(path) == expected:
        return
    facts = _metadata(path) if path.suffix == ".safetensors" else None
    if facts is None and path.suffix == ".safetensors":
        raise FileError(f"{path}: is truncated or no file of soft targets", fix=_FIX)
    if facts is not None and facts["cache"] != cache:
        raise FileError(f"{path}: belongs to other soft targets", fix=_FIX)
    raise FileError(f"{path}: has changed since it was written", fix=_FIX)


def _cache_key(layout: TokenLayout, fingerprints: Mapping[str, str]) -> str:
    return digest({"format": FORMAT, "layout": asdict(layout), "fingerprints": dict(fingerprints)})


def _metadata(path: Path) -> dict[str, Any] | None:
    """What a token file says of itself; None where it is no whole one of this format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    return facts if facts.get("format") == FORMAT else None


def _tensors(path: Path) -> dict[str, np.ndarray] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError):
        return None


def _content(tensors: Mapping[str, np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        hashed.update(np.ascontiguousarray(tensors[name]).tobytes())
    return hashed.hexdigest()


def _label_table(rows: Sequence[TeacherTargets]) -> np.ndarray:
    width = max((len(row.label_logprobs) for row in rows if row.label_logprobs is not None), default=0)
    out = np.full((len(rows), width), np.nan, dtype=np.float32)
    for values, row in zip(out, rows, strict=True):
        if row.label_logprobs is not None:
            values[:] = row.label_logprobs
    return out


def _tokens(number: int) -> str:
    return f"tokens-{number:05d}.safetensors"


def _rows(number: int) -> str:
    return f"rows-{number:05d}.jsonl"
