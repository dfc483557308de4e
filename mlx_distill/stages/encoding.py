"""Prepared rows to tokens on the disk, a few hundred in memory at a time; a stage that was cut goes on with
those that it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Example
from mlx_distill.stages.context import Context, check_stop, content_of, count_rows, read_rows, rows_file
from mlx_distill.storage import digest, scratch, sha256

if TYPE_CHECKING:
    from mlx_distill.data.chat import TokenizedRow
    from mlx_distill.storage.array_store import Store

_SHOWN = 200  # rows between two looks at the clock and at the wish to stop


def encoded_rows(
    context: Context, folder: Path, name: str, split: str, tokenizer: Any, base: str, settings: TrainConfig
) -> Store[TokenizedRow]:
    """The rows of a split in a model's tokens.

    Args:
        context: Of the run.
        folder: Where the stage works; the rows lie in its scratch.
        name: Of the stage, for people.
        split: ``train`` or ``valid``; it may be empty.
        tokenizer: Of the model.
        base: The model's folder in the run.
        settings: ``max_length`` and ``loss_on``.

    Raises:
        DataError: there are rows, and none of them can be trained on.
        Interrupted: stopped on request.
    """
    from mlx_distill.data.chat import EncodeReport, TokenizedRow, encode_rows
    from mlx_distill.storage.array_store import Store, StoreWriter, is_stored

    path, place = rows_file(context, split), scratch(folder) / "rows" / split
    key = digest(
        {
            "rows": sha256(path),
            "model": content_of(context.run / base),
            "max_length": settings.max_length,
            "loss_on": settings.loss_on,
        }
    )
    if not is_stored(place, key):
        report, total = EncodeReport(), count_rows(context, split)
        with (
            StoreWriter(place, key) as writer,
            context.progress.task(f"{name}: tokenize {split}", total=total, unit="row") as bar,
        ):
            examples = _told(context, split, bar)
            for item in (
                encode_rows(
                    examples, tokenizer, settings.max_length, settings.loss_on, report, where=str(path)
                )
                if total
                else ()
            ):
                writer.append(int(item.trained.sum()), tokens=item.tokens, trained=item.trained)
            writer.facts = asdict(report)
    store = Store(place, TokenizedRow)
    report = EncodeReport(**store.facts)
    if report.left_out:
        limit = f"; max_length is {settings.max_length}" if report.too_long else ""
        context.progress.note(f"{name}: {split}: {report}{limit}")
    return store


def _told(context: Context, split: str, bar: Any) -> Iterator[Example]:
    """The rows, while progress is told."""
    from mlx_distill.data.rows import from_row

    number = 0
    for number, row in enumerate(read_rows(context, split), 1):
        yield from_row(row)
        if number % _SHOWN == 0:
            check_stop(context)
            bar.update(number)
    bar.update(number)
