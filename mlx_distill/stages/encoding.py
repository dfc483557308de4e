"""Prepared rows tokenized into a store on disk, a few hundred in memory at a time; a stage that was
interrupted uses the store again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Example
from mlx_distill.stages.context import Context, check_stop, content_of, count_rows, read_rows, rows_file
from mlx_distill.storage import digest, scratch, sha256

if TYPE_CHECKING:
    from mlx_distill.data.chat import TokenizedRow
    from mlx_distill.storage.array_store import Store


def encoded_rows(
    context: Context,
    folder: Path,
    name: str,
    split: str,
    tokenizer: Any,
    base: str,
    settings: TrainConfig,
    *,
    token_rows: int = 0,
    max_rows: int = 0,
    check_every: int = 200,
) -> Store[TokenizedRow]:
    """The rows of a split in a model's tokens; tokenized unless the stage's scratch folder has them.

    Args:
        context: Of the run.
        folder: Of the stage; its scratch folder gets the store.
        name: Of the stage, for the user.
        split: ``train`` or ``valid``; it may be empty.
        tokenizer: Of the model.
        base: The model's folder in the run.
        settings: ``max_length`` and ``loss_on``.
        token_rows: Rows of the model's embedding, which the tokens are held against; 0 checks nothing.
        max_rows: So many rows at most, the first ones; 0: all.
        check_every: Rows after which progress is shown and a request to stop is checked.

    Raises:
        DataError: there are rows, but no row with a trained token.
        ModelError: a token that the model's embedding has no row for.
        Interrupted: stopped on request.
    """
    from mlx_distill.data.chat import EncodeReport, TokenizedRow, encode_rows
    from mlx_distill.models.token_ids import check_token_ids
    from mlx_distill.storage.array_store import Store, StoreWriter, is_stored

    path, rows_folder = rows_file(context, split), scratch(folder) / "rows" / split
    key = digest(
        {
            "rows": sha256(path),
            "model": content_of(context.run / base),
            "max_length": settings.max_length,
            "loss_on": settings.loss_on,
            **({"max_rows": max_rows} if max_rows else {}),
            **({"system": context.system} if context.system is not None else {}),
            **({"thinking": True} if context.thinking else {}),
        }
    )
    if not is_stored(rows_folder, key):
        report, total = EncodeReport(), min(count_rows(context, split), max_rows or sys.maxsize)
        with (
            StoreWriter(rows_folder, key) as writer,
            context.progress.task(f"{name}: tokenize {split}", total=total, unit="row") as bar,
        ):
            examples = _read_examples(context, split, bar, total, check_every)
            encoded = encode_rows(
                examples, tokenizer, settings.max_length, settings.loss_on, report, where=str(path)
            )
            for row in encoded if total else ():
                check_token_ids(row.tokens, token_rows, tokenizer)
                writer.append(int(row.trained.sum()), tokens=row.tokens, trained=row.trained)
            writer.facts = asdict(report)
    store = Store(rows_folder, TokenizedRow)
    report = EncodeReport(**store.facts)
    if report.left_out:
        limit = f"; max_length is {settings.max_length}" if report.too_long else ""
        context.progress.note(f"{name}: {split}: {report}{limit}")
    return store


def _read_examples(context: Context, split: str, bar: Any, total: int, check_every: int) -> Iterator[Example]:
    """The first rows; progress is shown and a request to stop checked after every ``check_every``."""
    from mlx_distill.data.rows import from_row

    count = 0
    for count, row in enumerate(islice(read_rows(context, split), total), 1):
        yield from_row(row)
        if count % check_every == 0:
            check_stop(context)
            bar.update(count)
    bar.update(count)
