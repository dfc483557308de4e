"""What every stage of a run shares, and how it reads its parents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import DataError, Interrupted
from mlx_distill.progress import Progress
from mlx_distill.recipe import Recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.storage import fingerprint, os_errors, read_jsonl, read_manifest
from mlx_distill.tasks.task import Task

if TYPE_CHECKING:
    from mlx_distill.train.profiling import Profile

Facts = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What every stage of a run shares: the recipe, its task, the run's folder, where progress is told, and
    the wish to stop.

    ``hooks`` watch every training (:mod:`mlx_distill.train.events`), and ``profile`` takes the time of its
    parts.
    """

    recipe: Recipe
    task: Task
    run: Path
    progress: Progress
    stop: StopFlag
    hooks: Sequence[Callable[[dict[str, Any]], None]] = ()
    profile: Profile | None = None


def load_model(context: Context, name: str) -> tuple[Any, Any]:
    """A model of the run and its tokenizer, computing in the recipe's type, and unpacked where the recipe
    says so.
    """
    from mlx_distill.models.load import load
    from mlx_distill.models.modules import dequantize_model

    model, tokenizer = load(context.run / name, dtype=context.recipe.compute_dtype)
    if context.recipe.dequantizes(name):
        dequantize_model(model, context.recipe.compute_dtype or "float32")
    return model, tokenizer


def rows_file(context: Context, split: str) -> Path:
    """Where the prepared rows of ``train``, ``valid`` or ``test`` stand."""
    return context.run / "data" / f"{split}.jsonl"


def read_rows(context: Context, split: str) -> Iterator[dict[str, Any]]:
    """The prepared rows of a split, one at a time."""
    return (row for _, row in read_jsonl(rows_file(context, split)))


def count_rows(context: Context, split: str) -> int:
    """How many prepared rows a split has: its lines, of which none is parsed."""
    with os_errors(), open(rows_file(context, split), "rb") as file:
        return sum(1 for line in file if line.strip())


def content_of(folder: Path) -> str:
    """A hash of what a folder of the run holds: by its manifest, without one by its files."""
    manifest = read_manifest(folder)
    return manifest.content if manifest else fingerprint(str(folder))


def held_out_rows(context: Context) -> list[dict[str, Any]]:
    """The test rows that are measured: of each set the first ``evaluate.max_rows``.

    Raises:
        DataError: there are none.
    """
    rows = list(read_rows(context, "test"))
    if not rows:
        raise DataError("no held-out rows", fix="raise data.test_fraction, or give a source with split: test")
    limit = context.recipe.evaluate.max_rows
    if not limit:
        return rows
    counts: dict[str, int] = {}
    kept = []
    for row in rows:
        counts[row["set"]] = counts.get(row["set"], 0) + 1
        if counts[row["set"]] <= limit:
            kept.append(row)
    return kept


def stop_here(context: Context) -> None:
    """Where a stage can be left: raise :class:`Interrupted` if that is wished."""
    if context.stop:
        raise Interrupted("stopped", fix="run the same command again: finished parts are not done again")


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary: targets of one teacher are of no use with the ids of another."""
    from mlx_distill.storage import digest

    return digest(dict(tokenizer.get_vocab()))
