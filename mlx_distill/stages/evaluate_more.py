"""What the evaluate stage measures besides the answers: labels of validation rows, labels under other orders
of the options, and repeated answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.data.evaluation_files import LABEL_ORDERS, REPEATS, VALID_LABELS, write_lines
from mlx_distill.errors import ConfigError
from mlx_distill.stages.context import Context, check_stop, held_out_rows
from mlx_distill.stages.label_calibration import labelled_valid_rows, score_labels
from mlx_distill.storage import read_jsonl, scratch, write_jsonl
from mlx_distill.thinking import thinking_budget

SEED = 0
"""Of the rows that are drawn, of the order of the rows in each run, and of sampled answers."""


def checked_rows(context: Context) -> list[dict[str, Any]]:
    """The held-out rows, after settings are refused that measure nothing.

    Raises:
        ConfigError: see :func:`check_extra`.
        DataError: there are no held-out rows.
    """
    check_extra(context)
    return held_out_rows(context)


def check_extra(context: Context) -> None:
    """Refuse settings of these measurements that measure nothing, before the model answers.

    Raises:
        ConfigError: one run or one order, or a task whose prompt has no place for the list of labels.
    """
    settings = context.recipe.evaluate
    for key in ("repeats", "shuffle_options"):
        if getattr(settings, key) == 1:
            raise ConfigError(f"evaluate.{key}: 1", fix="2 or more, to compare them; or 0")
    if settings.shuffle_options:
        from mlx_distill.infer.label_scorer import LabelOptions, check_label_options

        check_label_options(context.task, LabelOptions(shuffle_options=settings.shuffle_options))


def measure_more(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    has_labels: bool,
) -> None:
    """Everything that the recipe asks for besides the answers.

    Args:
        context: Of the run.
        folder: Of the evaluation; gets the files of :mod:`mlx_distill.data.evaluation_files`.
        name: Of the model.
        model: The model.
        tokenizer: Its tokenizer.
        rows: The held-out rows.
        has_labels: Whether the model's label probabilities can be read.
    """
    settings = context.recipe.evaluate
    if has_labels and not thinking_budget(tokenizer):  # labels are scored right behind a prompt
        score_valid_rows(context, folder, name, model, tokenizer)
        if settings.shuffle_options:
            score_label_orders(context, folder, name, model, tokenizer, rows)
    if settings.repeats:
        repeat_answers(context, folder, name, model, tokenizer, rows)


def score_valid_rows(context: Context, folder: Path, name: str, model: Any, tokenizer: Any) -> None:
    """Keep the model's distribution over the labels of the validation rows."""
    from mlx_distill.infer.label_temperature import what_is_asked

    rows = labelled_valid_rows(context)
    title = f"evaluate {name}: labels of validation rows"
    scored = score_labels(context, title, model, tokenizer, context.task, rows, "valid row")
    lines = [
        {"id": row["id"], "truth": row["answer"][context.task.label], "label_probs": prediction.label_probs}
        for row, prediction in zip(rows, scored or [], strict=False)
    ]
    header = {"model": name, "labels": list(context.task.labels), "asked": what_is_asked(context.task)}
    write_lines(folder / VALID_LABELS, header, lines)


def score_label_orders(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Keep each row's most probable label under several orders of the labels in its prompt. Rows that do not
    have the task's list of labels in their prompt, such as chats of their own, are left out and counted.
    """
    from mlx_distill.infer.label_scorer import label_orders

    task = context.task
    orders = label_orders(task.labels, context.recipe.evaluate.shuffle_options, SEED)
    listed = ", ".join(task.labels)
    asked = [row for row in rows if any(listed in turn["content"] for turn in _prompt(row))]
    labels: list[list[str | None]] = [[] for _ in asked]
    for number, order in enumerate(orders, 1):
        check_stop(context)
        shown = [_with_list(row, listed, ", ".join(order)) for row in asked]
        title = f"evaluate {name}: labels in order {number} of {len(orders)}"
        own = task.with_label_order(order)
        for found, prediction in zip(
            labels, score_labels(context, title, model, tokenizer, own, shown, "row") or [], strict=True
        ):
            found.append(prediction.label)
    header = {"model": name, "orders": [list(order) for order in orders], "left_out": len(rows) - len(asked)}
    lines = [{"id": row["id"], "labels": found} for row, found in zip(asked, labels, strict=True)]
    write_lines(folder / LABEL_ORDERS, header, lines)


def _prompt(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The turns in which a task's prompt stands: the system prompt, and the user's last turn."""
    turns = row["messages"]
    return [*[t for t in turns if t["role"] == "system"], *[t for t in turns if t["role"] == "user"][-1:]]


def _with_list(row: Mapping[str, Any], listed: str, other: str) -> dict[str, Any]:
    places = [id(turn) for turn in _prompt(row)]
    messages = [
        {**turn, "content": turn["content"].replace(listed, other)} if id(turn) in places else turn
        for turn in row["messages"]
    ]
    return {**row, "messages": messages}


def repeat_answers(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Let the model answer the rows in several runs: greedily with the rows in other batches each time, since
    the shape of a batch changes sums, and with sampling. A killed stage continues behind its last finished
    part.
    """
    settings = context.recipe.evaluate
    kinds = {"shuffled": 0.0}
    if settings.repeat_temperature:
        kinds["sampled"] = settings.repeat_temperature
    count = min(settings.repeat_rows or len(rows), len(rows))
    drawn = sorted(np.random.default_rng(SEED).permutation(len(rows))[:count].tolist())
    lines: list[dict[str, Any]] = []
    for kind, temperature in kinds.items():
        title = f"evaluate {name}: {settings.repeats} {kind} runs"
        with context.progress.task(title, total=settings.repeats * count, unit="answer") as bar:
            for run in range(1, settings.repeats + 1):
                order = np.random.default_rng([SEED, run]).permutation(drawn).tolist()
                chunk = settings.batch_size * 4
                for first in range(0, count, chunk):
                    path = scratch(folder) / f"repeats-{kind}-{run:03d}-{first:08d}.jsonl"
                    if not path.is_file():
                        check_stop(context)
                        part = [rows[i] for i in order[first : first + chunk]]
                        seed = SEED + 1_000_003 * run + first
                        answers = _answers(context, model, tokenizer, part, temperature, seed)
                        write_jsonl(path, [{"kind": kind, "run": run, **line} for line in answers])
                    lines += [line for _, line in read_jsonl(path)]
                    bar.update((run - 1) * count + min(first + chunk, count))
    header = {"model": name, "runs": settings.repeats, "rows": count, "seed": SEED}
    write_lines(folder / REPEATS, {**header, "temperatures": kinds}, lines)


def _answers(
    context: Context,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    temperature: float,
    seed: int,
) -> list[dict[str, Any]]:
    from mlx_distill.infer.predict import predict

    predictions = predict(
        model,
        tokenizer,
        context.task,
        rows,
        batch_size=context.recipe.evaluate.batch_size,
        temperature=temperature,
        seed=seed,
        label_probs=False,
    )
    keys = ("id", "text", "answer", "label", "score")
    return [{key: getattr(prediction, key) for key in keys} for prediction in predictions]
