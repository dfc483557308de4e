"""The tokens of the prepared rows, held against the limits of the task and the recipe before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mlx_distill.config import resolve_asset
from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.records import Message
from mlx_distill.stages.context import Context, Facts

_COUNTED = 4000  # rows whose tokens are counted, of all


def check_token_lengths(context: Context, folder: Path) -> tuple[Facts, list[str]]:
    """Count the tokens of training rows and of their answers for the teacher and the student whose tokenizers
    are on this machine.

    Args:
        context: Of the run.
        folder: With ``train.jsonl``.

    Returns:
        The counts of each model, and warnings about rows and answers beyond ``max_length`` and
        ``max_answer_tokens``.

    Raises:
        ConfigError: more than half of the answers, or all rows, are beyond the limit.
    """
    recipe = context.recipe
    facts: Facts = {}
    warnings: list[str] = []
    rows: Sequence[Any] = ()
    for role, stage, max_length in (
        ("teacher", "teach", recipe.teach.max_length),
        ("student", "distill", recipe.distill.max_length),
    ):
        source = _tokenizer_folder(context, role)
        if source is None:
            continue
        rows = rows or _read_chats(folder / "train.jsonl")
        thinks = context.task.is_chats or getattr(recipe, f"{role}_thinking") > 0
        try:
            lengths = _count(source, rows if thinks else [_without_thinking(chat) for chat in rows])
        except DistillError as error:
            warnings.append(f"tokens of the {role} are not counted: {error.message}")
            continue
        answers = _above(lengths[1], context.task.max_answer_tokens)
        too_long = _above(lengths[0], max_length)
        facts[role] = {"rows": _figures(lengths[0], too_long), "answers": _figures(lengths[1], answers)}
        if not context.task.is_chats:  # nobody generates the answers of chats
            warnings += _answer_warning(role, lengths[1], answers, context.task.max_answer_tokens)
        warnings += _row_warning(role, lengths[0], too_long, f"{stage}.max_length", max_length)
    return facts, warnings


def _tokenizer_folder(context: Context, role: str) -> Path | None:
    """The folder with the tokenizer of a model that is converted, on this machine, or in the Hub's cache."""
    from mlx_distill.models.hub import find_cached

    named = getattr(context.recipe, role)
    if named is None:
        return None
    converted = context.run / f"{role}_base"
    spec = resolve_asset(named, context.recipe.base)
    local = Path(spec).expanduser()
    if local.is_dir():
        return local
    if (converted / "tokenizer.json").is_file():
        return converted
    return find_cached(spec, "tokenizer.json", context.recipe.convert.revision)


def _read_chats(path: Path) -> list[Any]:
    """The chats of the training rows, at equal distances where there are many."""
    from mlx_distill.data.rows import from_row
    from mlx_distill.storage import os_errors, read_jsonl

    with os_errors(), open(path, "rb") as file:
        total = sum(1 for _ in file)
    wanted = set(np.linspace(0, total - 1, min(total, _COUNTED), dtype=int).tolist())
    return [from_row(row).messages for number, (_, row) in enumerate(read_jsonl(path)) if number in wanted]


def _without_thinking(chat: Sequence[Message]) -> Sequence[Message]:
    """The chat as a model reads it that answers at once."""
    last = chat[-1]
    extra = {key: value for key, value in last.extra.items() if key != "reasoning_content"}
    return [*chat[:-1], replace(last, extra=extra)] if len(extra) < len(last.extra) else chat


def _count(source: Path, rows: Sequence[Any]) -> Int[np.ndarray, "2 n"]:
    """The tokens of each row, and those of its answer."""
    from mlx_distill.data.chat import render_many
    from mlx_distill.models.load import load_tokenizer

    tokenizer = load_tokenizer(source)
    counts: list[tuple[int, int]] = []
    for start in range(0, len(rows), 256):
        rendered = render_many(tokenizer, rows[start : start + 256])
        counts += [(len(row), len(row.answer)) for row in rendered]
    return np.array(counts, dtype=np.int64).reshape(-1, 2).T


def _above(lengths: Int[np.ndarray, " n"], limit: int) -> int:
    return int((lengths > limit).sum())


def _figures(lengths: Int[np.ndarray, " n"], above: int) -> dict[str, int]:
    return {
        "counted": len(lengths),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "too_long": above,
    }


def _answer_warning(role: str, lengths: Int[np.ndarray, " n"], above: int, limit: int) -> list[str]:
    if not above:
        return []
    text = (
        f"{above} of {len(lengths)} answers have more than max_answer_tokens: {limit} of the {role}'s tokens "
        f"(the longest {lengths.max()}) and would be cut"
    )
    fix = f"write max_answer_tokens: {_rounded_up(int(lengths.max()))} in the task"
    if above * 2 > len(lengths):
        raise ConfigError(text, fix=fix)
    return [f"{text}; {fix}"]


def _row_warning(role: str, lengths: Int[np.ndarray, " n"], above: int, key: str, limit: int) -> list[str]:
    if not above:
        return []
    text = (
        f"{above} of {len(lengths)} training rows have more than {key}: {limit} of the {role}'s tokens "
        f"(the longest {lengths.max()}) and will be left out"
    )
    fix = f"write {key}: {_rounded_up(int(lengths.max()))} to keep all of them"
    if above == len(lengths):
        raise ConfigError(text, fix=fix)
    return [f"{text}; {fix}"]


def _rounded_up(length: int) -> int:
    """A limit with some room: models do not write exactly the answers of the rows."""
    return -(-length * 9 // 8 // 8) * 8
