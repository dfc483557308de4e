"""The output projection of a model, read a tile at a time: dense or quantised, its own layer or the tied
embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int

from mlx_distill.errors import ModelError

Head: TypeAlias = mx.array | nn.Module


@dataclass(frozen=True)
class HeadWeight:
    """The ``[v, d]`` weight of a head, dense or packed; ``scales`` is None where it is dense."""

    weight: mx.array
    bias: mx.array | None = None
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @property
    def columns(self) -> int:
        """Width of the vocabulary, padding included."""
        return self.weight.shape[0]

    @property
    def hidden(self) -> int:
        """Width of the hidden state."""
        return self.weight.shape[1] if self.scales is None else self.weight.shape[1] * 32 // self.bits

    def over(self, temperature: float) -> HeadWeight:
        """The head whose logits come out divided by T when the hidden state was: only a bias needs it."""
        if self.bias is None or temperature == 1:
            return self
        return replace(self, bias=self.bias.astype(mx.float32) / temperature)

    def tile(self, start: int, stop: int) -> Float[mx.array, "c d"]:
        """Rows ``start`` to ``stop`` of the weight in float32."""
        return self._dense(slice(start, stop))

    def rows(self, ids: Int[mx.array, " n"]) -> Float[mx.array, "n d"]:
        """The rows of the given tokens in float32."""
        return self._dense(ids)

    def bias_tile(self, start: int, stop: int) -> Float[mx.array, " c"] | float:
        """The bias of the same columns; 0 without one."""
        return 0.0 if self.bias is None else self.bias[start:stop].astype(mx.float32)

    def _dense(self, index: slice | mx.array) -> mx.array:
        w = self.weight[index]
        if self.scales is not None:
            biases = None if self.biases is None else self.biases[index]
            # mxfp4 comes back as bfloat16, affine in the type of its scales.
            w = mx.dequantize(
                w, self.scales[index], biases, group_size=self.group_size, bits=self.bits, mode=self.mode
            )
        return w.astype(mx.float32)


def head_weight(head: Head) -> HeadWeight:
    """Read a head's arrays: an array ``[v, d]``, ``nn.Linear``, ``nn.Embedding`` (tied) or their quantised
    kin.

    Raises:
        ModelError: Anything else, such as a head with adapters on it.

    >>> head_weight(nn.Embedding(7, 4)).columns
    7
    """
    if isinstance(head, mx.array):
        if head.ndim != 2:
            raise ModelError(f"a head of shape {head.shape}", fix="give the weight as [vocabulary, hidden]")
        return HeadWeight(head)
    if isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return HeadWeight(
            head.weight,
            bias=head.get("bias"),
            scales=head.scales,
            biases=head.get("biases"),
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )
    if isinstance(head, nn.Linear | nn.Embedding):
        return HeadWeight(head.weight, bias=head.get("bias"))
    raise ModelError(
        f"a {type(head).__name__} cannot be read as an output projection",
        fix="give the [vocabulary, hidden] array, or an nn.Linear, nn.Embedding or their quantised form; fuse adapters on the head first",
    )


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
