"""A tokenizer's ids against a model's tables.

The two sizes rarely agree. Heads are padded to a multiple of 64 or more columns, so some columns have no
token; and a tokenizer may have tokens that were added without a row in the embedding. A lookup beyond a table
is no error on any backend of MLX: it reads the memory behind the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Integer

from mlx_distill.errors import ModelError
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.models.forward import logits


def used_ids(tokenizer: Any, width: int | None = None) -> Bool[np.ndarray, " v"] | None:
    """For each id, whether the tokenizer has a token of it.

    Args:
        tokenizer: With ``get_vocab``.
        width: The number of ids, such as the columns of a head; up to the highest id where None.

    Returns:
        None for a tokenizer without ``get_vocab``.

    >>> class Toy:
    ...     def get_vocab(self): return {"a": 0, "b": 2}
    >>> used_ids(Toy(), 4).tolist()
    [True, False, True, False]
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    if not callable(get_vocab):
        return None
    ids = np.fromiter(get_vocab().values(), dtype=np.int64)
    out = np.zeros(int(ids.max()) + 1 if width is None else width, dtype=bool)
    out[ids[ids < len(out)]] = True
    return out


def token_logits(
    model: Any, hidden: Float[mx.array, "*b d"], used: Bool[mx.array, " v"] | None
) -> Float[mx.array, "*b v"]:
    """:func:`~mlx_distill.models.forward.logits` without the columns that have no token: padding of the head,
    whose logits no text has trained. Their probability is 0, so the others' sum to 1.

    Args:
        model: mlx-lm's.
        hidden: From :func:`~mlx_distill.models.forward.hidden_states`.
        used: From :func:`used_ids`; None keeps all columns.
    """
    z = logits(model, hidden)
    return z if used is None else mx.where(used, z, LOWEST)


def check_token_ids(
    ids: Collection[int] | Integer[np.ndarray, ...], rows: int, tokenizer: Any = None
) -> None:
    """Refuse token ids that a table has no row for.

    Args:
        ids: What the model is about to read, or to predict.
        rows: Of the table: :func:`~mlx_distill.models.forward.embedding_rows`; 0 checks nothing.
        tokenizer: Named in the error, with the text of the token.

    Raises:
        ModelError: an id beyond the table.
    """
    values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    if not rows or not values.size or int(values.max()) < rows:
        return
    token = int(values.max())
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    raise _beyond(
        getattr(tokenizer, "name_or_path", None), token, convert(token) if callable(convert) else None, rows
    )


def check_added_tokens(folder: Path, tokenizer: Any, rows: int | None) -> None:
    """Refuse a ``tokenizer.json`` whose added tokens are not read under their own numbers.

    ``tokenizers`` numbers added tokens that are not in the vocabulary one after the other, whatever the file
    says. Behind a gap a model would read other rows than those it was trained with.

    Args:
        folder: With the ``tokenizer.json``; nothing is checked without one.
        tokenizer: As loaded from it.
        rows: Of the model's embedding, where it is known.

    Raises:
        ModelError: with the token and both numbers.
    """
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    start = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    added = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    numbers = tokenizer.get_vocab() if added else {}
    for token in added:
        content, number = token["content"], token["id"]
        if number == numbers.get(content, number):
            continue
        if rows is not None and number >= rows:
            raise _beyond(folder, number, content, rows)
        raise ModelError(
            f"{path}: the added token {content!r} has number {number} and is read as {numbers[content]}",
            fix="number the added tokens one after the other, behind the vocabulary",
        )


def _beyond(folder: Any, token: int, text: str | None, rows: int) -> ModelError:
    where = f"{folder}: " if folder else ""
    return ModelError(
        f"{where}the tokenizer has number {token}{f' ({text!r})' if text else ''}, the embedding {rows} rows",
        fix=f"resize it to {token + 1} rows or more (transformers: resize_token_embeddings), or use the "
        "tokenizer and the chat template that it was trained with",
    )
