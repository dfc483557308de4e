"""The token-level losses of distillation: one registry entry each.

A new loss is a function of :class:`TokenLossInput`, an entry of :data:`TOKEN_LOSSES`, and its name in
:data:`mlx_distill.recipe.TOKEN_LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import TokenGroups, alm, span_sums, token_group_kl
from mlx_distill.losses.topk import rows_of, sparse_forward_kl, sparse_linear_kl
from mlx_distill.losses.topk_divergences import sparse_divergence
from mlx_distill.losses.uld import uld
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
        options: Of the divergence: ``beta`` of ``js_divergence``, ``lam`` of ``skew_kl``.
    """

    reader: LogitReader
    extra: Mapping[str, mx.array]
    cross_entropy: Callable[[], mx.array]
    groups: TokenGroups | None
    temperature: float
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenLoss:
    """A token-level loss.

    Args:
        loss: One number per event.
        events: The array of ``batch.extra`` whose length is the number of events in a batch.
        needs: ``same_tokenizer`` for student and teacher, ``token_groups``, or None.
        any_temperature: Whether it takes another temperature than 1 from a top k.
    """

    loss: Callable[[TokenLossInput], Float[mx.array, " n"]]
    events: str
    needs: Literal["same_tokenizer", "token_groups"] | None = None
    any_temperature: bool = True


def _top_k_kl(data: TokenLossInput) -> mx.array:
    """T² times the KL between both distributions at T: the teacher's is at T already, with its own tail."""
    index, targets, reader, t = data.extra["start_index"], _targets(data), data.reader, data.temperature
    found = np.array(data.extra["temperature"]) if "temperature" in data.extra else np.ones(1)
    if len(found) and not np.allclose(found, t):
        raise ConfigError(
            f"token_loss: kl at temperature {t}, and the targets are at {found[0]:g}",
            fix="align the rows at distill.temperature, from targets that have its partition",
        )
    if reader.tiled_head is not None:
        return t**2 * sparse_linear_kl(reader.hidden[index] / t, reader.tiled_head.over(t), targets)
    return t**2 * reader.row_losses(lambda z, at: sparse_forward_kl(z / t, rows_of(targets, at)), index)


def _token_group_kl(data: TokenLossInput) -> mx.array:
    targets, groups = _targets(data), data.groups
    assert groups is not None
    return data.reader.row_losses(
        lambda z, at: token_group_kl(z, rows_of(targets, at), groups, temperature=data.temperature),
        data.extra["start_index"],
    )


def _top_k_divergence(name: str, data: TokenLossInput) -> mx.array:
    targets = _targets(data)
    return data.reader.row_losses(
        lambda z, at: sparse_divergence(
            z, rows_of(targets, at), divergence=name, temperature=data.temperature, **data.options
        ),
        data.extra["start_index"],
    )


def _sorted_distributions(data: TokenLossInput) -> mx.array:
    targets = _targets(data)
    return data.reader.row_losses(
        lambda z, at: uld(z, rows_of(targets, at), temperature=data.temperature), data.extra["start_index"]
    )


def _span_likelihoods(data: TokenLossInput) -> mx.array:
    spans = span_sums(-data.cross_entropy(), np.array(data.extra["spans"]))
    return alm(spans, data.extra["span_logprobs"])


def _targets(data: TokenLossInput) -> TopK:
    return TopK(data.extra["topk_ids"], data.extra["topk_logprobs"])


TOKEN_LOSSES: Mapping[str, TokenLoss] = {
    "kl": TokenLoss(_top_k_kl, events="start_index", needs="same_tokenizer"),
    **{
        name: TokenLoss(
            partial(_top_k_divergence, name),
            events="start_index",
            needs="same_tokenizer",
            any_temperature=False,
        )
        for name in ("reverse_kl", "js_divergence", "skew_kl", "total_variation")
    },
    "token_groups": TokenLoss(_token_group_kl, events="start_index", needs="token_groups"),
    "alm": TokenLoss(_span_likelihoods, events="spans"),
    "uld": TokenLoss(_sorted_distributions, events="start_index", any_temperature=False),
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
        "skew_kl": {"lam": settings.skew_lambda},
    }.get(settings.token_loss, {})


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature that a loss cannot take from a top k.

    Raises:
        ConfigError: another one than 1 of such a loss.
    """
    if temperature != 1 and not TOKEN_LOSSES[name].any_temperature:
        raise ConfigError(
            f"distill.temperature: {temperature:g} with token_loss: {name}: the mass outside of the "
            "teacher's top k is not known at another temperature than 1",
            fix="use temperature: 1, or token_loss: kl, which softens within the top k",
        )
