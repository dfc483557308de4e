"""The answer of a row: an object, JSON text or a label alone, as the answer that the task's schema has."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from mlx_distill.data.json_values import json_types
from mlx_distill.data.layouts import chat_column
from mlx_distill.data.values import apply_values
from mlx_distill.errors import DataError
from mlx_distill.recipe import ValueConfig
from mlx_distill.tasks.answer import check_answer, dump_answer, parse_answer
from mlx_distill.tasks.task import Task

DROP = "drop the row, or leave such rows out with --set data.drop_invalid=true"
_FIX = f"correct the answer, map it by values: (mlx-distill recipes keys data.sources.values), or {DROP}"


def answer_columns(row: Mapping[str, Any], values: Mapping[str, ValueConfig]) -> dict[str, Any]:
    """A row with the answer's fields as columns, under the names that the task has for them; another row as
    it is.
    """
    named = {value.field: name for name, value in values.items() if value.field in row and not value.drop}
    if not named or "answer" in row or "output" in row or "completion" in row or chat_column(row):
        return dict(row)
    return {named.get(key, key): value for key, value in row.items() if key not in named.values()}


def valid_answer(value: Any, task: Task, values: Mapping[str, ValueConfig] | None = None) -> dict[str, Any]:
    """The answer in NFC, and its values as a source says.

    Args:
        value: An object, its JSON text, or the label alone.
        task: Whose schema it must fit.
        values: Field of the answer to how its values become those of the schema.

    Raises:
        DataError: it does not fit the schema.
    """
    if isinstance(value, str):
        value = _label_alone(value, task, values or {})
    if values:
        value = apply_values(parsed, values) if isinstance(parsed := _object(value), Mapping) else value
    if isinstance(value, str):
        parsed, error = parse_answer(value, task.schema)
        value = parsed if error is None else value
    else:
        error = check_answer(value, task.schema)
    error = error and error + _missing_beside_label(value, task)
    if error is None and (normal := _nfc(value)) != value:
        value, error = normal, check_answer(normal, task.schema)
    if error is not None:
        raise DataError(f"the answer does not fit the task {task.name!r}: {error}", fix=_fix(error, task))
    _check_scale(value, task)
    return dict(json.loads(dump_answer(value, task.schema)))


def _fix(error: str, task: Task) -> str:
    """How to mend an answer that does not fit; a closed vocabulary may not have been meant as one."""
    field = re.split(r"[:.\[]", error, maxsplit=1)[0]
    if " is not one of " in error and field in task.schema["properties"] and field != task.label:
        return f"{_FIX}; where any text is right: open: [{field}] in the task"
    return _FIX


def _check_scale(answer: Mapping[str, Any], task: Task) -> None:
    """Refuse a score outside of the task's scale, which the schema need not limit."""
    score, (low, high) = answer.get(task.score or ""), task.score_scale
    if isinstance(score, (int, float)) and not low <= score <= high:
        raise DataError(
            f"{task.score}: {score:g} is outside of the task's score_scale, {low:g} to {high:g}",
            fix=f"correct score_scale in the task, scale the scores by values:, or {DROP}",
        )


def _object(value: Any) -> Any:
    return parse_answer(value, {})[0] if isinstance(value, str) else value


def _label_alone(text: str, task: Task, values: Mapping[str, ValueConfig]) -> Any:
    """A text that is not JSON as the value of the label, where the schema needs no other field; of a task
    without a label as the value of the only field.
    """
    properties = task.schema["properties"]
    name = task.label or (next(iter(properties)) if len(properties) == 1 else None)
    given = {field for field, value in values.items() if value.default is not None}
    needs_more = {*task.schema.get("required", ())} - {name} - given
    if name is None or needs_more or text.lstrip()[:1] in ("{", "[") or not text.strip():
        return text
    return {name: text.strip()} if "string" in json_types(properties[name]) else text


def _missing_beside_label(answer: Any, task: Task) -> str:
    """The rest of the error about an answer that is a label alone, where the schema needs more."""
    label = answer.strip() if isinstance(answer, str) else None
    if isinstance(answer, Mapping) and answer.keys() == {task.label}:
        label = answer[task.label]
    if label not in task.labels:
        return ""
    others = [name for name in task.schema.get("required", ()) if name != task.label]
    return (
        f"; it is the {task.label} alone, and the schema requires {', '.join(others)} too: add them, or "
        f"use a task whose schema requires {task.label} alone"
    )


def _nfc(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, Mapping):
        return {key: _nfc(item) for key, item in value.items()}
    return [_nfc(item) for item in value] if isinstance(value, (list, tuple)) else value
