"""A tokenizer's ids against a model's tables.

The two sizes rarely agree. Heads are padded to a multiple of 64 or more columns, so some columns have no
token; and a tokenizer may have tokens that were added without a row in the embedding. A lookup beyond a table
is no error on any backend of MLX: it reads the memory behind the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Integer

from mlx_distill.errors import ModelError
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_bytes import backend_of
from mlx_distill.models.forward import logits

_known: WeakKeyDictionary[Any, tuple[int, np.ndarray]] = WeakKeyDictionary()


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
    ids = _ids(tokenizer, get_vocab)
    out = np.zeros(int(ids.max()) + 1 if width is None else width, dtype=bool)
    out[ids[ids < len(out)]] = True
    return out


def _ids(tokenizer: Any, get_vocab: Callable[[], Mapping[str, int]]) -> np.ndarray:
    """The ids of a vocabulary. To list 200,000 tokens takes a third of a second: they are kept as long as the
    tokenizer exists and has as many.
    """
    try:
        count = backend_of(tokenizer).get_vocab_size()
    except ModelError:
        return np.fromiter(get_vocab().values(), dtype=np.int64)
    if tokenizer not in _known or _known[tokenizer][0] != count:
        _known[tokenizer] = count, np.fromiter(get_vocab().values(), dtype=np.int64)
    return _known[tokenizer][1]


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
    raise beyond_table(
        getattr(tokenizer, "name_or_path", None), token, convert(token) if callable(convert) else None, rows
    )


def beyond_table(folder: Any, token: int, text: str | None, rows: int) -> ModelError:
    """The error of a token id that a table of ``rows`` rows has no row for.

    Args:
        folder: Of the tokenizer, where it is known.
        token: The id.
        text: Of the token, where it is known.
        rows: Of the table.
    """
    where = f"{folder}: " if folder else ""
    return ModelError(
        f"{where}the tokenizer has number {token}{f' ({text!r})' if text else ''}, the embedding {rows} rows",
        fix=f"resize it to {token + 1} rows or more (transformers: resize_token_embeddings), or use the "
        "tokenizer and the chat template that it was trained with",
    )
