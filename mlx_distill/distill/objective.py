"""The objective of distillation: the label's distribution, the teacher's tokens, and the teacher's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_distill.distill.live_teacher import LiveTeacher
from mlx_distill.distill.token_losses import (
    TOKEN_LOSSES,
    TokenLoss,
    TokenLossInput,
    divergence_options,
    token_loss_name,
)
from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import TokenGroups
from mlx_distill.losses.labels import LabelTrie, class_logprobs, label_kl, label_logprobs, merge_labels
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import Batch
from mlx_distill.train.objective import DENSE_LIMIT, LogitReader, Objective, read_objective, trained_tokens

# A term, the trained positions of its events, their losses.
TermPart = tuple[str, mx.array, mx.array]
TermLosses = Callable[[LogitReader, Batch], Iterator[TermPart]]


def kd(
    settings: DistillConfig,
    labels: LabelTrie | None = None,
    groups: TokenGroups | None = None,
    same_tokenizer: bool = False,
    *,
    teacher: LiveTeacher | None = None,
    dense_limit: int = DENSE_LIMIT,
) -> Objective:
    r"""Knowledge distillation from a teacher's soft targets, over batches of
    :func:`~mlx_distill.distill.align.collate_aligned_rows`.

    .. math:: \alpha\, T^2\, \mathrm{KL}_T(\mathrm{label}) + \beta\, D(\mathrm{tokens})
        + \gamma\, \mathrm{CE}(\mathrm{text}) + \delta\, \mathrm{ALM}(\mathrm{spans})

    - ``label``: over the task's classes and everything else, where the label's value starts; one event a row
      (Hinton et al., https://arxiv.org/abs/1503.02531). Where labels share their first tokens, a row tells
      apart what the path of its own label does, and takes the others together as classes of labels;
    - ``token``: one of :data:`~mlx_distill.distill.token_losses.TOKEN_LOSSES`: ``kl`` over the teacher's top
      k (same tokenizer) or ``token_groups`` (two tokenizers), one event a common start of tokens (with
      ``mid_token_rows`` also one a place in the middle of a token); or ``alm``, one event a common span
      (https://arxiv.org/abs/2503.20083);
    - ``text``: cross-entropy of the teacher's text, one event a token;
    - ``span``: ``alm`` beside another token-level loss. With ``token_groups`` it is the recipe of gmlx:
      groups at the common starts and likelihoods of the common spans.

    Terms of coefficient 0 are left out. Hidden states are computed once, and only the positions that predict
    the answer are projected to logits.

    Args:
        settings: ``label_weight``, ``token_weight``, ``text_weight``, ``span_weight``, the temperatures, and
            which token-level loss.
        labels: The task's classes in the student's tokens, for ``label``.
        groups: The token groups of the two vocabularies, for ``token_groups``.
        same_tokenizer: Whether the two vocabularies are equal, so that ``auto`` means the plain KL.
        teacher: Gives its whole distributions, from batches with ``teacher_hidden``
            (:func:`~mlx_distill.distill.live_teacher.with_live_teacher`); None: what the targets have kept.
        dense_limit: Up to so many numbers the logits are computed at once, above tile by tile, with equal
            results.

    Raises:
        ConfigError: no term is left, or a term lacks what it needs.
    """
    coefficients, over_tokens = _terms(settings, labels, groups, same_tokenizer, teacher)
    losses = loss_terms(settings, labels, groups, same_tokenizer, teacher=teacher)

    def weights(batch: Batch) -> dict[str, float]:
        tokens = trained_tokens(batch)
        counts = {"text": tokens, "label": float(len(batch.extra["label_index"]))}
        counts |= {term: float(len(loss.places(batch.extra))) for term, loss in over_tokens.items()}
        # A batch that only fills up a rank has a mask of zeros, and its weights are zero.
        return {term: counts[term] if tokens else 0.0 for term in coefficients}

    def read(reader: LogitReader, batch: Batch) -> dict[str, mx.array]:
        out: dict[str, mx.array] = {}
        for term, _, values in losses(reader, batch):
            out[term] = out[term] + values.sum() if term in out else values.sum()
        return out

    return read_objective(weights, lambda batch: batch.extra["positions"], read, coefficients, dense_limit)


def loss_terms(
    settings: DistillConfig,
    labels: LabelTrie | None = None,
    groups: TokenGroups | None = None,
    same_tokenizer: bool = False,
    *,
    teacher: LiveTeacher | None = None,
) -> TermLosses:
    """What :func:`kd` sums: from the logits of a batch and the batch, the losses of the events of each term,
    with the trained position that each stands at. A term may come in several parts.

    For the arguments and errors see :func:`kd`.
    """
    coefficients, over_tokens = _terms(settings, labels, groups, same_tokenizer, teacher)
    options = divergence_options(settings)

    def read(reader: LogitReader, batch: Batch) -> Iterator[TermPart]:
        extra = batch.extra

        @cache
        def cross_entropy() -> mx.array:
            return reader.cross_entropy(batch.labels.reshape(-1)[extra["positions"]])

        if "text" in coefficients:
            yield "text", mx.arange(len(extra["positions"])), cross_entropy()
        if "label" in coefficients and labels is not None and len(extra["label_index"]):
            for index, losses in _label_losses(reader, extra, labels, settings.label_temperature):
                yield "label", index, losses
        data = TokenLossInput(reader, extra, cross_entropy, groups, settings.temperature, options, teacher)
        for term, loss in over_tokens.items():
            if len(at := loss.places(extra)):
                yield term, at, loss.loss(data)

    return read


def _label_losses(
    reader: LogitReader, extra: Mapping[str, mx.array], labels: LabelTrie, temperature: float
) -> Iterator[tuple[mx.array, mx.array]]:
    """The positions and losses of the label term, together for the rows that reach the same node. The rows'
    own texts have the logits of all nodes on their paths, so that nothing is computed besides.
    """
    reached = np.array(extra["label_node"])
    for node in np.unique(reached).tolist():
        rows = mx.array(np.flatnonzero(reached == node))
        index, path = extra["label_index"][rows], labels.chain(node)
        student = class_logprobs(
            labels,
            {
                n: label_logprobs(
                    reader.logits(index + len(labels.nodes[n].path)), labels.nodes[n], rest=True
                )
                for n in path
            },
        )
        teacher = extra["label_logprobs"][rows]
        if len(labels.nodes) > 1:
            teacher = merge_labels(teacher, labels.classes(path))
        yield index, label_kl(student, teacher, temperature=temperature)


def _terms(
    settings: DistillConfig,
    labels: LabelTrie | None,
    groups: TokenGroups | None,
    same_tokenizer: bool,
    teacher: LiveTeacher | None,
) -> tuple[dict[str, float], dict[str, TokenLoss]]:
    """The coefficients of the terms that are not left out, and the token-level losses of the terms that are
    made of one, both checked.
    """
    name = token_loss_name(settings, same_tokenizer)
    coefficients = term_coefficients(settings, same_tokenizer)
    _check(coefficients, name, labels, groups, same_tokenizer)
    token_loss = TOKEN_LOSSES[name] if name else None
    if token_loss and token_loss.events == "start_index" and (settings.teacher == "live") != bool(teacher):
        raise ConfigError(
            f"distill.teacher: {settings.teacher}, and {'a' if teacher else 'no'} live teacher is given",
            fix="give teacher=LiveTeacher(model, tokenizer) exactly where the recipe says live",
        )
    over_tokens = {"token": token_loss, "span": TOKEN_LOSSES["alm"]}
    return coefficients, {term: loss for term, loss in over_tokens.items() if loss and term in coefficients}


def term_coefficients(settings: DistillConfig, same_tokenizer: bool) -> dict[str, float]:
    """The coefficient of each term that is not left out.

    >>> term_coefficients(DistillConfig(label_weight=0, token_weight=2, text_weight=1), same_tokenizer=True)
    {'token': 2, 'text': 1}
    """
    coefficients = {
        "label": settings.label_weight,
        "token": settings.token_weight if token_loss_name(settings, same_tokenizer) else 0.0,
        "text": settings.text_weight,
        "span": settings.span_weight,
    }
    return {term: value for term, value in coefficients.items() if value > 0}


def _check(
    coefficients: Mapping[str, float],
    token_loss: str | None,
    labels: LabelTrie | None,
    groups: TokenGroups | None,
    same_tokenizer: bool,
) -> None:
    if not coefficients:
        raise ConfigError(
            "distillation without a term",
            fix="raise label_weight, token_weight, text_weight or span_weight",
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
            "label_weight without the labels' tokens",
            fix="give labels=task_label_trie(tokenizer, task), or label_weight: 0",
        )
