"""A task with every kind of field, and rows of predictions of it."""

from __future__ import annotations

from typing import Any

from mlx_distill.tasks.task import Task, parse_task

SCHEMA = {
    "type": "object",
    "properties": {
        "tone": {"type": "string", "enum": ["light", "dark"]},
        "points": {"type": "integer", "minimum": 0, "maximum": 100},
        "themes": {"type": "array", "items": {"type": "string"}},
        "note": {"type": "string"},
    },
}


def tone_task(**changes: Any) -> Task:
    raw = {
        "name": "tones",
        "system": "",
        "user": "{text}",
        "label": "tone",
        "positive": ["dark"],
        "score": "points",
        "schema": SCHEMA,
    }
    return parse_task({**raw, **changes}, "task")


def prediction(
    row_id: object, truth: dict[str, Any] | None, answer: dict[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """A row of ``predictions.jsonl``; an answer of None is one that is not valid."""
    own = answer or {}
    return {
        "id": str(row_id),
        "set": "test",
        "fields": {},
        "title": None,
        "input": f"text {row_id}",
        "truth": truth,
        "answer": answer,
        "label": own.get("tone"),
        "score": own.get("points"),
        "label_probs": None,
        "text": "",
        "error": None if answer is not None else "no JSON",
        "latency_s": 0.5,
        "prompt_tokens": 5,
        "tokens": 10,
        "constrained": None,
        **more,
    }


def tone(name: str, points: int = 50, *themes: str, note: str = "a note") -> dict[str, Any]:
    """An answer."""
    return {"tone": name, "points": points, "themes": list(themes), "note": note}
