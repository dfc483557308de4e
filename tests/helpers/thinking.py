"""Rows whose answers follow from scripted thinking, and a run of tiny models on them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from helpers import small_run

THOUGHT = "Is a red thing named? {}."
BUDGET = 24
# What write_thinking_model learns: thinking and answer to a text.
LEARNED = {
    "a red otter": ("It is red.", '{"colour": "yes"}'),
    "some lynx": ("None is.", '{"colour": "no"}'),
}
TRAINING = {
    "steps": 2,
    "accumulate": 1,
    "batch_size": 4,
    "lora_rank": 4,
    "learning_rate": 1e-3,
    "evaluate_every": 0,
    "lora_dropout": 0.0,
    "max_length": 200,
}


def rows(count: int = 40, without: Collection[int] | None = None) -> list[dict[str, Any]]:
    """Chats with thinking: under its key, or as a block before the answer; some have none.

    Args:
        count: Of the rows.
        without: The numbers of those that have none; None: every tenth.
    """
    without = range(3, count, 10) if without is None else without
    out = []
    for i, row in enumerate(small_run.rows(count)):
        thought = THOUGHT.format("It is" if row["colour"] == "yes" else "None is")
        answer = json.dumps({"colour": row["colour"]})
        last = {"role": "assistant", "content": answer, "reasoning_content": thought}
        if i % 2:
            last = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
        if i in without:
            last = {"role": "assistant", "content": answer}
        question = [
            {"role": "system", "content": small_run.TASK["system"]},
            {"role": "user", "content": row["text"]},
        ]
        out.append({"id": row["id"], "messages": [*question, last]})
    return out


def write_thinking_model(folder: Path) -> None:
    """A model of one narrow layer that has learned :data:`LEARNED` by heart, thinking and answers."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten

    from helpers.small_model import write_small_model
    from mlx_distill.data.chat import render
    from mlx_distill.models.load import load
    from mlx_distill.models.trained_on import write_trained_on
    from mlx_distill.tasks.task import parse_task
    from mlx_distill.thinking import set_thinking, write_thinking

    write_small_model(folder)
    model, tokenizer = load(folder)
    set_thinking(tokenizer, BUDGET)
    turns = [{"role": "system", "content": small_run.TASK["system"]}]
    chats = [
        [
            *turns,
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer, "reasoning_content": thought},
        ]
        for text, (thought, answer) in LEARNED.items()
    ]
    rows = [render(tokenizer, chat) for chat in chats]
    longest = max(map(len, rows))
    tokens = mx.array([[*row.tokens.tolist(), *[0] * (longest - len(row))] for row in rows])
    trained = mx.array([[*map(float, row.trained), *[0.0] * (longest - len(row))] for row in rows])

    def loss(model: nn.Module) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (losses * trained).sum() / trained.sum()

    optimizer, step = optim.Adam(0.01), nn.value_and_grad(model, loss)
    for _ in range(200):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if value.item() < 0.02:
            break
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    write_thinking(folder, BUDGET)
    write_trained_on(folder, parse_task(small_run.TASK, "task"), [{"messages": chat} for chat in chats])


def write_recipe(folder: Path, thinking: str, **blocks: Any) -> Path:
    """``recipe.yaml`` of a Qwen3 that thinks and teaches a gpt-oss, with a few steps of each training."""
    settings = {
        "student": "asset:models/tiny-gpt-oss",
        "teach": TRAINING,
        "distill": {**TRAINING, "text_weight": 1.0},
        "targets": {
            "text": "data",
            "top_k": 8,
            "min_valid": 0,
            "thinking": thinking,
            "max_thinking_tokens": 24,
            "batch_size": 8,
        },
        "quantize": {"refine": "none"},
        "evaluate": {"models": ["teacher", "student"], "batch_size": 8},
        **blocks,
    }
    path = small_run.write_recipe(folder, **settings)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path
