"""A key-value cache for a batch of prompts of different lengths that are answered together.

Prompts are padded on the *right*, so a prompt's own columns are computed exactly as they would be alone: the
causal mask hides the padding, and no row of the attention is ever empty. Generated tokens of all rows share
one column each, behind the widest prompt::

    columns   0 1 2 3 4 | 5 6 ...
    row 0     a b c d e | u v        length 5: u has position 5
    row 1     a b c . . | u v        length 3: u has position 3; columns 3 and 4 are masked

Every layer keeps all columns, without rotation: prompts are short. Layers with a sliding window read only the
columns that some row can still attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float


class ColumnLayout:
    """Which column holds which position, shared by the caches of all layers.

    ``lengths [b]`` are the prompts' lengths, ``width`` the columns of the prompts, ``filled`` the columns
    written so far. Columns of a prompt beyond its length are not attended to, whatever they hold.

    Args:
        lengths: Of the prompts.
        width: At least the longest of them, and that where None.
    """

    def __init__(self, lengths: Sequence[int], width: int | None = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.width = int(self.lengths.max()) if width is None else width
        self.filled = 0
        self._lengths = mx.array(self.lengths)
        self.offset: int | mx.array = 0 if self.width else self._lengths

    def advance(self, columns: int) -> None:
        """Count ``columns`` as written; call it after every forward pass."""
        self.filled += columns
        self.offset = self.filled if self.filled < self.width else self._lengths + (self.filled - self.width)

    def rewind(self, columns: int) -> None:
        """Forget the last columns: the next ones overwrite them."""
        self.advance(-columns)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        self.lengths = self.lengths[list(rows)]
        self._lengths = mx.array(self.lengths)
        if not isinstance(self.offset, int):
            self.offset = self._lengths + (self.filled - self.width)

    def first(self, window: int | None) -> int:
        """The first column that some row's next token attends to with a sliding ``window``."""
        if window is None or self.filled < self.width:
            return 0
        position = self.lengths + (self.filled - self.width + 1 - window)
        column = np.where(position < self.lengths, position, position + self.width - self.lengths)
        return max(0, int(column.min()))

    def mask(
        self, columns: int, window: int | None, first: int, as_array: bool
    ) -> Bool[mx.array, ...] | str | None:
        """The attention mask of the next ``columns`` queries over the columns from ``first`` on; ``window``
        includes the query's own position.
        """
        if self.filled < self.width:
            return self._prompt_mask(columns, window, as_array)
        if columns != 1:
            raise ValueError("generated tokens come one at a time")
        current = self.lengths + (self.filled - self.width)
        equal_lengths = bool((self.lengths == self.width).all())
        if not as_array and equal_lengths and (window is None or int(current[0]) - window < first):
            return None
        column = np.arange(first, self.filled + 1)[None]
        generated = column >= self.width
        visible = (column < self.lengths[:, None]) | generated
        if window is not None:
            position = np.where(generated, self.lengths[:, None] + column - self.width, column)
            visible &= current[:, None] - position < window
        return mx.array(visible[:, None, None, :])

    def _prompt_mask(self, columns: int, window: int | None, as_array: bool) -> Bool[mx.array, "q k"] | str:
        end = self.filled + columns
        if self.filled == 0 and not as_array and (window is None or end <= window):
            return "causal"
        query, key = np.arange(self.filled, end)[:, None], np.arange(end)[None]
        visible = key <= query
        if window is not None:
            visible &= query - key < window
        return mx.array(visible)


class ColumnCache:
    """One layer's keys and values, with the interface of mlx-lm's caches (``offset``, ``make_mask``,
    ``update_and_fetch``).

    Args:
        layout: Of all layers.
        window: The layer's sliding window in tokens, None for full attention.
        growth: Columns that are allocated at a time.
    """

    def __init__(self, layout: ColumnLayout, window: int | None = None, growth: int = 64) -> None:
        self.layout = layout
        self.window = window
        self.growth = growth
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> Any:
        """Position of the next token: one number while the prompts are processed, then one a row."""
        return self.layout.offset

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        """See :meth:`ColumnLayout.mask`."""
        window = min(filter(None, (window_size, self.window)), default=None)
        return self.layout.mask(N, window, self.layout.first(self.window), return_array)

    def update_and_fetch(
        self, keys: Float[mx.array, "b h l d"], values: Float[mx.array, "b h l e"]
    ) -> tuple[Float[mx.array, "b h c d"], Float[mx.array, "b h c e"]]:
        """Store the next columns and return those that :meth:`make_mask` covers."""
        start = self.layout.filled
        end = start + keys.shape[2]
        old_keys, old_values = self.keys, self.values
        if old_keys is None or old_values is None or end > old_keys.shape[2]:
            columns = max(end, self.layout.width) + self.growth
            old_keys = _grow(old_keys, keys, start, columns)
            old_values = _grow(old_values, values, start, columns)
        old_keys[..., start:end, :] = keys
        old_values[..., start:end, :] = values
        self.keys, self.values = old_keys, old_values
        first = self.layout.first(self.window)
        return old_keys[..., first:end, :], old_values[..., first:end, :]

    def keep(self, rows: mx.array) -> None:
        """Keep only these rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def _grow(old: mx.array | None, like: mx.array, filled: int, columns: int) -> mx.array:
    """A larger buffer with the filled columns of the old one."""
    b, h, _, d = like.shape
    if old is None:
        return mx.zeros((b, h, columns, d), like.dtype)
    return mx.concatenate([old[..., :filled, :], mx.zeros((b, h, columns - filled, d), like.dtype)], axis=2)


def supports_column_cache(model: Any) -> bool:
    """Whether every layer's own cache is plain keys and values, so that a :class:`ColumnCache` can replace
    it.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    return all(
        type(c) is KVCache or (type(c) is RotatingKVCache and not c.keep) for c in make_prompt_cache(model)
    )


def column_caches(model: Any, layout: ColumnLayout, growth: int = 64) -> list[ColumnCache]:
    """One cache a layer, with the sliding window of the model's own cache for that layer."""
    from mlx_lm.models.cache import make_prompt_cache

    return [ColumnCache(layout, getattr(c, "max_size", None), growth) for c in make_prompt_cache(model)]
