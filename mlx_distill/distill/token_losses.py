"""The token-level losses of distillation: one registry entry each.

A new loss is a function of :class:`TokenLossInput`, an entry of :data:`TOKEN_LOSSES`, its name in
:data:`mlx_distill.recipe.TOKEN_LOSSES`, and its formula in float64 in ``tests/losses/test_battery.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.distill.live_teacher import LiveTeacher
from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import (
    TokenGroups,
    across_token_kl,
    alm,
    inside_token_kl,
    span_sums,
    token_group_kl,
)
from mlx_distill.losses.gold import gold
from mlx_distill.losses.tiled import linear_divergence
from mlx_distill.losses.topk import rows_of, sparse_forward_kl, sparse_linear_kl
from mlx_distill.losses.topk_divergences import sparse_divergence
from mlx_distill.losses.uld import uld
from mlx_distill.losses.x_token import x_token_kl
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import TopK
from mlx_distill.train.objective import LogitReader


@dataclass(frozen=True)
class TokenLossInput:
    """What a token-level loss is computed from.

    Args:
        reader: Of the batch's trained positions.
        extra: The arrays of :func:`~mlx_distill.distill.align.collate_aligned_rows`.
        cross_entropy: Gives the cross-entropy at all positions of the reader; computed once a batch.
        groups: The token groups of the two vocabularies, where the loss needs them.
        temperature: T.
        options: Of the divergence: ``beta`` of ``js_divergence`` and ``gold``, ``lam`` of ``skew_kl``.
    """

    reader: LogitReader
    extra: Mapping[str, mx.array]
    cross_entropy: Callable[[], mx.array]
    groups: TokenGroups | None
    temperature: float
    options: Mapping[str, float] = field(default_factory=dict)
    teacher: LiveTeacher | None = None


@dataclass(frozen=True)
class TokenLoss:
    """A token-level loss.

    Args:
        loss: One number per event.
        events: The array of ``batch.extra`` whose length is the number of events in a batch.
        more_events: Arrays that a batch may have, whose lengths are further events.
        needs: ``same_tokenizer`` for student and teacher, ``token_groups``, or None.
        over_tokens: Whether T softens both distributions over all tokens: then the targets are at T. Else the
            targets are at 1, and T is the loss's own matter.
    """

    loss: Callable[[TokenLossInput], Float[mx.array, " n"]]
    events: str
    more_events: tuple[str, ...] = ()
    needs: Literal["same_tokenizer", "token_groups"] | None = None
    over_tokens: bool = True

    def places(self, extra: Mapping[str, mx.array]) -> Int[mx.array, " n"]:
        """The trained position of each event of a batch, as an index into them; of a span that it begins
        at.
        """
        found = [extra[name] for name in (self.events, *self.more_events) if name in extra]
        return mx.concatenate([at if at.ndim == 1 else at[:, 0] for at in found])


def _top_k_kl(data: TokenLossInput) -> mx.array:
    index, reader, t = data.extra["start_index"], data.reader, data.temperature
    if (tiled := _live_tiled("forward_kl", data)) is not None:
        return tiled
    if reader.tiled_head is not None and data.teacher is None:
        targets = _cached(data)
        return t**2 * sparse_linear_kl(reader.hidden[index] / t, reader.tiled_head.over(t), targets)
    return t**2 * _over_tokens(data, sparse_forward_kl)


def _live_tiled(name: str, data: TokenLossInput) -> mx.array | None:
    """A divergence from a live teacher by tiles of both heads; None where one of them cannot be read in tiles
    or the logits are computed at once.
    """
    student = data.reader.tiled_head
    if student is None or data.teacher is None:
        return None
    teacher, options = data.teacher.tiled_head(student.columns, masked=name != "reverse_kl"), data.options
    if teacher is None:
        return None
    return linear_divergence(
        data.reader.hidden[data.extra["start_index"]],
        student,
        data.extra["teacher_hidden"],
        teacher,
        divergence=name,
        temperature=data.temperature,
        **dict[str, Any](options),
    )


def _top_k_divergence(name: str, data: TokenLossInput) -> mx.array:
    if (tiled := _live_tiled(name, data)) is not None:
        return tiled
    return data.temperature**2 * _over_tokens(
        data, lambda z, targets: sparse_divergence(z, targets, divergence=name, **data.options)
    )


def _over_tokens(data: TokenLossInput, loss: Callable[[mx.array, TopK], mx.array]) -> mx.array:
    """A loss of logits and distributions of the same tokens, both at T."""
    return data.reader.row_losses(
        lambda z, at: loss(z / data.temperature, _targets(data, at, z.shape[-1])), data.extra["start_index"]
    )


def _sorted_distributions(data: TokenLossInput) -> mx.array:
    return data.reader.row_losses(
        lambda z, at: uld(z / data.temperature, _targets(data, at)), data.extra["start_index"]
    )


def _shared_and_sorted(data: TokenLossInput) -> mx.array:
    groups, t = data.groups, data.temperature
    assert groups is not None
    return data.reader.row_losses(
        lambda z, at: gold(z, _targets(data, at), groups, temperature=t, **data.options),
        data.extra["start_index"],
    )


def _projected_kl(data: TokenLossInput) -> mx.array:
    groups, t = data.groups, data.temperature
    assert groups is not None
    return data.reader.row_losses(
        lambda z, at: x_token_kl(z, _targets(data, at), groups, temperature=t), data.extra["start_index"]
    )


def _token_group_kl(data: TokenLossInput) -> mx.array:
    groups, extra, t = data.groups, data.extra, data.temperature
    assert groups is not None
    parts = [
        data.reader.row_losses(
            lambda z, at: token_group_kl(z, _targets(data, at, t=1.0), groups, temperature=t),
            extra["start_index"],
        )
    ]
    if len(extra.get("inside_index", ())):
        ids, logprobs = extra["inside_groups"], extra["inside_logprobs"]
        parts.append(
            data.reader.row_losses(
                lambda z, at: inside_token_kl(z, ids[at], logprobs[at], groups, temperature=t),
                extra["inside_index"],
            )
        )
    if len(extra.get("across_index", ())):
        parts.append(data.reader.row_losses(partial(_across_tokens, extra, t), extra["across_index"]))
    return mx.concatenate(parts)


def _across_tokens(extra: Mapping[str, mx.array], temperature: float, z: mx.array, at: slice) -> mx.array:
    sizes = np.array(extra["across_sizes"])
    first, last, _ = at.indices(len(sizes))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    its = slice(int(ends[first]), int(ends[last]))
    return across_token_kl(
        z,
        extra["across_logprobs"][at],
        sizes[at],
        extra["across_tokens"][its],
        extra["across_slots"][its],
        temperature=temperature,
    )


def _span_likelihoods(data: TokenLossInput) -> mx.array:
    spans = span_sums(-data.cross_entropy(), np.array(data.extra["spans"]))
    return alm(spans, data.extra["span_logprobs"])


def _targets(data: TokenLossInput, at: slice, width: int | None = None, t: float | None = None) -> TopK:
    """The teacher's distributions at some of the common starts: of a live teacher the whole ones.

    Args:
        data: Of the loss.
        at: Which starts.
        width: The student's columns, where the tokens are the same.
        t: Their temperature; None for that of the loss.
    """
    t = data.temperature if t is None else t
    if data.teacher is not None:
        return data.teacher.distribution(data.extra["teacher_hidden"][at], t, width)
    return rows_of(_cached(data, t), at)


def _cached(data: TokenLossInput, t: float | None = None) -> TopK:
    t = data.temperature if t is None else t
    found = np.array(data.extra["temperature"]) if "temperature" in data.extra else np.ones(1)
    if len(found) and not np.allclose(found, t):
        raise ConfigError(
            f"a token-level loss at temperature {t}, and the targets are at {found[0]:g}",
            fix="align the rows at distill.temperature, from targets that were made for it",
        )
    return TopK(data.extra["topk_ids"], data.extra["topk_logprobs"])


TOKEN_LOSSES: Mapping[str, TokenLoss] = {
    "kl": TokenLoss(_top_k_kl, events="start_index", needs="same_tokenizer"),
    **{
        name: TokenLoss(
            partial(_top_k_divergence, name),
            events="start_index",
            needs="same_tokenizer",
        )
        for name in ("reverse_kl", "js_divergence", "skew_kl", "total_variation")
    },
    "token_groups": TokenLoss(
        _token_group_kl,
        events="start_index",
        more_events=("inside_index", "across_index"),
        needs="token_groups",
        over_tokens=False,
    ),
    "alm": TokenLoss(_span_likelihoods, events="spans", over_tokens=False),
    "uld": TokenLoss(_sorted_distributions, events="start_index"),
    "gold": TokenLoss(_shared_and_sorted, events="start_index", needs="token_groups"),
    "x_token": TokenLoss(_projected_kl, events="start_index", needs="token_groups"),
}


def token_loss_name(settings: DistillConfig, same_tokenizer: bool) -> str | None:
    """The name of the token-level loss that a recipe asks for, with ``auto`` resolved; None for no such loss.

    >>> token_loss_name(DistillConfig(), same_tokenizer=False)
    'token_groups'
    """
    if settings.token_weight <= 0 or settings.token_loss == "none":
        return None
    if settings.token_loss == "auto":
        return "kl" if same_tokenizer else "token_groups"
    return settings.token_loss


def divergence_options(settings: DistillConfig) -> dict[str, float]:
    """The options of the divergence that a recipe asks for, by the names of the losses."""
    return {
        "js_divergence": {"beta": settings.js_beta},
        "gold": {"beta": settings.js_beta},
        "skew_kl": {"lam": settings.skew_lambda},
    }.get(settings.token_loss, {})
