"""A key-value cache for a batch of prompts of different lengths that are answered together.

Prompts are padded on the *right*, so a prompt's own columns are computed exactly as they would be alone: the
causal mask hides the padding, and no row of the attention is ever empty. Generated tokens of all rows share
one column each, behind the widest prompt::

    columns   0 1 2 3 4 | 5 6 ...
    row 0     a b c d e | u v        length 5: the u stands at position 5
    row 1     a b c . . | u v        length 3: the u stands at position 3; columns 3 and 4 are hidden

Every layer keeps all columns and nothing rotates: prompts here are short. Layers with a sliding window read
only the columns that some row may still see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float

GROWTH = 64  # columns added at a time


class Layout:
    """Which column holds which position, shared by the caches of all layers.

    ``lengths [b]`` are the prompts' lengths, ``width`` the columns that prompts may take, ``filled`` the
    columns taken so far.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.width = int(self.lengths.max())
        self.filled = 0
        self._lengths = mx.array(self.lengths)
        self.offset: int | mx.array = 0 if self.width else self._lengths

    def advance(self, columns: int) -> None:
        """Take ``columns`` more; call it after every forward pass."""
        self.filled += columns
        self.offset = self.filled if self.filled < self.width else self._lengths + (self.filled - self.width)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.lengths = self.lengths[list(rows)]
        self._lengths = mx.array(self.lengths)
        if not isinstance(self.offset, int):
            self.offset = self._lengths + (self.filled - self.width)

    def first(self, window: int | None) -> int:
        """The first column that some row's next token sees through ``window``."""
        if window is None or self.filled < self.width:
            return 0
        position = self.lengths + (self.filled - self.width + 1 - window)
        column = np.where(position < self.lengths, position, position + self.width - self.lengths)
        return max(0, int(column.min()))

    def mask(
        self, columns: int, window: int | None, first: int, as_array: bool
    ) -> Bool[mx.array, ...] | str | None:
        """What the next ``columns`` queries see of the columns from ``first`` on; ``window`` counts the
        query's own position in.
        """
        if self.filled < self.width:
            return self._prompt_mask(columns, window, as_array)
        if columns != 1:
            raise ValueError("generated tokens come one at a time")
        current = self.lengths + (self.filled - self.width)
        level = bool((self.lengths == self.width).all())
        if not as_array and level and (window is None or int(current[0]) - window < first):
            return None
        column = np.arange(first, self.filled + 1)[None]
        tail = column >= self.width
        seen = (column < self.lengths[:, None]) | tail
        if window is not None:
            position = np.where(tail, self.lengths[:, None] + column - self.width, column)
            seen &= current[:, None] - position < window
        return mx.array(seen[:, None, None, :])

    def _prompt_mask(self, columns: int, window: int | None, as_array: bool) -> Bool[mx.array, "q k"] | str:
        end = self.filled + columns
        if self.filled == 0 and not as_array and (window is None or end <= window):
            return "causal"
        query, key = np.arange(self.filled, end)[:, None], np.arange(end)[None]
        seen = key <= query
        if window is not None:
            seen &= query - key < window
        return mx.array(seen)


class ColumnCache:
    """One layer's keys and values; speaks the protocol of mlx-lm's caches (``offset``, ``make_mask``,
    ``update_and_fetch``).

    ``window`` is the layer's sliding window in tokens, None where it sees everything.
    """

    def __init__(self, layout: Layout, window: int | None = None) -> None:
        self.layout = layout
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> Any:
        """Position of the next token: one number while the prompts are read, one a row afterwards."""
        return self.layout.offset

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        """See :meth:`Layout.mask`."""
        window = min(filter(None, (window_size, self.window)), default=None)
        return self.layout.mask(N, window, self.layout.first(self.window), return_array)

    def update_and_fetch(
        self, keys: Float[mx.array, "b h l d"], values: Float[mx.array, "b h l e"]
    ) -> tuple[Float[mx.array, "b h c d"], Float[mx.array, "b h c e"]]:
        """Store the next columns and return those that the mask speaks of."""
        start = self.layout.filled
        end = start + keys.shape[2]
        old_keys, old_values = self.keys, self.values
        if old_keys is None or old_values is None or end > old_keys.shape[2]:
            room = max(end, self.layout.width) + GROWTH
            old_keys, old_values = _grow(old_keys, keys, start, room), _grow(old_values, values, start, room)
        old_keys[..., start:end, :] = keys
        old_values[..., start:end, :] = values
        self.keys, self.values = old_keys, old_values
        first = self.layout.first(self.window)
        return old_keys[..., first:end, :], old_values[..., first:end, :]

    def keep(self, rows: mx.array) -> None:
        """Go on with these rows alone."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def _grow(old: mx.array | None, like: mx.array, filled: int, room: int) -> mx.array:
    b, h, _, d = like.shape
    if old is None:
        return mx.zeros((b, h, room, d), like.dtype)
    return mx.concatenate([old[..., :filled, :], mx.zeros((b, h, room - filled, d), like.dtype)], axis=2)


def can_column(model: Any) -> bool:
    """Whether every layer's own cache is plain keys and values, so that a :class:`ColumnCache` can stand in
    for it.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    return all(
        type(c) is KVCache or (type(c) is RotatingKVCache and not c.keep) for c in make_prompt_cache(model)
    )


def column_caches(model: Any, layout: Layout) -> list[ColumnCache]:
    """One cache a layer, with the window that the model's own cache for that layer has."""
    from mlx_lm.models.cache import make_prompt_cache

    return [ColumnCache(layout, getattr(c, "max_size", None)) for c in make_prompt_cache(model)]
