"""Several rows in one line of a batch, none seeing another, without changing a model class.

mlx-lm's models ask the cache object that they are given for the attention mask (``make_mask``), for the place
of the first token (``offset``) and for the keys and values (``update_and_fetch``). A :class:`SegmentCache`
answers with a mask of blocks, 0, and what it was handed.

Positions run on through a line instead of restarting with each row: mlx-lm's rope takes one offset a line.
Attention through rope depends on differences of positions alone, YaRN's included (its frequencies and its
factor do not depend on the place), so a row gets what it would get alone, up to rounding: angles are float32,
and one of p radians is known to p / 2^24. Since no line is longer than ``max_length``, no position occurs
that a single row of the longest length would not have.

Scores are made over whole lines and masked, so attention costs every token what it costs the longest row.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Bool, Float, Int

from mlx_distill.errors import ModelError
from mlx_distill.losses.output_head import project


class Segments:
    """Who may see whom in a batch of packed lines, shared by the caches of all layers.

    Args:
        ids: ``[b, l]`` the number of the row that each token belongs to; padding has a number of its own and
            sees itself, so that no line of the softmax is empty.
    """

    def __init__(self, ids: Int[mx.array, "b l"]) -> None:
        self.ids = ids
        self._masks: dict[int | None, mx.array] = {}

    def mask(self, window: int | None = None) -> Bool[mx.array, "b 1 l l"]:
        """``mask[i, 0, q, k]``: the same row, ``k <= q``, and ``q - k < window``; made once for each window.

        >>> Segments(mx.array([[1, 1, 2]])).mask()[0, 0].astype(mx.int32).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
        """
        if window not in self._masks:
            place = mx.arange(self.ids.shape[1])
            distance = place[:, None] - place[None]
            near = distance >= 0
            if window is not None:
                near &= distance < window
            self._masks[window] = ((self.ids[:, :, None] == self.ids[:, None]) & near)[:, None]
        return self._masks[window]


class SegmentCache:
    """One layer's stand-in for mlx-lm's cache in a single pass over packed lines; it keeps nothing.

    ``window`` is the layer's sliding window in tokens, None where it sees everything.
    """

    offset = 0

    def __init__(self, segments: Segments, window: int | None = None) -> None:
        self.segments, self.window = segments, window

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> Bool[mx.array, "b 1 l l"]:
        """See :meth:`Segments.mask`; of two windows the smaller."""
        return self.segments.mask(min(filter(None, (window_size, self.window)), default=None))

    def update_and_fetch(
        self, keys: Float[mx.array, "b h l d"], values: Float[mx.array, "b h l e"]
    ) -> tuple[Float[mx.array, "b h l d"], Float[mx.array, "b h l e"]]:
        """What it was handed."""
        return keys, values


def segment_caches(model: Any, ids: Int[mx.array, "b l"]) -> list[SegmentCache]:
    """One cache a layer for :func:`~mlx_distill.models.forward.hidden_states` over packed lines.

    Args:
        model: mlx-lm's.
        ids: As for :class:`Segments`.

    Raises:
        ModelError: a layer carries a state from token to token, which no mask can cut.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    for cache in caches:
        if type(cache) is not KVCache and (type(cache) is not RotatingKVCache or cache.keep):
            raise ModelError(
                f"a model with a {type(cache).__name__} cannot read several rows in one line",
                fix="packing: false",
            )
    segments = Segments(ids)
    return [SegmentCache(segments, getattr(cache, "max_size", None)) for cache in caches]


def hidden_states(model: Any, inputs: Int[mx.array, "b l"], cache: Any = None) -> Float[mx.array, "b l d"]:
    """The trunk: embeddings to the final norm. ``logits(model, hidden_states(model, x))`` are the logits."""
    return model.model(inputs, cache)


def head(model: Any) -> Any:
    """The head: the linear layer, or the embedding that it is tied to."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def softcap(model: Any) -> float | None:
    """The cap c of a model whose logits are ``c * tanh(z / c)`` (Gemma 2), None for plain logits."""
    return getattr(model, "final_logit_softcapping", None)


def logits(model: Any, hidden: Float[mx.array, "*b d"]) -> Float[mx.array, "*b v"]:
    """Float32 logits over the head's columns, soft-capped where the model does so."""
    return project(head(model), hidden, softcap(model)).astype(mx.float32)
