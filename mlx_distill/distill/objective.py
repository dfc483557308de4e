"""The objective of distillation: the label's distribution, the teacher's tokens, and the teacher's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import TokenGroups, alm, span_sums
from mlx_distill.losses.labels import LabelTokens, label_kl, label_logprobs
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import Batch, TopK
from mlx_distill.train.objective import DENSE_LIMIT, LogitReader, Objective, read_objective, trained_tokens

# Which batch.extra array counts a term's events.
_EVENTS = {"token_groups": "start_index", "kl": "start_index", "alm": "spans"}


def token_loss_kind(settings: DistillConfig, same_tokenizer: bool) -> str:
    """``kl``, ``token_groups``, ``alm`` or ``none``: what ``auto`` comes to for these two tokenizers.

    >>> token_loss_kind(DistillConfig(), same_tokenizer=False)
    'token_groups'
    """
    kind = settings.token_loss if settings.token_weight > 0 else "none"
    if kind == "auto":
        return "kl" if same_tokenizer else "token_groups"
    return kind


def kd(
    settings: DistillConfig,
    labels: LabelTokens | None = None,
    groups: TokenGroups | None = None,
    same_tokenizer: bool = False,
    *,
    dense_limit: int = DENSE_LIMIT,
) -> Objective:
    r"""Distillation from a teacher's soft targets, over batches of
    :func:`~mlx_distill.distill.align.collate_aligned_rows`.

    .. math:: \alpha\, T^2\, \mathrm{KL}_T(\mathrm{label}) + \beta\, D(\mathrm{tokens}) + \gamma\, \mathrm{CE}(\mathrm{text})

    - ``label``: over the task's classes and everything else, where the label's value starts, a row (Hinton et
      al., https://arxiv.org/abs/1503.02531);
    - ``token``: ``kl`` over the teacher's top k (one tokenizer), ``token_groups`` over groups of both vocabularies'
      tokens, a common start of tokens; or ``alm``, a common span (https://arxiv.org/abs/2503.20083);
    - ``text``: a token of the teacher's text.

    Terms of coefficient 0 are left out. Hidden states are computed once, and only positions that predict the
    answer meet the head.

    Args:
        settings: ``label_weight``, ``token_weight``, ``text_weight``, the temperatures, and which token-level
            loss.
        labels: The student's tokens for the task's classes, for ``label``.
        groups: The token groups of the two vocabularies, for ``token_groups``.
        same_tokenizer: Whether the two vocabularies are one, so that ``auto`` means the plain KL.
        dense_limit: Logits of at most so many numbers are made at once, more tile by tile; both give the same
            numbers.

    Raises:
        ConfigError: no term is left, or a term lacks what it needs.
    """
    kind = token_loss_kind(settings, same_tokenizer)
    coefficients = {
        "label": settings.label_weight,
        "token": settings.token_weight if kind != "none" else 0.0,
        "text": settings.text_weight,
    }
    coefficients = {name: value for name, value in coefficients.items() if value > 0}
    _check(coefficients, kind, labels, groups, same_tokenizer)

    def weights(batch: Batch) -> dict[str, float]:
        tokens = trained_tokens(batch)
        counts = {"text": tokens, "label": float(len(batch.extra["label_index"]))}
        counts["token"] = float(len(batch.extra[_EVENTS[kind]])) if kind != "none" else 0.0
        # A batch that only fills a rank's place has a mask of zeros, and counts for nothing.
        return {name: counts[name] if tokens else 0.0 for name in coefficients}

    def read(reader: LogitReader, batch: Batch) -> dict[str, mx.array]:
        extra, out = batch.extra, {}
        losses = None
        if "text" in coefficients or kind == "alm":
            losses = reader.cross_entropy(batch.labels.reshape(-1)[extra["positions"]])
        if "text" in coefficients and losses is not None:
            out["text"] = losses.sum()
        if "label" in coefficients and labels is not None and len(extra["label_index"]):
            mine = label_logprobs(reader.logits(extra["label_index"]), labels, rest=True)
            out["label"] = label_kl(
                mine, extra["label_logprobs"], temperature=settings.label_temperature
            ).sum()
        if "token" in coefficients and len(extra[_EVENTS[kind]]):
            out["token"] = _token_loss(kind, reader, losses, extra, groups, settings.temperature).sum()
        return out

    return read_objective(weights, lambda batch: batch.extra["positions"], read, coefficients, dense_limit)


def _token_loss(
    kind: str,
    reader: LogitReader,
    losses: mx.array | None,
    extra: Mapping[str, Any],
    groups: TokenGroups | None,
    temperature: float,
) -> mx.array:
    if kind == "alm":
        assert losses is not None
        return alm(span_sums(-losses, np.array(extra["spans"])), extra["span_logprobs"])
    targets = TopK(extra["topk_ids"], extra["topk_logprobs"])
    if kind == "kl":
        return reader.sparse_kl(extra["start_index"], targets, temperature)
    assert groups is not None
    return reader.token_group_kl(extra["start_index"], targets, groups, temperature)


def _check(
    coefficients: Mapping[str, float],
    kind: str,
    labels: LabelTokens | None,
    groups: TokenGroups | None,
    same_tokenizer: bool,
) -> None:
    if not coefficients:
        raise ConfigError(
            "distillation without a term", fix="raise label_weight, token_weight or text_weight"
        )
    if kind == "kl" and not same_tokenizer:
        raise ConfigError(
            "token_loss: kl between two tokenizers is undefined", fix="use auto, token_groups or alm"
        )
    if kind == "token_groups" and groups is None:
        raise ConfigError(
            "token_loss: token_groups without token groups",
            fix="give groups=build_token_groups(student_tokenizer, teacher_tokenizer)",
        )
    if "label" in coefficients and labels is None:
        raise ConfigError(
            "label_weight without the label's tokens",
            fix="give labels=label_tokens(tokenizer, names), or label_weight: 0",
        )
