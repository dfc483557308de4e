"""What a model in training answers to validation rows, and how well: ``evaluate_rows`` of ``teach`` and
``distill``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import DataError
from mlx_distill.recipe import TrainConfig
from mlx_distill.stages.context import Context, read_rows

if TYPE_CHECKING:
    from mlx_distill.data.chat import TokenizedRow
    from mlx_distill.tasks.task import Task

ROWS_TOGETHER = 8
"""Rows that are answered together, or ``batch_size`` if that is more: the keys and values of so many take
less memory than what a step of training keeps of one row for its backward pass.
"""

Row = Mapping[str, Any]


def answer_measure(
    context: Context, name: str, model: Any, tokenizer: Any, settings: TrainConfig
) -> Callable[[Any], dict[str, float | None]] | None:
    """The figures of a model in training on the first validation rows that fit ``max_length``; None where the
    settings ask for none.

    The rows are answered greedily and without a grammar, as in an evaluation. Of chats without a task only
    the perplexity and the accuracy of the tokens are measured.

    Args:
        context: Of the run.
        name: Of the stage, for the user.
        model: The model in training.
        tokenizer: Its tokenizer.
        settings: ``evaluate_rows``, ``max_length``, ``loss_on``, ``batch_size`` and ``best_metric``.

    Raises:
        DataError: no validation row has an answer and fits, or ``best_metric`` has no row to be measured on.
    """
    from mlx_distill.data.chat import pad_id
    from mlx_distill.infer.predict import predict
    from mlx_distill.models.forward import embedding_rows

    if not settings.evaluate_rows:
        return None
    token_rows = embedding_rows(model)
    rows, chats = _chosen_rows(context, tokenizer, settings, token_rows)
    task, pad, together = context.task, pad_id(tokenizer, token_rows), max(ROWS_TOGETHER, settings.batch_size)
    check_measured(rows, task, settings, name)
    if len(rows) < settings.evaluate_rows:
        context.progress.note(
            f"{name}: evaluate_rows: {settings.evaluate_rows}, and there are {len(rows)} validation rows "
            f"with an answer and at most {settings.max_length} tokens"
        )

    def measure(model: Any) -> dict[str, float | None]:
        figures = token_figures(model, chats, pad, settings.batch_size)
        if task.is_chats:
            return figures
        answers = predict(model, tokenizer, task, rows, batch_size=together, label_probs=False)
        answered = [{**asdict(a), "truth": row["answer"]} for row, a in zip(rows, answers, strict=True)]
        return answer_figures(answered, task) | figures

    return measure


def _chosen_rows(
    context: Context, tokenizer: Any, settings: TrainConfig, token_rows: int
) -> tuple[list[Row], list[TokenizedRow]]:
    """The first validation rows that have an answer and are short enough, and their chats in tokens."""
    from mlx_distill.data.chat import render
    from mlx_distill.data.rows import from_row
    from mlx_distill.models.token_ids import check_token_ids

    rows: list[Row] = []
    chats: list[TokenizedRow] = []
    for row in read_rows(context, "valid"):
        if len(rows) == settings.evaluate_rows:
            break
        if row["answer"] is None and not context.task.is_chats:
            continue
        chat = render(tokenizer, from_row(row).messages, loss_on=settings.loss_on, id=row["id"])
        if len(chat) <= settings.max_length and chat.trained.any():
            check_token_ids(chat.tokens, token_rows, tokenizer)
            rows.append(row)
            chats.append(chat)
    return rows, chats


def check_measured(rows: Sequence[Row], task: Task, settings: TrainConfig, name: str) -> None:
    """Refuse rows that say nothing about the metric that the training goes by."""
    if not rows:
        raise DataError(
            f"{name}: evaluate_rows: no validation row has an answer and at most "
            f"{settings.max_length} tokens",
            fix="raise data.valid_fraction, or leave out evaluate_rows",
        )
    if task.is_chats:
        return
    invalid = {"answer": None, "label": None, "score": None}
    figures = answer_figures([{**invalid, "truth": row["answer"]} for row in rows], task)
    if settings.best_metric in figures and figures[settings.best_metric] is None:
        raise DataError(
            f"{name}: best_metric: {settings.best_metric}: none of the {len(rows)} validation rows that are "
            "answered can be measured by it",
            fix=f"raise evaluate_rows or data.valid_fraction, or choose another of {', '.join(figures)}",
        )


def answer_figures(rows: Sequence[Row], task: Task) -> dict[str, float | None]:
    """The figures of answers that the task has a field for; None for one that no row can be measured by.

    ``accuracy``: the share of rows with the true label; ``positive_accuracy``: the same of the rows whose
    true label is a positive class; ``score_mae``: mean absolute error of the score; ``json_valid``: the
    share of answers that fit the task; ``answer_f1``, of a task without a label: mean F1 of the fields. An
    invalid answer counts as wrong in each.

    Args:
        rows: ``answer``, ``label`` and ``score`` of each prediction, with its ``truth``.
        task: Label, positive classes and score.
    """
    from mlx_distill import metrics as m
    from mlx_distill.evaluate.figures import compared_fields
    from mlx_distill.evaluate.registry import metric_named

    out: dict[str, float | None] = {}
    if task.label:
        accuracy = metric_named(task, "accuracy").values
        assert accuracy is not None
        out["accuracy"] = _mean(accuracy(rows))
        if task.positive:
            of_positive = [row for row in rows if (row["truth"] or {}).get(task.label) in task.positive]
            out["positive_accuracy"] = _mean(accuracy(of_positive))
    else:
        out["answer_f1"] = m.answer_f1(m.truth_pairs(rows), *compared_fields(task))["value"]
    if task.score:
        out["score_mae"] = _mean(m.score_errors(rows, task.score, task.score_scale))
    out["json_valid"] = _mean([row["answer"] is not None for row in rows])
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    counted = [float(value) for value in values if value is not None]
    return math.fsum(counted) / len(counted) if counted else None


def token_figures(
    model: Any, chats: Sequence[TokenizedRow], pad: int, batch_size: int
) -> dict[str, float | None]:
    """``perplexity`` of the trained tokens of chats, the exponential of their mean negative log-likelihood,
    and ``token_accuracy``, the share of them that are the model's most probable ones.

    Args:
        model: In evaluation mode.
        chats: Of which the perplexity is measured: the rows' own answers.
        pad: The token to pad with.
        batch_size: Chats a forward pass.
    """
    from mlx_distill.data.batching import collate
    from mlx_distill.train.validation import sequence_losses

    # Neighbours of similar length: little is padded.
    order = sorted(range(len(chats)), key=lambda i: (len(chats[i]), i))
    nats = right = tokens = 0.0
    for first in range(0, len(order), batch_size):
        sums = sequence_losses(model, collate(chats, order[first : first + batch_size], pad)).sum(axis=0)
        nats, right, tokens = nats + float(sums[0]), right + float(sums[1]), tokens + float(sums[2])
    mean = nats / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else None, "token_accuracy": right / tokens}
