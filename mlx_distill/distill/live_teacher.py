"""The teacher beside the student: its whole distributions instead of the top k of a cache.

Each batch of aligned rows is read by the teacher too, in its own tokens and with its own chat template. What
is kept of it are the hidden states at the common starts; the distributions are made from them a few rows at a
time, where a loss asks for them, so that every loss is exact and takes any temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.data.chat import render
from mlx_distill.data.messages import with_system
from mlx_distill.distill.align import AlignedRow
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.errors import DataError, ModelError
from mlx_distill.infer.kv_cache import pad_right
from mlx_distill.losses.numerics import LOWEST, log_softmax
from mlx_distill.losses.output_head import HeadWeight, head_weight
from mlx_distill.models.adapters import without_adapters
from mlx_distill.models.forward import head, head_columns, hidden_states, logits, softcap
from mlx_distill.models.token_ids import used_ids
from mlx_distill.records import Batch, TopK
from mlx_distill.train.validation import evaluation_mode


@dataclass(frozen=True)
class LiveTeacher:
    """A loaded teacher.

    Args:
        model: mlx-lm's.
        tokenizer: Its own; the columns of the head that are none of its tokens take no part.
        shared: Whether the model is the student itself, whose base is the teacher: its adapters are switched
            off while it is read as the teacher, in the thread that trains it, and it is left in the mode and
            with the random state that it had.
    """

    model: Any
    tokenizer: Any
    shared: bool = False

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        if not self.shared:
            self.model.eval()
            yield
            return
        with evaluation_mode(self.model), without_adapters(self.model):
            yield

    @cached_property
    def _columns(self) -> np.ndarray:
        """The columns of the head that have a token."""
        used = used_ids(self.tokenizer, head_columns(self.model))
        return np.arange(head_columns(self.model)) if used is None else np.flatnonzero(used)

    def hidden(self, rows: Sequence[AlignedRow]) -> Float[mx.array, "n d"]:
        """The hidden states that the distributions at the common starts of some rows are made from, row by
        row.

        Args:
            rows: With ``teacher_tokens``.
        """
        chats = [_chat(row) for row in rows]
        inputs = pad_right([tokens.tolist() for tokens, _ in chats], 16)
        at = np.concatenate([np.full(len(starts), i) for i, (_, starts) in enumerate(chats)])
        places = np.concatenate([starts for _, starts in chats])
        with self._as_teacher():
            states = mx.stop_gradient(hidden_states(self.model, mx.array(inputs)))
            out = states[mx.array(at.astype(np.int32)), mx.array(places - 1)]
            mx.eval(out)
        return out

    def distribution(
        self, hidden: Float[mx.array, "n d"], temperature: float = 1.0, width: int | None = None
    ) -> TopK:
        """The whole distributions of some hidden states.

        Args:
            hidden: Of :meth:`hidden`.
            temperature: T.
            width: Tokens from here on are left out: those that a student of the same tokenizer lacks.
        """
        columns = self._columns if width is None else self._columns[self._columns < width]
        with without_adapters(self.model) if self.shared else nullcontext():  # the head may have one
            z = logits(self.model, hidden)[:, mx.array(columns)]
        ids = mx.broadcast_to(mx.array(columns.astype(np.int32)), z.shape)
        return TopK(ids, mx.stop_gradient(log_softmax(z, temperature)))

    def tiled_head(self, columns: int, *, masked: bool = True) -> HeadWeight | None:
        """The head for the tiled losses, whose columns without a token have no probability.

        Args:
            columns: Of the student's head.
            masked: Whether the loss takes tokens of probability 0, as the reverse KL does not.

        Returns:
            None where the head has other columns, cannot be read in tiles, or has columns without a token
            that cannot be masked. Then :meth:`distribution` gives the same.
        """
        cap, width = softcap(self.model), head_columns(self.model)
        unused = np.ones(width, dtype=bool)
        unused[self._columns] = False
        if width != columns or (unused.any() and (cap is not None or not masked)):
            return None
        try:
            weight = head_weight(head(self.model), cap)
        except ModelError:  # with an adapter on it
            return None
        if not unused.any():
            return weight
        bias = mx.array(np.where(unused, np.float32(LOWEST), np.float32(0)))
        return replace(weight, bias=bias if weight.bias is None else weight.bias.astype(mx.float32) + bias)


def with_teacher_tokens(
    row: AlignedRow,
    messages: Sequence[Mapping[str, Any]],
    targets: TeacherTargets,
    tokenizer: Any,
    system: str | None = None,
) -> AlignedRow:
    """An aligned row with the chat as the teacher reads it.

    Args:
        row: Of :func:`~mlx_distill.distill.align.align_answer`, with ``teacher_starts`` in the answer.
        messages: The chat, the teacher's answer last.
        targets: Of the row.
        tokenizer: The teacher's.
        system: What the teacher reads in place of the chat's system prompt; None: the same.

    Raises:
        DataError: the chat's answer is not in the tokens of the targets.
    """
    thought = {"reasoning_content": targets.thinking} if targets.thinking else {}
    messages = [*messages[:-1], {**messages[-1], **thought}]
    chat = render(tokenizer, messages if system is None else with_system(messages, system))
    start = chat.start if targets.answer_start else chat.spans[-1][0]
    if not np.array_equal(chat.tokens[start:], targets.ids):
        raise DataError(
            f"{targets.id}: other tokens than those of the targets", fix="run: mlx-distill targets"
        )
    tokens = np.asarray(chat.tokens, dtype=np.int32)
    in_answer = np.zeros(0, np.int32) if row.teacher_starts is None else row.teacher_starts
    return replace(row, teacher_tokens=tokens, teacher_starts=(in_answer + start).astype(np.int32))


def with_live_teacher(collate: Callable[..., Batch], teacher: LiveTeacher) -> Callable[..., Batch]:
    """A collate function whose batches have ``teacher_hidden`` in ``extra``.

    Args:
        collate: Makes batches of aligned rows.
        teacher: Reads them.
    """

    def collate_live(rows: Sequence[AlignedRow], chosen: Sequence[Any], multiple: int) -> Batch:
        batch = collate(rows, chosen, multiple)
        hidden = teacher.hidden([rows[number] for number in batch.rows])
        return replace(batch, extra={**batch.extra, "teacher_hidden": hidden})

    return collate_live


def _chat(row: AlignedRow) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's tokens of a row, and its common starts among them."""
    if row.teacher_tokens is None or row.teacher_starts is None:
        raise DataError("an aligned row without the teacher's chat", fix="align it with with_teacher_tokens")
    return row.teacher_tokens, row.teacher_starts
