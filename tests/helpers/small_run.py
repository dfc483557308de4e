"""A very small run: one packaged tiny model as its own student, and forty made-up rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LABELS = ("yes", "no")
TASK = {
    "name": "colours",
    "system": "Say whether the text names a colour. Answer in JSON.",
    "user": "{text}",
    "label": "colour",
    "max_answer_tokens": 12,
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["colour"],
        "properties": {"colour": {"type": "string", "enum": list(LABELS)}},
    },
}
_TRAINING = {
    "epochs": 1,
    "accumulate": 1,
    "batch_size": 4,
    "lora_rank": 4,
    "evaluate_every": 4,
    "checkpoint_every": 2,
}


def rows(count: int = 40) -> list[dict[str, Any]]:
    animals = ["heron", "otter", "lynx", "toad", "wren", "hare", "pike", "newt"]
    out = []
    for i in range(count):
        what = "a red" if i % 2 else "some"
        out.append(
            {
                "id": f"r{i}",
                "text": f"{what} {animals[i % 8]} crosses bridge {i} at {i * 7} o'clock",
                "colour": LABELS[i % 2 == 0],
            }
        )
    return out


def write_recipe(folder: Path, model: str = "asset:models/tiny-qwen3", **blocks: Any) -> Path:
    """``recipe.yaml``, ``task.yaml`` and ``rows.jsonl`` in ``folder``; without an audit, unless ``evaluate``
    names its rows.
    """
    import yaml

    blocks["evaluate"] = {"audit_rows": 0, **blocks.get("evaluate", {})}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK, sort_keys=False), encoding="utf-8")
    raw = {
        "name": "colours",
        "task": "task.yaml",
        "teacher": model,
        "student": model,
        "compute_dtype": "float32",
        "data": {"sources": [{"path": "rows.jsonl"}], "test_fraction": 0.2},
        "teach": _TRAINING,
        "targets": {"top_k": 8, "min_valid": 0},  # so few steps teach nothing
        "distill": _TRAINING,
        **blocks,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path
