"""Key-value caches of several rows: mlx-lm's own, for every architecture that it has.

A *row cache* is what ``mlx_lm.models.cache.make_prompt_cache`` returns: one object a layer, for one row. A
*batch cache* is made of several by :func:`merge`: mlx-lm's ``BatchKVCache`` and its relatives, whose rows
have lengths of their own. While rows of different lengths are read, they are padded on the *right*, so that
each is computed as it would be alone; afterwards mlx-lm moves them to the right, so that all end in the last
column, and masks what is left of them.

A copy costs nothing until it is written to (:func:`fork`), so several continuations of one prefix are scored
by copies of its cache, in every architecture: nothing is ever removed from a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int, Integer

from mlx_distill.errors import ModelError
from mlx_distill.models.forward import hidden_states

Caches = list[Any]  # one object a layer


def row_cache(model: Any) -> Caches:
    """The model's own empty cache, for one row."""
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def merge(rows: Sequence[Caches]) -> Caches:
    """One batch cache of several row caches, which may hold different numbers of tokens, or none. The same
    row cache may stand there several times, such as that of a prefix that the rows share.

    Raises:
        ModelError: a layer's cache cannot be batched.
    """
    for layer in rows[0]:
        if not hasattr(layer, "merge"):
            raise ModelError(
                f"a model with a {type(layer).__name__} cannot read several rows at once",
                fix="take a model of another architecture",
            )
    return [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]


def split(caches: Caches, rows: Iterable[int]) -> list[Caches]:
    """The row caches of some rows of a batch cache that is not empty."""
    return [[layer.extract(row) for layer in caches] for row in rows]


def fork(caches: Caches) -> Caches:
    """A copy that shares its arrays until one of the two is written to.

    ``cache.keys[..., a:b, :] = x`` changes the Python object ``cache.keys``, not the memory behind it; so a
    copy needs array objects of its own, and no more.
    """
    return copy.deepcopy(caches)


def select(caches: Caches, rows: Sequence[int]) -> Caches:
    """A copy of some rows of a batch cache."""
    out = fork(caches)
    keep = mx.array(list(rows))
    for layer in out:
        layer.filter(keep)
    return out


def pad_right(rows: Sequence[Sequence[int]], multiple: int = 1) -> Int[np.ndarray, "b l"]:
    """Rows of tokens as one array, padded with zeros to the longest, or to the next multiple.

    >>> pad_right([[1, 2, 3], [4]], 2).tolist()
    [[1, 2, 3, 0], [4, 0, 0, 0]]
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    out = np.zeros((len(rows), width), dtype=np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def forward(
    call: Callable[..., mx.array], caches: Caches, inputs: Int[np.ndarray, "b l"], lengths: Sequence[int]
) -> Float[mx.array, "b l _"]:
    """One pass over tokens that are added to a batch cache.

    Args:
        call: ``call(tokens [b, l], cache=caches)``, such as a model.
        caches: From :func:`merge`.
        inputs: Tokens, padded on the right (:func:`pad_right`).
        lengths: How many of them each row's cache keeps, 0 too. Where every layer's cache is plain
            (:func:`has_plain_caches`), what is not kept may be tokens that are read all the same.

    Returns:
        What ``call`` returned.
    """
    padding = [inputs.shape[1] - length for length in lengths]
    if any(padding):
        if (
            inputs.shape[1] == 1
        ):  # one column is decoding to mlx-lm's rotating cache, which then has no padding
            inputs, padding = np.pad(inputs, ((0, 0), (0, 1))), [n + 1 for n in padding]
        for layer in caches:
            layer.prepare(lengths=list(lengths), right_padding=padding)
    _before_several_tokens(caches)
    out = call(mx.array(inputs), cache=caches)
    if any(padding):
        for layer in caches:
            layer.finalize()
    return out


def read(
    model: Any, caches: Caches, tokens: Sequence[Sequence[int]], *, step_size: int = 1024
) -> Float[mx.array, "b d"]:
    """Add tokens to a batch cache, some columns a pass, and return the hidden states of the last ones.

    Args:
        model: An mlx-lm model.
        caches: From :func:`merge`.
        tokens: Of each row, none empty.
        step_size: Tokens of a row in one pass.
    """
    ends = np.array([len(row) for row in tokens])
    last: mx.array | None = None
    for start in range(0, int(ends.max()), step_size):
        part = [row[start : start + step_size] for row in tokens]
        hidden = forward(partial(hidden_states, model), caches, pad_right(part), [len(row) for row in part])
        place = np.clip(ends - start - 1, 0, hidden.shape[1] - 1)
        here = hidden[mx.arange(len(tokens)), mx.array(place)]
        last = here if last is None else mx.where(mx.array(ends > start)[:, None], here, last)
        mx.eval(last, [layer.state for layer in caches])
    assert last is not None
    return last


def continue_from(
    model: Any, caches: Caches, tokens: Integer[mx.array, "b l"]
) -> tuple[Float[mx.array, "b d"], Caches]:
    """The hidden states behind tokens that follow the rows of a batch cache, and a cache that has them too.
    The cache that is given stays as it is.

    Args:
        model: An mlx-lm model.
        caches: From :func:`merge`.
        tokens: As many for each row.
    """
    caches = fork(caches)
    if tokens.shape[1] > 1:
        _before_several_tokens(caches)
    return hidden_states(model, tokens, caches)[:, -1], caches


def _before_several_tokens(caches: Caches) -> None:
    """Mend mlx-lm 0.32.2: behind a sliding-window cache of several rows that was written to token by token
    until it went round, the mask of several tokens at once hides one token too many of a row that is shorter
    than the window. In order of time, the mask is right.
    """
    for layer in caches:
        for cache in getattr(layer, "caches", (layer,)):
            if getattr(cache, "rotated", False):
                cache._temporal_order()


def has_plain_caches(model: Any) -> bool:
    """Whether every layer keeps keys and values alone, which :func:`forward` can cut behind any token of a
    row after they were computed. A recurrent state cannot be cut.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    return all(type(c) is KVCache or (type(c) is RotatingKVCache and not c.keep) for c in row_cache(model))
