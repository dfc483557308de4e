"""Rows whose answers follow from scripted thinking, and a run of tiny models on them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from helpers import small_run

THOUGHT = "Is a red thing named? {}."
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
