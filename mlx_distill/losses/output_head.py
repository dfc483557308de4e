"""The output head: the projection from hidden states to logits, read a tile of columns at a time.

It may be dense or quantized, a layer of its own or the tied embedding, with or without soft-capped logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.errors import ModelError

_PLAIN = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class HeadTile:
    """Some columns of a head in float32: ``weight [c, d]``, ``bias [c]`` (0 without one), the soft cap."""

    weight: mx.array
    bias: mx.array | float
    softcap: float | None

    def logits(self, hidden: Float[mx.array, "n d"]) -> Float[mx.array, "n c"]:
        """The logits of these columns."""
        z = hidden @ self.weight.T + self.bias
        return z if self.softcap is None else soft_capped(z, self.softcap)

    def gradient(
        self, by_logit: Float[mx.array, "n c"], logits: Float[mx.array, "n c"]
    ) -> Float[mx.array, "n d"]:
        """The gradient by the hidden state, from that by the logits and the logits themselves."""
        return by_uncapped(by_logit, logits, self.softcap) @ self.weight


@dataclass(frozen=True)
class HeadWeight:
    """The ``[v, d]`` weight of a head, dense or quantized (``scales`` is None for a dense one).

    With a ``softcap`` c the logits are ``c * tanh(z / c)`` of the projection z.
    """

    weight: mx.array
    bias: mx.array | None = None
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"
    softcap: float | None = None

    @property
    def columns(self) -> int:
        """Width of the vocabulary, padding included."""
        return self.weight.shape[0]

    @property
    def hidden(self) -> int:
        """Width of the hidden state."""
        return self.weight.shape[1] if self.scales is None else self.weight.shape[1] * 32 // self.bits

    def over(self, temperature: float) -> HeadWeight:
        """The head that gives logits divided by T for hidden states divided by T."""
        if temperature == 1:
            return self
        return replace(
            self,
            bias=None if self.bias is None else self.bias.astype(mx.float32) / temperature,
            softcap=None if self.softcap is None else self.softcap / temperature,
        )

    def tile(self, start: int, stop: int) -> HeadTile:
        """Columns ``start`` to ``stop``."""
        bias = 0.0 if self.bias is None else self.bias[start:stop].astype(mx.float32)
        return HeadTile(self._dense(slice(start, stop)), bias, self.softcap)

    def rows(self, ids: Int[mx.array, " n"]) -> Float[mx.array, "n d"]:
        """The rows of the weight that belong to the given tokens, in float32."""
        return self._dense(ids)

    def _dense(self, index: slice | mx.array) -> mx.array:
        w = self.weight[index]
        if self.scales is not None:
            biases = None if self.biases is None else self.biases[index]
            # mxfp4 comes back as bfloat16, affine in the type of its scales.
            w = mx.dequantize(
                w, self.scales[index], biases, group_size=self.group_size, bits=self.bits, mode=self.mode
            )
        return w.astype(mx.float32)


Head: TypeAlias = mx.array | nn.Module | HeadWeight


def head_weight(head: Head, softcap: float | None = None) -> HeadWeight:
    """Read the arrays of a head.

    Args:
        head: An array ``[v, d]``, ``nn.Linear``, ``nn.Embedding`` (tied), their quantized forms, or a
            ``HeadWeight``, which is returned as it is.
        softcap: c, where the logits are ``c * tanh(z / c)``.

    Raises:
        ModelError: Anything else, such as a head with adapters on it.

    >>> head_weight(nn.Embedding(7, 4)).columns
    7
    """
    if isinstance(head, HeadWeight):
        return head
    if isinstance(head, mx.array):
        if head.ndim != 2:
            raise ModelError(f"a head of shape {head.shape}", fix="give the weight as [vocabulary, hidden]")
        return HeadWeight(head, softcap=softcap)
    if isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return HeadWeight(
            head.weight,
            bias=head.get("bias"),
            scales=head.scales,
            biases=head.get("biases"),
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
            softcap=softcap,
        )
    if isinstance(head, nn.Linear | nn.Embedding):
        return HeadWeight(head.weight, bias=head.get("bias"), softcap=softcap)
    raise ModelError(
        f"a {type(head).__name__} cannot be read as an output projection",
        fix=(
            "give the [vocabulary, hidden] array, or an nn.Linear, nn.Embedding or their quantized form; "
            "fuse adapters on the head first"
        ),
    )


def is_constant(head: Head) -> bool:
    """Whether a head can be read in tiles: arrays, or a plain layer without trainable parameters."""
    if isinstance(head, nn.Module):
        return isinstance(head, _PLAIN) and not tree_flatten(head.trainable_parameters())
    return True


def project(
    head: Any, hidden: Float[mx.array, "*b d"], softcap: float | None = None
) -> Float[mx.array, "*b v"]:
    """Logits over the head's columns (which may be more than the tokenizer's tokens).

    Args:
        head: An ``nn.Linear``, or the embedding that it is tied to.
        hidden: Hidden states after the final norm.
        softcap: c, where the logits are ``c * tanh(z / c)``.
    """
    z = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
    return z if softcap is None else soft_capped(z, softcap)


def soft_capped(z: Float[mx.array, "*b v"], cap: float) -> Float[mx.array, "*b v"]:
    """Logits bounded to (-cap, cap): ``cap * tanh(z / cap)``. Source: Gemma Team 2024 (Gemma 2),
    https://arxiv.org/abs/2408.00118.

    >>> soft_capped(mx.array([0.0, 1e9]), 30.0).tolist()
    [0.0, 30.0]
    """
    return cap * mx.tanh(z / cap)


def by_uncapped(
    by_logit: Float[mx.array, "*b v"], logits: Float[mx.array, "*b v"], cap: float | None
) -> Float[mx.array, "*b v"]:
    """The gradient by z, from that by ``y = cap * tanh(z / cap)`` and y: times ``1 - (y / cap)²``."""
    return by_logit if cap is None else by_logit * (1 - mx.square(logits / cap))
