"""Rows and answers of two models as files, with exactly the wrong answers that a test asks for."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

TASK = """
name: colours
system: Which colour? Answer in JSON.
user: "{text}"
label: colour
positive: [dark]
score: points
slices: [kind]
title: title
schema:
  type: object
  additionalProperties: false
  required: [colour, points]
  properties:
    colour: {type: string, enum: [light, dark]}
    points: {type: integer, minimum: 0, maximum: 100}
"""
LABELS = ("light", "dark")


def write_task(folder: Path, extra: str = "") -> Path:
    path = folder / "task.yaml"
    path.write_text(TASK + extra, encoding="utf-8")
    return path


def make_rows(n: int, *, authors: int = 0, title: str = "Row") -> list[dict[str, Any]]:
    """Rows with a true answer; with ``authors`` each has one of so many."""
    return [
        {
            "id": f"r{i}",
            "text": f"Text number {i}.",
            "title": f"{title} {i}",
            "kind": ["prose", "verse", "note"][i % 3],
            **({"author": f"author {i % authors}"} if authors else {}),
            "answer": {"colour": LABELS[i % 2], "points": 10 + i % 80},
        }
        for i in range(n)
    ]


def make_answers(
    rows: Sequence[Mapping[str, Any]],
    wrong: Collection[int] = (),
    invalid: Collection[int] = (),
    shift: Mapping[int, int] | None = None,
    **extra: Any,
) -> list[dict[str, Any]]:
    """One answer a row, right but for the rows named by number; ``shift`` moves the points of rows."""
    out = []
    for i, row in enumerate(rows):
        truth = row["answer"]
        colour = LABELS[1 - LABELS.index(truth["colour"])] if i in wrong else truth["colour"]
        text = json.dumps({"colour": colour, "points": truth["points"] + (shift or {}).get(i, 0)})
        out.append({"id": row["id"], "text": "no JSON" if i in invalid else text, **extra})
    return out


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_files(
    folder: Path,
    n: int = 100,
    a: Mapping[str, Any] | None = None,
    b: Mapping[str, Any] | None = None,
    *,
    task: str = "",
    authors: int = 0,
) -> dict[str, Path]:
    """``task``, ``rows``, ``a`` and ``b`` as files; the arguments of ``a`` and ``b`` are those of
    :func:`make_answers`.
    """
    rows = make_rows(n, authors=authors)
    return {
        "task": write_task(folder, task),
        "rows": write_lines(folder / "rows.jsonl", rows),
        "a": write_lines(folder / "before.jsonl", make_answers(rows, **(a or {}))),
        "b": write_lines(folder / "after.jsonl", make_answers(rows, **(b or {}))),
    }
