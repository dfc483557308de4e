"""What a quantized student is refined towards: the distributions of the unquantized student at every real
token, computed once and kept on disk, so that the two are never in memory together.

Kept are its last hidden states, which with its output head are the whole distributions at any vocabulary: a
top k, even with the mass of its tail, refines less well (docs/log.md) and takes more space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Int

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import as_sequences, build_batch
from mlx_distill.errors import DataError
from mlx_distill.losses.divergences import forward_kl
from mlx_distill.losses.output_head import head_weight, project
from mlx_distill.losses.tiled import linear_divergence
from mlx_distill.models.forward import compute_dtype, embedding_rows, head, hidden_states, softcap
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.progress import NullProgress, Progress
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.storage import digest
from mlx_distill.storage.array_store import Store, StoreWriter, is_stored
from mlx_distill.train.batches import RowDataset, make_dataset
from mlx_distill.train.objective import DENSE_LIMIT, LogitReader, Objective, read_objective, trained_tokens

_AT_ONCE = 8  # rows of a forward pass


@dataclass(frozen=True)
class TargetRow:
    """One row: its tokens ``[l]``, and the unquantized student's last hidden states ``[l - 1, d]`` at all but
    the last of them, halves as their bits.
    """

    tokens: Int[np.ndarray, " l"]
    hidden: np.ndarray


@dataclass(frozen=True)
class StudentTargets:
    """The unquantized student's distributions of the rows' tokens.

    Attributes:
        store: The rows.
        head: The unquantized student's output head, which stays in memory.
        softcap: Of its logits.
        dtype: Of the hidden states.
    """

    store: Store[TargetRow]
    head: Any
    softcap: float | None
    dtype: mx.Dtype

    def _logits(self, hidden: mx.array) -> mx.array:
        """Of the unquantized student, in float32."""
        return project(self.head, hidden, self.softcap).astype(mx.float32)

    def dataset(self, settings: TrainConfig) -> RowDataset:
        """Batches of the rows. ``extra["target"]`` holds the hidden states ``[a, d]`` at the positions that
        predict a real token, row by row.
        """
        return make_dataset(self.store, partial(_collate, dtype=self.dtype), settings)

    def objective(self, dense_limit: int = DENSE_LIMIT) -> Objective:
        r"""KL(unquantized || student) at temperature 1 over all real tokens, in nats; one term, ``token``.

        Args:
            dense_limit: Up to so many numbers the logits are computed at once, above a few rows at a time or
                tile by tile.
        """

        def read(reader: LogitReader, batch: Batch) -> dict[str, mx.array]:
            target = batch.extra["target"]
            if reader.tiled_head is not None:
                own = head_weight(self.head, self.softcap)
                return {"token": linear_divergence(reader.hidden, reader.tiled_head, target, own).sum()}
            return {
                "token": reader.row_losses(lambda z, at: forward_kl(z, self._logits(target[at])), None).sum()
            }

        def positions(batch: Batch) -> mx.array:
            return mx.array(np.flatnonzero(np.array(batch.mask)).astype(np.int32))

        return read_objective(
            lambda batch: {"token": trained_tokens(batch)}, positions, read, {"token": 1.0}, dense_limit
        )


def student_targets(
    student: Any,
    rows: Sequence[Sequence[int]],
    folder: Path,
    *,
    identity: str = "",
    progress: Progress | None = None,
) -> StudentTargets:
    """The distributions of every token of the rows but the first, from ``folder`` if it holds them already.

    Args:
        student: Unquantized. Its head stays in memory when its modules are replaced.
        rows: Token ids.
        folder: Of the store.
        identity: Of the student's weights.
        progress: Shows the rows.

    Raises:
        DataError: no row, or one without a token to predict.
        ModelError: a token beyond the model's embedding.
    """
    check_rows(rows)
    check_token_ids([max(row) for row in rows], embedding_rows(student))
    tokens = [np.asarray(row, dtype=np.int32) for row in rows]
    key = digest([[row.tolist() for row in tokens], identity])
    if not is_stored(folder, key):
        with (
            StoreWriter(folder, key=key) as writer,
            (progress or NullProgress()).task("targets of the unquantized student", len(rows), "row") as bar,
        ):
            for first in range(0, len(tokens), _AT_ONCE):
                _write(writer, student, tokens[first : first + _AT_ONCE])
                bar.update(writer.rows)
    store: Store[TargetRow] = Store(folder, TargetRow)
    return StudentTargets(store, head(student), softcap(student), compute_dtype(student))


def _write(writer: StoreWriter, student: Any, rows: Sequence[np.ndarray]) -> None:
    inputs = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for line, row in zip(inputs, rows, strict=True):
        line[: len(row)] = row
    hidden = hidden_states(student, mx.array(inputs))
    hidden = hidden if hidden.dtype == mx.float32 else hidden.view(mx.uint16)
    mx.eval(hidden)
    for line, row in zip(hidden, rows, strict=True):
        writer.append(len(row) - 1, tokens=row, hidden=np.array(line[: len(row) - 1]))


def check_rows(rows: Sequence[Sequence[int]]) -> None:
    """Refuse rows that nothing can be learned from.

    Raises:
        DataError: no row, or one without a token to predict.
    """
    if not rows:
        raise DataError(
            "no row to refine the quantized student on", fix="give rows, or quantize with refine: none"
        )
    short = next((i for i, row in enumerate(rows) if len(row) < 2), None)
    if short is not None:
        raise DataError(f"row {short} has {len(rows[short])} tokens", fix="give rows of two tokens or more")


def _collate(
    rows: Sequence[TargetRow], sequences: Sequence[Sequence[int]], multiple: int, *, dtype: mx.Dtype
) -> Batch:
    grouped = as_sequences(sequences)
    numbers = [number for sequence in grouped for number in sequence]
    chosen = {number: rows[number] for number in numbers}
    tokenized = [
        [TokenizedRow(chosen[n].tokens, np.ones(len(chosen[n].tokens) - 1, bool)) for n in sequence]
        for sequence in grouped
    ]
    target = mx.array(np.concatenate([chosen[number].hidden for number in numbers])).view(dtype)
    return replace(build_batch(tokenized, 0, multiple, numbers), extra={"target": target})
