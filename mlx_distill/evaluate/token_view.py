"""One text, scored by two models: the probability that each gave to each piece of it, side by side.

The pieces are the smallest spans of bytes that end with a token in both tokenizations, so models with other
tokenizers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.files import ReadOptions, read_path
from mlx_distill.data.rows import Item, to_item
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.progress import Progress
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import thinking_budget

_BATCH = 4


def token_view(
    models: tuple[str | Path, str | Path],
    rows: Path,
    tasks: tuple[Task, Task],
    texts: Mapping[str, str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Score texts with both models.

    Args:
        models: The folders of A and B.
        rows: The file with the rows that were asked.
        tasks: What A and B are asked.
        texts: The answer text that both score, by the id of its row.
        progress: Where progress is shown.

    Returns:
        For each id ``id``, ``text`` and ``spans``, each ``text``, ``a`` and ``b``: the probabilities of the
        span, the products of those of its tokens.

    Raises:
        DataError: a row is not in the file, or the two tokenizations of a text hold other bytes.
    """
    from mlx_distill.losses import align_bytes

    asked: dict[str, Any] = {}
    for where, raw in read_path(rows, str(rows), ReadOptions()):
        item = to_item(raw, tasks[0], where)
        if item.id in texts:
            asked[item.id] = raw
    missing = [id for id in texts if id not in asked]
    if missing:
        raise DataError(f"{rows}: no row {missing[0]!r}", fix="name ids of compared rows: --tokens ID")
    scored = []
    for model, task in zip(models, tasks, strict=True):
        items = [to_item(asked[id], task, id) for id in texts]
        with progress.task(f"score {Path(model).name}", total=len(items), unit="row"):
            scored.append(_score(model, items, list(texts.values())))
    (first, a_tokenizer), (second, b_tokenizer) = scored
    out = []
    for id, (a_ids, a_logs, a_bytes), (b_ids, b_logs, _) in zip(texts, first, second, strict=True):
        spans = align_bytes(b_ids, a_ids, b_tokenizer, a_tokenizer).tolist()
        parts = [b"".join(a_bytes[start:end]) for _, _, start, end in spans]
        pieces = [
            {
                "text": part.decode("utf-8", "replace"),
                "a": math.exp(sum(a_logs[a_start:a_end])),
                "b": math.exp(sum(b_logs[b_start:b_end])),
            }
            for part, (b_start, b_end, a_start, a_end) in zip(parts, spans, strict=True)
        ]
        out.append({"id": id, "text": texts[id], "spans": pieces})
    return out


def _score(
    model: str | Path, items: Sequence[Item], texts: Sequence[str]
) -> tuple[list[tuple[list[int], list[float], list[bytes]]], Any]:
    """Of each text the token ids, their log-probabilities and their bytes; and the tokenizer."""
    from mlx_distill.data.chat import render
    from mlx_distill.distill.teacher import TokenizedAnswer, score
    from mlx_distill.losses.token_bytes import vocabulary
    from mlx_distill.models.load import load
    from mlx_distill.records import Message

    loaded, tokenizer = load(model)
    if thinking_budget(tokenizer):
        raise ConfigError(
            f"--tokens: {model} thinks before it answers: the probabilities depend on what it thought",
            fix="leave out --tokens",
        )
    answers = []
    for item, text in zip(items, texts, strict=True):
        chat = render(tokenizer, [*item.messages, Message("assistant", text)])
        answers.append(TokenizedAnswer(chat.tokens.tolist(), chat.spans[-1][0], None, item.id, text))
    tokens = vocabulary(tokenizer).tokens
    targets = score(loaded, answers, top_k=1, tokenizer=tokenizer, batch_size=_BATCH)
    return [
        (ids := target.ids.tolist(), target.logprobs.tolist(), [tokens[i] for i in ids]) for target in targets
    ], tokenizer
