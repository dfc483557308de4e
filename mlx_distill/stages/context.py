"""The context of a stage, and how a stage reads its parents."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.data.messages import with_system, without_thinking
from mlx_distill.errors import DataError, Interrupted
from mlx_distill.progress import Progress
from mlx_distill.recipe import Recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.storage import fingerprint, os_errors, read_jsonl, read_manifest
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import set_thinking

if TYPE_CHECKING:
    from mlx_distill.train.profiling import Profile

Facts = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What every stage of a run is given.

    Attributes:
        recipe: The recipe.
        task: The recipe's task.
        run: The run's folder.
        progress: Where progress is shown.
        stop: Set when the run should stop.
        hooks: Called after every step of every training; see :mod:`mlx_distill.train.events`.
        profile: Measures the time of the parts of every training.
        events: Called with every event of a run, see :func:`mlx_distill.pipeline.run`.
        system: What :func:`read_rows` gives in place of each row's system prompt; None: the row's own.
        thinking: Whether :func:`read_rows` gives the thinking before each row's answer.
    """

    recipe: Recipe
    task: Task
    run: Path
    progress: Progress
    stop: StopFlag
    hooks: Sequence[Callable[[dict[str, Any]], None]] = ()
    profile: Profile | None = None
    events: Callable[[dict[str, Any]], None] | None = None
    system: str | None = None
    thinking: bool = False


def as_teacher(context: Context) -> Context:
    """The context in which the teacher is trained and asked: its rows have the system prompt of ``targets``,
    where there is one, and their thinking where the teacher thinks.
    """
    recipe = context.recipe
    return replace(context, system=recipe.teacher_system(), thinking=recipe.teacher_thinking > 0)


def load_model(context: Context, name: str, folder: Path | None = None) -> tuple[Any, Any]:
    """Load a model of the run and its tokenizer, in the recipe's ``compute_dtype``, and dequantized where the
    recipe says so.

    Args:
        context: Of the run.
        name: The model's folder in the run.
        folder: Where it is before its stage is finished.
    """
    from mlx_distill.models.load import load
    from mlx_distill.models.modules import dequantize_model

    with warnings.catch_warnings():
        if folder is not None:  # what a user has to know of it was said when it was converted
            warnings.simplefilter("ignore")
        model, tokenizer = load(folder or context.run / name, dtype=context.recipe.compute_dtype)
    if context.recipe.dequantizes(name):
        dequantize_model(model, context.recipe.compute_dtype or "float32")
    if name in ("teacher_base", "teacher"):
        set_thinking(tokenizer, context.recipe.teacher_thinking)
    return model, tokenizer


def rows_file(context: Context, split: str) -> Path:
    """The file with the prepared rows of ``train``, ``valid`` or ``test``."""
    return context.run / "data" / f"{split}.jsonl"


def read_rows(context: Context, split: str) -> Iterator[dict[str, Any]]:
    """The prepared rows of a split, one at a time, with the context's system prompt; the thinking before a
    task's answer is left out where the context has none.
    """
    for _, row in read_jsonl(rows_file(context, split)):
        messages = own = row.get("messages", ())
        if context.system is not None:
            messages = with_system(messages, context.system)
        if not (context.thinking or context.task.is_chats):
            messages = without_thinking(messages)
        yield row if messages is own else {**row, "messages": messages}


def count_rows(context: Context, split: str) -> int:
    """The number of prepared rows of a split, without parsing them."""
    with os_errors(), open(rows_file(context, split), "rb") as file:
        return sum(1 for line in file if line.strip())


def content_of(folder: Path) -> str:
    """A hash of the contents of a folder of the run: from its manifest, or from its files if it has none."""
    manifest = read_manifest(folder)
    return manifest.content if manifest else fingerprint(str(folder))


def held_out_rows(context: Context) -> list[dict[str, Any]]:
    """The test rows that models are evaluated on: the first ``evaluate.max_rows`` of each set.

    Raises:
        DataError: there are no test rows.
    """
    rows = list(read_rows(context, "test"))
    if not rows:
        raise DataError("no held-out rows", fix="raise data.test_fraction, or give a source with split: test")
    limit = context.recipe.evaluate.max_rows
    if not limit:
        return rows
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        counts[row["set"]] += 1
        if counts[row["set"]] <= limit:
            kept.append(row)
    return kept


def check_stop(context: Context) -> None:
    """Raise :class:`Interrupted` if the run should stop. Called where a stage can be continued from."""
    if context.stop:
        raise Interrupted("stopped", fix="run the same command again: it continues behind the finished parts")


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary: targets are valid for the token ids of one vocabulary only."""
    from mlx_distill.storage import digest

    return digest(dict(tokenizer.get_vocab()))
