"""The smallest run there is: a teacher of the packaged tiny model on two dozen chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_recipe(root: Path, **teach: Any) -> Path:
    """Write ``recipe.yaml`` and its rows under a root."""
    turns = [(f"say {n}", f"{n} it is") for n in range(24)]
    rows = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in turns
    ]
    recipe = {
        "name": "chats",
        "teacher": "asset:models/tiny-qwen3",
        "data": {"sources": [{"path": "chats.jsonl"}]},
        "teach": {"steps": 2, "batch_size": 2, **teach},
        "evaluate": {"audit_rows": 0},
    }
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
