"""The objective of distillation: the label's distribution, the teacher's tokens, and the teacher's text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import mlx.core as mx

from mlx_distill.distill.token_losses import TOKEN_LOSSES, TokenLossInput, token_loss_name
from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import TokenGroups
from mlx_distill.losses.labels import LabelTokens, label_kl, label_logprobs
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import Batch
from mlx_distill.train.objective import DENSE_LIMIT, LogitReader, Objective, read_objective, trained_tokens


def kd(
    settings: DistillConfig,
    labels: LabelTokens | None = None,
    groups: TokenGroups | None = None,
    same_tokenizer: bool = False,
    *,
    dense_limit: int = DENSE_LIMIT,
) -> Objective:
    r"""Knowledge distillation from a teacher's soft targets, over batches of
    :func:`~mlx_distill.distill.align.collate_aligned_rows`.

    .. math:: \alpha\, T^2\, \mathrm{KL}_T(\mathrm{label}) + \beta\, D(\mathrm{tokens})
        + \gamma\, \mathrm{CE}(\mathrm{text})

    - ``label``: over the task's classes and all other tokens, where the label's value starts; one event a row
      (Hinton et al., https://arxiv.org/abs/1503.02531);
    - ``token``: one of :data:`~mlx_distill.distill.token_losses.TOKEN_LOSSES`: ``kl`` over the teacher's top
      k (same tokenizer) or ``token_groups`` (two tokenizers), one event a common start of tokens; or ``alm``,
      one event a common span (https://arxiv.org/abs/2503.20083);
    - ``text``: cross-entropy of the teacher's text, one event a token.

    Terms of coefficient 0 are left out. Hidden states are computed once, and only the positions that predict
    the answer are projected to logits.

    Args:
        settings: ``label_weight``, ``token_weight``, ``text_weight``, the temperatures, and which token-level
            loss.
        labels: The student's tokens for the task's classes, for ``label``.
        groups: The token groups of the two vocabularies, for ``token_groups``.
        same_tokenizer: Whether the two vocabularies are equal, so that ``auto`` means the plain KL.
        dense_limit: Up to so many numbers the logits are computed at once, above tile by tile, with equal
            results.

    Raises:
        ConfigError: no term is left, or a term lacks what it needs.
    """
    name = token_loss_name(settings, same_tokenizer)
    coefficients = {
        "label": settings.label_weight,
        "token": settings.token_weight if name else 0.0,
        "text": settings.text_weight,
    }
    coefficients = {term: value for term, value in coefficients.items() if value > 0}
    _check(coefficients, name, labels, groups, same_tokenizer)
    token_loss = TOKEN_LOSSES[name] if name else None

    def weights(batch: Batch) -> dict[str, float]:
        tokens = trained_tokens(batch)
        counts = {"text": tokens, "label": float(len(batch.extra["label_index"]))}
        counts["token"] = float(len(batch.extra[token_loss.events])) if token_loss else 0.0
        # A batch that only fills up a rank has a mask of zeros, and its weights are zero.
        return {term: counts[term] if tokens else 0.0 for term in coefficients}

    def read(reader: LogitReader, batch: Batch) -> dict[str, mx.array]:
        extra, out = batch.extra, {}

        @cache
        def cross_entropy() -> mx.array:
            return reader.cross_entropy(batch.labels.reshape(-1)[extra["positions"]])

        if "text" in coefficients:
            out["text"] = cross_entropy().sum()
        if "label" in coefficients and labels is not None and len(extra["label_index"]):
            student = label_logprobs(reader.logits(extra["label_index"]), labels, rest=True)
            out["label"] = label_kl(
                student, extra["label_logprobs"], temperature=settings.label_temperature
            ).sum()
        if token_loss is not None and len(extra[token_loss.events]):
            data = TokenLossInput(reader, extra, cross_entropy, groups, settings.temperature)
            out["token"] = token_loss.loss(data).sum()
        return out

    return read_objective(weights, lambda batch: batch.extra["positions"], read, coefficients, dense_limit)


def _check(
    coefficients: Mapping[str, float],
    token_loss: str | None,
    labels: LabelTokens | None,
    groups: TokenGroups | None,
    same_tokenizer: bool,
) -> None:
    if not coefficients:
        raise ConfigError(
            "distillation without a term", fix="raise label_weight, token_weight or text_weight"
        )
    needs = TOKEN_LOSSES[token_loss].needs if token_loss else None
    if needs == "same_tokenizer" and not same_tokenizer:
        others = [name for name, loss in TOKEN_LOSSES.items() if loss.needs != "same_tokenizer"]
        raise ConfigError(
            f"token_loss: {token_loss} between two tokenizers is undefined",
            fix=f"use one of auto, {', '.join(others)}",
        )
    if needs == "token_groups" and groups is None:
        raise ConfigError(
            f"token_loss: {token_loss} without token groups",
            fix="give groups=build_token_groups(student_tokenizer, teacher_tokenizer)",
        )
    if "label" in coefficients and labels is None:
        raise ConfigError(
            "label_weight without the label's tokens",
            fix="give labels=label_tokens(tokenizer, names), or label_weight: 0",
        )
