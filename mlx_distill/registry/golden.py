"""Golden rows: a few prompts with the greedy answers that a version gave when it was added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.messages import with_system
from mlx_distill.data.predictions import read_predictions
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task

GOLDEN_ROWS = 3
_TOKENS = 16  # of an answer of a model without a task
_SPLITS = ("test", "valid", "train")


def golden_from_run(run: Path, evaluation: Path, count: int = GOLDEN_ROWS) -> list[dict[str, Any]]:
    """Golden rows from the answers that an evaluation of the run has.

    Those are chosen whose label is the most probable, one of each label as far as there are: a label that is
    nearly a tie can be another one on another machine.

    Args:
        run: Its folder, with ``data/test.jsonl``.
        evaluation: The folder of the evaluation.
        count: How many.

    Returns:
        Rows with ``id``, ``messages`` (the prompt), ``text``, ``answer`` and ``label``; none where the run no
        longer has the prompts.
    """
    header, rows = read_predictions(evaluation)
    test, system = run / "data" / "test.jsonl", (header.get("settings") or {}).get("system")
    prompts = {str(row["id"]): _prompt(row) for _, row in read_jsonl(test)} if test.is_file() else {}
    if system is not None:  # the teacher of a run may read another one than the rows have
        prompts = {id: with_system(prompt, system) for id, prompt in prompts.items()}
    usable = [row for row in rows if row["answer"] is not None and str(row["id"]) in prompts]

    def confidence(row: Mapping[str, Any]) -> float:
        return max((row["label_probs"] or {}).values(), default=0.0)

    usable.sort(key=lambda row: (-confidence(row), str(row["id"])))
    first = {row["label"]: row for row in reversed(usable)}  # the most probable row of each label
    chosen = sorted(first.values(), key=lambda row: -confidence(row))
    chosen += [row for row in usable if row not in chosen]
    keys = ("id", "text", "answer", "label")
    return [
        {**{key: row[key] for key in keys}, "messages": prompts[str(row["id"])]} for row in chosen[:count]
    ]


def prompts_for(run: Path | None, task: Task | None, count: int = GOLDEN_ROWS) -> list[dict[str, Any]]:
    """Rows that a model of a run without answers can be asked: the first ones of its data.

    Args:
        run: The run, or None.
        task: The task of the model, or None of one that is asked anything.
        count: How many.
    """
    for split in _SPLITS if run is not None else ():
        path = Path(str(run)) / "data" / f"{split}.jsonl"
        if path.is_file():
            rows = [row for (_, row), _ in zip(read_jsonl(path), range(count), strict=False)]
            if rows:
                return [{"id": str(row["id"]), "messages": _prompt(row)} for row in rows]
    if task is not None:
        words = ("Morning", "A long road", "Nobody knows why")
        return [
            {"id": f"golden-{i}", "messages": _messages(task, dict.fromkeys(task.input_fields, word))}
            for i, word in enumerate(words[:count], 1)
        ]
    questions = ("Hello.", "Count from one to five.", "What is a song?")
    return [
        {"id": f"golden-{i}", "messages": [{"role": "user", "content": question}]}
        for i, question in enumerate(questions[:count], 1)
    ]


def _messages(task: Task, row: Mapping[str, Any]) -> list[dict[str, str]]:
    system, user = task.prompt(row)
    turns = [("system", system), ("user", user)] if system else [("user", user)]
    return [{"role": role, "content": content} for role, content in turns]


def _prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a prepared row up to the last answer, as a model is asked."""
    turns = list(row["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns


def answer_golden(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Load the model in a folder and let it answer golden rows greedily.

    Args:
        folder: The model.
        rows: With ``id`` and ``messages``.

    Returns:
        The rows with ``text``, ``answer`` and ``label``; of a model without a task the answer is None.

    Raises:
        ModelError: it cannot be loaded.
    """
    from mlx_distill.models.load import load

    trained_on = read_trained_on(folder)
    return golden_answers(*load(folder), trained_on.task if trained_on is not None else None, rows)


def golden_answers(
    model: Any, tokenizer: Any, task: Task | None, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Let a model that is in memory answer golden rows greedily; see :func:`answer_golden`.

    Args:
        model: mlx-lm's, used by this thread alone meanwhile.
        tokenizer: Its tokenizer.
        task: What it was trained on, or None.
        rows: With ``id`` and ``messages``.
    """
    from mlx_distill.data.chat import prompt_ids, stop_ids
    from mlx_distill.infer.engine import generate
    from mlx_distill.infer.predict import predict

    if task is not None:
        asked = [{"id": row["id"], "messages": row["messages"]} for row in rows]
        predictions = predict(model, tokenizer, task, asked, label_probs=False)
        return [
            {**row, "text": got.text, "answer": got.answer, "label": got.label}
            for row, got in zip(rows, predictions, strict=True)
        ]
    prompts = [prompt_ids(tokenizer, row["messages"]) for row in rows]
    texts = generate(model, tokenizer, prompts, max_tokens=_TOKENS, stop=set(stop_ids(tokenizer)))
    return [
        {**row, "text": got.text, "answer": None, "label": None} for row, got in zip(rows, texts, strict=True)
    ]
