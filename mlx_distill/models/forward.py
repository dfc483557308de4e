"""The interface of every engine to a model: hidden states, output head, and caches for packed sequences.

Packed sequences are several rows in one sequence of a batch that do not attend to each other. mlx-lm's models
ask the cache that they are given for the attention mask (``make_mask``), the position of the first token
(``offset``) and keys and values (``update_and_fetch``); :class:`SegmentCache` returns a block-diagonal mask,
0, and the keys and values of this call, so no model class is changed.

Positions run on through a packed sequence and do not restart with each row, since mlx-lm's rope takes one
offset for each sequence. Attention with rope depends on differences of positions alone (also with YaRN, whose
frequencies and factor do not depend on the position), so a row gets the same result as alone, up to rounding:
angles are float32, with an absolute error of about p / 2^24 at p radians. No sequence is longer than
``max_length``, so no position is larger than in a row of that length.

Scores are computed for whole sequences and then masked, so attention costs as much as for one long row.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int

from mlx_distill.errors import ModelError
from mlx_distill.losses.output_head import project
from mlx_distill.models.architectures.registry import architecture_of_model, module_names
from mlx_distill.models.checkpoint.layout import final_logit_softcapping


class Segments:
    """The attention masks of a batch of packed sequences, shared by the caches of all layers.

    Args:
        ids: ``[b, l]`` the row that each token belongs to. Padding has an id of its own and attends to
            itself, so that no softmax is empty.
    """

    def __init__(self, ids: Int[mx.array, "b l"]) -> None:
        self.ids = ids
        self._masks: dict[int | None, mx.array] = {}

    def mask(self, window: int | None = None) -> Bool[mx.array, "b 1 l l"]:
        """``mask[i, 0, q, k]``: the same row, ``k <= q``, and ``q - k < window``; computed once per window.

        >>> Segments(mx.array([[1, 1, 2]])).mask()[0, 0].astype(mx.int32).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
        """
        if window not in self._masks:
            positions = mx.arange(self.ids.shape[1])
            distance = positions[:, None] - positions[None]
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            self._masks[window] = ((self.ids[:, :, None] == self.ids[:, None]) & visible)[:, None]
        return self._masks[window]


class SegmentCache:
    """The cache of one layer for a single forward pass over packed sequences; it stores nothing.

    ``window`` is the size of the layer's sliding window in tokens; None for full attention.
    """

    offset = 0

    def __init__(self, segments: Segments, window: int | None = None) -> None:
        self.segments, self.window = segments, window

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> Bool[mx.array, "b 1 l l"]:
        """:meth:`Segments.mask` with the smaller of the two windows."""
        return self.segments.mask(min(filter(None, (window_size, self.window)), default=None))

    def update_and_fetch(
        self, keys: Float[mx.array, "b h l d"], values: Float[mx.array, "b h l e"]
    ) -> tuple[Float[mx.array, "b h l d"], Float[mx.array, "b h l e"]]:
        """Keys and values of this call."""
        return keys, values


def segment_caches(model: Any, ids: Int[mx.array, "b l"]) -> list[SegmentCache]:
    """One cache for each layer, for :func:`hidden_states` of packed sequences.

    Args:
        model: mlx-lm's.
        ids: As for :class:`Segments`.

    Raises:
        ModelError: a layer has a recurrent state, which no mask can separate.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    for cache in caches:
        if type(cache) is not KVCache and (type(cache) is not RotatingKVCache or cache.keep):
            raise ModelError(
                f"a model with a {type(cache).__name__} cannot compute packed sequences",
                fix="packing: false",
            )
    segments = Segments(ids)
    return [SegmentCache(segments, getattr(cache, "max_size", None)) for cache in caches]


def get_module(model: Any, path: str) -> Any:
    """The module of a model at a dotted path; None if there is none."""
    for name in path.split("."):
        if model is None or name not in model:
            return None
        model = model[name]
    return model


def hidden_states(model: Any, inputs: Int[mx.array, "b l"], cache: Any = None) -> Float[mx.array, "b l d"]:
    """The hidden states after the final norm; ``logits(model, hidden_states(model, x))`` are logits."""
    return get_module(model, module_names(model).trunk)(inputs, cache)


def head(model: Any) -> Any:
    """The output head: a linear layer, or the embedding that it is tied to."""
    names = module_names(model)
    return get_module(model, names.embedding if is_tied(model) else names.head)


def head_columns(model: Any) -> int:
    """The width of a model's logits, also of a head with an adapter; 0 for other modules, where it is
    unknown.
    """
    return _rows(head(model))


def embedding_rows(model: Any) -> int:
    """The rows of the embedding, also of one with an adapter: the token ids that a model can read are below
    this number. 0 where it is unknown.
    """
    return _rows(get_module(model, module_names(model).embedding)) if isinstance(model, nn.Module) else 0


def _rows(layer: Any) -> int:
    base = layer.get("linear", layer.get("embedding", layer)) if layer is not None else None
    return int(base.weight.shape[0]) if base is not None and "weight" in base else 0


def is_tied(model: Any) -> bool:
    """Whether the output head is the embedding."""
    return get_module(model, module_names(model).head) is None


def hidden_size(model: Any) -> int:
    """The width of a hidden state."""
    embedding = get_module(model, module_names(model).embedding)
    return int(embedding.dims if hasattr(embedding, "dims") else embedding.weight.shape[-1])


def compute_dtype(model: Any) -> mx.Dtype:
    """The type in which a model computes: that of its final norm, which is never quantized."""
    dtype: mx.Dtype = get_module(model, module_names(model).final_norm).weight.dtype
    return dtype


def softcap(model: Any) -> float | None:
    """``c`` of a model whose logits are ``c * tanh(z / c)`` (Gemma 2); None for plain logits."""
    architecture = architecture_of_model(model)
    return architecture.logit_softcap(model) if architecture else final_logit_softcapping(model)


def logits(model: Any, hidden: Float[mx.array, "*b d"]) -> Float[mx.array, "*b v"]:
    """Float32 logits over the columns of the head, with the soft-capping of the model."""
    return project(head(model), hidden, softcap(model)).astype(mx.float32)
