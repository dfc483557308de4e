"""What is measured of a distillation behind the training: the loss of answers and of general text in a
model, the parts of the student's loss, and what a cache of the top k loses of a divergence.

Everything is a sum over few rows, so that intervals can be made of it later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.data.batching import collate
from mlx_distill.data.chat import TokenizedRow, answer_ids, pad_id
from mlx_distill.distill.align import AlignedRow, collate_aligned_rows
from mlx_distill.distill.live_teacher import LiveTeacher
from mlx_distill.distill.objective import TermLosses, loss_terms
from mlx_distill.distill.token_kinds import KINDS, TokenKinds
from mlx_distill.distill.token_losses import TOKEN_LOSSES, TokenLossInput, divergence_options
from mlx_distill.errors import ModelError
from mlx_distill.losses.cross_tokenizer import TokenGroups
from mlx_distill.losses.labels import LabelTrie
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.forward import embedding_rows
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import Batch
from mlx_distill.train.objective import LogitReader, trunk
from mlx_distill.train.validation import evaluation_mode, sequence_losses

Parts = dict[str, dict[str, tuple[int, float]]]
"""Of each term and kind of token: how many events, and the sum of their losses."""
LOWER_BOUNDS = ("kl", "reverse_kl", "js_divergence", "skew_kl", "total_variation", "token_groups")
"""Token-level losses that are divergences, so that what a cache merges in its tail can only lower them."""
ENOUGH_MASS = 0.995
"""Mass of the top k from which on a divergence from the cache is held to be the whole one."""


def text_row(tokenizer: Any, text: str) -> tuple[TokenizedRow, int]:
    """A text without a template in tokens, all but the first of which count, and the bytes of those. Whatever
    the text says, its tokens are no control tokens.

    The first token has nothing before it that it could be predicted from; a model that begins every text with
    a token of its own (``bos``) has that one in its place.

    Args:
        tokenizer: A transformers tokenizer or mlx-lm's wrapper of one, with a chat template.
        text: Not empty.
    """
    encoded = answer_ids(tokenizer, text)
    tokens = np.array(encoded, dtype=np.int32)
    size = len(text.encode())
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        tokens = np.concatenate([np.array([bos], dtype=np.int32), tokens])
    else:
        size -= _byte_length(tokenizer, encoded[0])
    return TokenizedRow(tokens, np.ones(len(tokens) - 1, dtype=bool)), size


def trained_bytes(tokenizer: Any, row: TokenizedRow) -> int:
    """The bytes of the trained tokens of a chat, of all its trained turns. Control tokens have none.

    Args:
        tokenizer: In whose tokens the row is.
        row: The chat.
    """
    tokens = row.tokens[1:][row.trained]
    try:
        return int(vocabulary(tokenizer).lengths[tokens].sum())
    except ModelError:
        return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode())


def _byte_length(tokenizer: Any, token: int) -> int:
    try:
        return int(vocabulary(tokenizer).lengths[token])
    except ModelError:
        return len(tokenizer.decode([token]).encode())


def row_losses(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    each: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, int]]:
    """The negative log-likelihood in nats of the trained tokens of each row, and their number.

    Args:
        model: mlx-lm's.
        tokenizer: The model's.
        rows: In its tokens.
        batch_size: Rows per forward pass; rows of about the same length are computed together.
        each: Called before each pass with the number of rows that are done; may raise to stop.

    Raises:
        ModelError: a token that the model's embedding has no row for.
    """
    columns = embedding_rows(model)
    pad = pad_id(tokenizer, columns)
    order = np.argsort([len(row) for row in rows], kind="stable").tolist()
    out = [(0.0, 0)] * len(rows)
    with evaluation_mode(model):
        for first in range(0, len(rows), batch_size):
            each(first)
            numbers = order[first : first + batch_size]
            check_token_ids(np.concatenate([rows[n].tokens for n in numbers]), columns, tokenizer)
            losses = sequence_losses(model, collate(rows, numbers, pad))
            for number, (nats, _, tokens) in zip(numbers, losses, strict=True):
                out[number] = float(nats), int(tokens)
    return out


class StudentAudit:
    """Measures a student on aligned rows: the parts of its loss by kind of token, and a divergence from the
    cache beside the exact one.

    Args:
        tokenizer: The student's.
        settings: Of the distillation.
        classes: The task's labels and one for everything else.
        labels: The labels in the student's tokens; None: no label term.
        groups: The token groups, where a token-level loss needs them.
        same_tokenizer: Of student and teacher.
        teacher: Gives the teacher's whole distributions; None: nothing is compared.
        compared: The token-level loss that is computed from the cache and from the teacher.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: DistillConfig,
        classes: int,
        labels: LabelTrie | None,
        groups: TokenGroups | None,
        *,
        same_tokenizer: bool,
        teacher: LiveTeacher | None,
        compared: str | None,
    ) -> None:
        self.tokenizer, self.settings, self.classes = tokenizer, settings, classes
        self.groups, self.teacher, self.compared = groups, teacher, compared
        self.kinds = TokenKinds(tokenizer)
        live = teacher if settings.teacher == "live" else None
        self.terms: TermLosses = loss_terms(settings, labels, groups, same_tokenizer, teacher=live)

    def measure(
        self,
        model: Any,
        rows: Sequence[AlignedRow],
        hidden: Float[mx.array, "n d"] | None,
        compared: Sequence[AlignedRow] | None = None,
    ) -> tuple[Parts, list[dict[str, Any]]]:
        """Measure a batch of rows.

        Args:
            model: The student.
            rows: The rows.
            hidden: Of :meth:`~mlx_distill.distill.live_teacher.LiveTeacher.hidden` of them, where there is a
                teacher.
            compared: The same rows with the distributions of the cache that are compared, at the temperature
                of the comparison; None: ``rows`` themselves.

        Returns:
            ``{term: {kind: (events, sum of their losses in nats)}}``, and of each row what
            :func:`compare` says.
        """
        batch = self._batch(model, rows, hidden)
        with evaluation_mode(model):
            reader = LogitReader(model, trunk(model, batch, batch.extra["positions"]))
            tokens = np.array(batch.labels.reshape(-1)[batch.extra["positions"]])
            kinds = self.kinds.of(tokens)
            parts: Parts = {}
            for term, index, losses in self.terms(reader, batch):
                add_parts(parts, {term: by_kind(kinds[np.array(index)], np.array(losses, dtype=np.float64))})
            if self.teacher is None or self.compared is None or hidden is None:
                return parts, []
            if compared is not None:
                batch = self._batch(model, compared, hidden)
            cached, exact = self._both(reader, batch.extra)
        return parts, compare(rows if compared is None else compared, cached, exact)

    def _batch(self, model: Any, rows: Sequence[AlignedRow], hidden: mx.array | None) -> Batch:
        pad = pad_id(self.tokenizer, embedding_rows(model))
        batch = collate_aligned_rows(rows, list(range(len(rows))), pad, self.classes)
        if hidden is None:
            return batch
        return replace(batch, extra={**batch.extra, "teacher_hidden": hidden})

    def _both(self, reader: LogitReader, extra: Mapping[str, mx.array]) -> tuple[np.ndarray, np.ndarray]:
        """The compared loss at all common starts, from the cache and from the teacher, at the temperature of
        the cached distributions. Over token groups that is 1: a temperature softens the groups that a top k
        reaches, which are others than those of the whole distribution.
        """
        assert self.compared is not None
        loss, settings = TOKEN_LOSSES[self.compared], self.settings
        # Places in the middle of tokens have targets from the cache alone.
        extra = {name: array for name, array in extra.items() if name not in loss.more_events}
        temperature = float(np.array(extra["temperature"])[0]) if len(extra["temperature"]) else 1.0
        data = TokenLossInput(
            reader,
            extra,
            lambda: mx.zeros(0),
            self.groups,
            temperature,
            divergence_options(replace(settings, token_loss=self.compared)),
        )
        values = [loss.loss(data), loss.loss(replace(data, teacher=self.teacher))]
        return tuple(np.array(value, dtype=np.float64) for value in values)  # type: ignore[return-value]


def by_kind(kinds: Int[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> dict[str, tuple[int, float]]:
    """Number and sum of some losses by the kind of their tokens.

    >>> by_kind(np.array([0, 1, 1]), np.array([0.5, 1.0, 2.0]))
    {'digits': (1, 0.5), 'words': (2, 3.0)}
    """
    counts = np.bincount(kinds, minlength=len(KINDS))
    sums = np.bincount(kinds, weights=losses, minlength=len(KINDS))
    return {
        name: (int(count), float(total))
        for name, count, total in zip(KINDS, counts, sums, strict=True)
        if count
    }


def add_parts(sums: Parts, parts: Parts) -> None:
    """Add the parts of another batch."""
    for term, kinds in parts.items():
        own = sums.setdefault(term, {})
        for kind, (count, total) in kinds.items():
            before = own.get(kind, (0, 0.0))
            own[kind] = before[0] + count, before[1] + total


def compare(
    rows: Sequence[AlignedRow], cached: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]
) -> list[dict[str, Any]]:
    """Sums of a divergence from the cache and of the exact one, a row at a time.

    Args:
        rows: Of a batch.
        cached: At their common starts, row by row.
        exact: The same from the whole distributions.

    Returns:
        Of each row the number of ``positions``, the sums ``cached``, ``exact`` and ``tail`` (mass outside of
        the top k); ``kept``: the same of the positions whose top k has at least :data:`ENOUGH_MASS`; and
        ``worst``: the position at which the two differ most.
    """
    out, first = [], 0
    for row in rows:
        at = slice(first, first + len(row.starts))
        first = at.stop
        logs = row.topk_logprobs.astype(np.float64)
        tail = np.maximum(1 - np.where(logs <= LOWEST / 2, 0.0, np.exp(logs)).sum(axis=1), 0.0)
        own, whole = cached[at], exact[at]
        kept = tail <= 1 - ENOUGH_MASS
        sums = {"positions": len(tail), "cached": float(own.sum()), "exact": float(whole.sum())}
        line: dict[str, Any] = {**sums, "tail": float(tail.sum())}
        line["kept"] = {
            "positions": int(kept.sum()),
            "cached": float(own[kept].sum()),
            "exact": float(whole[kept].sum()),
        }
        if len(tail):
            worst = int(np.abs(whole - own).argmax())
            line["worst"] = {
                "cached": float(own[worst]),
                "exact": float(whole[worst]),
                "tail": float(tail[worst]),
            }
        out.append(line)
    return out


def without_trunk(model: Any) -> None:
    """Drop a model's blocks: what is left can make distributions of hidden states."""
    from mlx_distill.models.architectures.registry import module_names
    from mlx_distill.models.forward import get_module

    get_module(model, module_names(model).trunk).layers = []
