"""Keys and values of several rows in 4 or 8 bits, for models whose caches are plain."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Bool, Float
from mlx.utils import tree_map

from mlx_distill.errors import ConfigError
from mlx_distill.infer.kv_cache import Caches, row_cache

# Codes, scales and biases of mx.quantize, each [b, h, columns, _].
Quantized = tuple[mx.array, mx.array, mx.array]


def check_quantizable(model: Any, bits: int, group_size: int) -> None:
    """Refuse a model whose keys and values cannot be quantized.

    Raises:
        ConfigError: the layers have sliding windows, sinks or states, or their width is no multiple of the
            group size.
    """
    from mlx_lm.models.cache import KVCache

    fix = "leave out kv_bits"
    if bits not in (4, 8) or group_size not in (32, 64, 128):
        raise ConfigError(
            f"kv_bits {bits}, kv_group_size {group_size}", fix="4 or 8 bits in groups of 32, 64 or 128"
        )
    others = sorted({type(cache).__name__ for cache in row_cache(model) if type(cache) is not KVCache})
    if others:
        raise ConfigError(f"kv_bits {bits}: a layer's {others[0]} cannot be quantized", fix=fix)
    modules = dict(model.named_modules()) if hasattr(model, "named_modules") else {}
    if any("sinks" in module for module in modules.values() if hasattr(module, "keys")):
        raise ConfigError(f"kv_bits {bits}: attention with sinks cannot read quantized keys", fix=fix)
    widths = _head_widths(model)
    if any(width % group_size for width in widths):
        raise ConfigError(
            f"kv_bits {bits}: keys of width {max(widths)} are no multiple of kv_group_size {group_size}",
            fix="a smaller kv_group_size (32), or no kv_bits",
        )


def _head_widths(model: Any) -> set[int]:
    """The widths of a model's keys and values, from one token."""
    caches = row_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)  # never computed
    return {int(array.shape[-1]) for cache in caches for array in (cache.keys, cache.values)}


def quantize(caches: Caches, bits: int, group_size: int) -> Caches:
    """A batch cache of plain keys and values, quantized."""
    return [BatchQuantizedCache(cache, bits, group_size) for cache in caches]


class BatchQuantizedCache:
    """mlx-lm's ``BatchKVCache``, quantized. mlx-lm's attention reads ``bits`` and ``group_size``.

    Args:
        plain: A ``BatchKVCache`` with the prompts of its rows; its values are quantized once.
        bits: Of a code.
        group_size: Values that share a scale and a bias.
    """

    step = 256

    def __init__(self, plain: Any, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self.offset, self.left_padding, self._columns = plain.offset, plain.left_padding, plain.size()
        self.keys: Quantized | None = None
        self.values: Quantized | None = None
        if plain.keys is not None:
            self.keys, self.values = (self._quantized(array) for array in plain.keys_and_values())

    def _quantized(self, array: Float[mx.array, "b h l d"]) -> Quantized:
        codes, scales, biases = mx.quantize(array, group_size=self.group_size, bits=self.bits)
        return codes, scales, biases

    def make_mask(self, N: int, return_array: bool = False, **options: Any) -> Bool[mx.array, "b 1 n c"]:
        """As ``BatchKVCache.make_mask``."""
        from mlx_lm.models.base import create_causal_mask

        mask: mx.array = create_causal_mask(
            N, offset=self._columns, left_padding=self.left_padding, **options
        )
        return mask

    def update_and_fetch(
        self, keys: Float[mx.array, "b h l d"], values: Float[mx.array, "b h l e"]
    ) -> tuple[Quantized, Quantized]:
        """Store the next columns, and return all."""
        start, end = self._columns, self._columns + keys.shape[2]
        both = (self._quantized(keys), self._quantized(values))
        if self.keys is None or self.values is None:
            old, room = tree_map(lambda new: new[..., :0, :], both), end
        else:
            old, room = (self.keys, self.values), end - self.keys[0].shape[2]
        if room > 0:
            room = -(-room // self.step) * self.step
            old = tree_map(lambda x: _longer(x[..., :start, :], room), old)
        for part, new in zip((*old[0], *old[1]), (*both[0], *both[1]), strict=True):
            part[..., start:end, :] = new
        stored: tuple[Quantized, Quantized] = old
        self.keys, self.values = stored
        self._columns, self.offset = end, self.offset + keys.shape[2]
        out: tuple[Quantized, Quantized] = tree_map(lambda x: x[..., :end, :], stored)
        return out

    def filter(self, rows: mx.array) -> None:
        """Keep only these rows."""
        self.offset, self.left_padding = self.offset[rows], self.left_padding[rows]
        if self.keys is not None:
            self.keys, self.values = tree_map(lambda x: x[rows], (self.keys, self.values))

    def extend(self, other: BatchQuantizedCache) -> None:
        """Add the rows of another cache."""
        columns = max(self._columns, other._columns)
        like = (self.keys, self.values) if self.keys is not None else (other.keys, other.values)
        if like[0] is not None:
            parts = [cache._right_aligned(columns, like) for cache in (self, other)]
            self.keys, self.values = tree_map(lambda a, b: mx.concatenate([a, b]), *parts)
        self.left_padding = mx.concatenate(
            [cache.left_padding + (columns - cache._columns) for cache in (self, other)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        self._columns = columns

    def _right_aligned(self, columns: int, like: Any) -> Any:
        left = columns - self._columns
        rows = self.offset.shape[0]
        if self.keys is None:
            return tree_map(lambda x: mx.zeros((rows, x.shape[1], columns, x.shape[3]), x.dtype), like)
        return tree_map(
            lambda x: mx.pad(x[..., : self._columns, :], [(0, 0), (0, 0), (left, 0), (0, 0)]),
            (self.keys, self.values),
        )

    @property
    def state(self) -> Any:
        """The arrays, to compute them."""
        return self.keys, self.values, self.offset, self.left_padding

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        parts = (*(self.keys or ()), *(self.values or ()))
        return sum(part.nbytes for part in parts)


def _longer(array: mx.array, columns: int) -> mx.array:
    """With more columns, of zeros."""
    b, h, _, d = array.shape
    return mx.concatenate([array, mx.zeros((b, h, columns, d), array.dtype)], axis=2)
