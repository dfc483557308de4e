"""Lines of other tools' files, and of ``analyze``, as rows of predictions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.tasks.answer import parse_answer
from mlx_distill.tasks.task import Task

Row = Mapping[str, Any]
Parse = Callable[[str], tuple[Mapping[str, Any] | None, str | None]]


def strict_parser(task: Task) -> Parse:
    """A strict parser that reads equal texts once: models often give the same answer to many rows."""
    return functools.lru_cache(maxsize=None)(functools.partial(parse_answer, schema=task.schema))


def answer_row(raw: Row, where: str, task: Task, parse: Parse) -> Row:
    """A line of a file of any tool as a row of predictions, its text parsed strictly."""
    if raw.get("id") in (None, ""):
        raise DataError(f"{where}: no id", fix="give every line the id of its row")
    text = raw.get("text")
    label_alone = text is None and isinstance(raw.get("probabilities"), Mapping)
    answer: Mapping[str, Any] | None = None
    error = raw.get("error")
    if label_alone:  # of analyze --labels-only
        answer = None if raw.get("label") is None else {str(task.label): raw["label"]}
    elif isinstance(text, str):
        answer, parse_error = parse(text)
        error = parse_error and (error or parse_error)
    elif text is None and error:
        pass  # a row that could not be asked
    else:
        names = ", ".join(sorted(raw))
        raise DataError(
            f"{where}: no text; the line has {names}", fix="name the model's answer text: a string"
        )
    label = answer.get(task.label) if answer and task.label else None
    score = answer.get(task.score) if answer and task.score else None
    return {
        "id": str(raw["id"]),
        "text": text or "",
        "answer": answer,
        "error": error or (None if answer is not None else "no answer"),
        "label": label,
        "score": float(score) if isinstance(score, (int, float)) and not isinstance(score, bool) else None,
        "label_probs": _probabilities(raw.get("probabilities" if label_alone else "label_probs")),
        **{name: _number(raw.get(name)) for name in ("latency_s", "prompt_tokens", "tokens")},
        "label_alone": label_alone,
    }


def _number(value: Any) -> float | None:
    """A number that is not negative, or None: what a tool means by anything else is not known."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) and value >= 0 else None


def _probabilities(value: Any) -> Mapping[str, float] | None:
    """Probabilities by label, or None for anything else."""
    if not isinstance(value, Mapping) or not value:
        return None
    return value if all(_number(share) is not None for share in value.values()) else None
