"""``predictions.jsonl``: a header line, then one line an item. Every figure of a report is computed from such
files, and only this module writes and reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.rows import to_item
from mlx_distill.errors import DataError
from mlx_distill.records import Prediction
from mlx_distill.storage import read_jsonl, write_jsonl
from mlx_distill.tasks.task import Task

FORMAT = 2
"""1 has no answers under the grammar; it is read too."""
FILE_NAME = "predictions.jsonl"
FIELDS = (
    "id",
    "set",
    "fields",
    "title",
    "input",
    "truth",
    "text",
    "answer",
    "error",
    "label",
    "score",
    "label_probs",
    "latency_s",
    "prompt_tokens",
    "tokens",
)
CONSTRAINED_FIELDS = ("text", "answer", "error", "label", "score")

_FIX = "run the evaluate stage again"


def write_predictions(
    path: str | Path,
    model: str,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence[Prediction],
    *,
    constrained: Sequence[Prediction | None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Write a model's answers with the prompts and the true answers, atomically; return the number of items.

    Args:
        path: The file.
        model: What the model is called in tables: ``teacher``, ``student``, ``quantized``.
        task: The task that was asked.
        rows: The prepared rows, with ``set`` and ``answer`` (the true one, or None).
        predictions: One a row, in the same order.
        constrained: The answers under the grammar of the task, None for each that is the same; None where
            they were not generated.
        settings: How the answers were made; recorded in the header.

    Raises:
        DataError: rows and predictions do not belong together.
    """
    if len({len(rows), len(predictions), len(rows if constrained is None else constrained)}) > 1:
        raise DataError(
            f"{len(predictions)} predictions for {len(rows)} rows", fix="give one prediction a row"
        )
    counts = Counter(str(row.get("set", "test")) for row in rows)
    header = {
        "format": FORMAT,
        "model": model,
        "task": task.name,
        "labels": list(task.labels),
        "set_counts": dict(counts),
        "constrained": constrained is not None,
        "settings": dict(settings or {}),
    }
    return write_jsonl(path, _lines(header, task, rows, predictions, constrained or [None] * len(rows))) - 1


def _lines(
    header: Mapping[str, Any],
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence[Prediction],
    constrained: Sequence[Prediction | None],
) -> Iterator[Mapping[str, Any]]:
    yield header
    for number, (row, prediction, other) in enumerate(zip(rows, predictions, constrained, strict=True), 1):
        item = to_item(row, task, number)
        if item.id != prediction.id:
            raise DataError(
                f"row {number} is {item.id!r}, its prediction {prediction.id!r}",
                fix="keep the rows' order",
            )
        questions = [message.content for message in item.messages if message.role == "user"]
        title = item.fields.get(task.title) if task.title else None
        yield {
            "id": prediction.id,
            "set": row.get("set", "test"),
            "fields": prediction.fields,
            "title": None if title is None else str(title),
            "input": questions[-1] if questions else "",
            "truth": row.get("answer"),
            "text": prediction.text,
            "answer": prediction.answer,
            "error": prediction.error,
            "label": prediction.label,
            "score": prediction.score,
            "label_probs": prediction.label_probs,
            "latency_s": prediction.latency_s,
            "prompt_tokens": prediction.prompt_tokens,
            "tokens": prediction.tokens,
            "constrained": other and {name: getattr(other, name) for name in CONSTRAINED_FIELDS},
        }


def read_predictions(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the rows of a file of :func:`write_predictions`, or of the folder that holds it.

    ``constrained`` of a row is None where the answer under the grammar is the same, and where the header's
    ``constrained`` is false none was generated.

    Raises:
        DataError: empty, without a header, of another format number, truncated, without rows, or a row that
            lacks a field: with file and line.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    lines = read_jsonl(path)
    number, header = next(lines, (0, {}))
    if not number:
        raise DataError(f"{path}: empty", fix=_FIX)
    if header.get("format") not in (1, FORMAT):
        described = f"format {header['format']}" if "format" in header else "no header with a format number"
        raise DataError(f"{path}:{number}: {described}, and this version reads format {FORMAT}", fix=_FIX)
    rows = []
    for number, row in lines:
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise DataError(f"{path}:{number}: no field {missing[0]!r}", fix=_FIX)
        rows.append({"constrained": None, **row})
    header.setdefault("constrained", False)
    count = sum(header.get("set_counts", {}).values())
    if count != len(rows):
        raise DataError(f"{path}: {len(rows)} rows, and the header counts {count}", fix=_FIX)
    if not rows:
        raise DataError(f"{path}: no predictions", fix="give the recipe held-out rows, then " + _FIX)
    return header, rows


def pool_predictions(paths: Sequence[str | Path], path: str | Path) -> list[dict[str, Any]]:
    """Write the predictions of the folds of a cross-validation as one file; return its rows.

    Args:
        paths: A model's files of :func:`write_predictions`, or their folders, one a fold.
        path: The file; each row gets the number of its ``fold``, from 1.

    Raises:
        DataError: files of different models, tasks or settings, or a row in two of them.
    """
    read = [read_predictions(source) for source in paths]
    header = {**read[0][0], "folds": len(read)}
    counts: Counter[str] = Counter()
    pooled: list[dict[str, Any]] = []
    for fold, (other, rows) in enumerate(read, 1):
        for key in ("model", "task", "labels", "constrained", "settings"):
            if other[key] != header[key]:
                raise DataError(f"{paths[fold - 1]}: {key} is not that of {paths[0]}", fix=_FIX)
        counts.update(other["set_counts"])
        pooled += [{**row, "fold": fold} for row in rows]
    repeated = [id for id, count in Counter(row["id"] for row in pooled).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: the row {repeated[0]!r} was answered in two folds", fix=_FIX)
    write_jsonl(path, [{**header, "set_counts": dict(counts)}, *pooled])
    return pooled


def constrained_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of :func:`read_predictions` with the answers under the grammar of the task in place of the
    free ones.
    """
    return [{**row, **(row["constrained"] or {})} for row in rows]
