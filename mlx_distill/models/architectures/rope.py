"""Rotary position embeddings as transformers computes them, and where mlx-lm's differ.

Differences in mlx-lm 0.32.2: it always rounds YaRN's correction range (gpt-oss has ``truncate: false``; at
full size the frequency of pair 17 is then off by a factor of 1.8); gpt-oss, Qwen2 and Qwen3-MoE do not read
``rope_parameters`` of transformers 5; Qwen3-MoE has no YaRN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ModelError


@dataclass(frozen=True)
class RopeSettings:
    """The rope of a config: its type, its base, and the mapping that holds the parameters of its type."""

    kind: str
    theta: float
    scaling: Mapping[str, Any]


def rope_settings(
    config: Mapping[str, Any],
    default_theta: float = 10_000.0,
    default_scaling: Mapping[str, Any] | None = None,
) -> RopeSettings:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (transformers 4).

    Raises:
        ModelError: a type of rope other than default, linear or yarn, no factor, or two ropes that differ.

    >>> rope_settings({"rope_theta": 1e6}).theta
    1000000.0
    >>> rope_settings({"rope_parameters": {"rope_type": "yarn", "rope_theta": 150000, "factor": 32}}).kind
    'yarn'
    """
    given = [(key, dict(config[key])) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    settings = [(key, _settings(config, scaling, default_theta)) for key, scaling in given]
    if len({(s.kind, *sorted(_numbers(s).items())) for _, s in settings}) > 1:
        raise ModelError(
            "config.json: rope_parameters and rope_scaling are both there and differ",
            fix="remove rope_scaling, or write its values into rope_parameters",
        )
    return settings[0][1] if settings else _settings(config, dict(default_scaling or {}), default_theta)


def _settings(config: Mapping[str, Any], scaling: dict[str, Any], default_theta: float) -> RopeSettings:
    """The rope of one mapping of a config."""
    if nested := next((key for key, value in scaling.items() if isinstance(value, Mapping)), None):
        raise ModelError(
            f"config.json: a rope for each type of layer ({nested!r}) is not supported",
            fix="only one rope for all layers is",
        )
    theta = scaling.get("rope_theta") or config.get("rope_theta", default_theta)
    if theta is None:
        raise ModelError(
            "config.json: rope_theta None is not a number",
            fix="take config.json from the original checkpoint",
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "yarn"):
        raise ModelError(
            f"config.json: rope type {kind!r} is not supported", fix="default, linear and yarn are"
        )
    original = scaling.get("original_max_position_embeddings")
    outer = config.get("original_max_position_embeddings") or original
    if kind == "yarn" and outer != original:
        raise ModelError(
            f"config.json: original_max_position_embeddings {outer} beside {original} in the rope",
            fix="write it into the rope alone",
        )
    positions = config.get("max_position_embeddings")
    if kind == "yarn" and "factor" in scaling and scaling["factor"] is None and positions:
        scaling["factor"] = positions / (original or positions)  # as transformers
    if kind != "default" and scaling.get("factor") is None:
        raise ModelError(
            f"config.json: rope type {kind!r} without a factor",
            fix="take config.json from the original checkpoint",
        )
    return RopeSettings(kind, float(theta), scaling)


def _numbers(settings: RopeSettings) -> dict[str, float]:
    """What is computed with, beside the base."""
    keys = (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
    return {key: float(settings.scaling[key]) for key in keys if settings.scaling.get(key) is not None}


def yarn_frequencies(
    dims: int, settings: RopeSettings, max_positions: int = 131_072
) -> tuple[np.ndarray, float]:
    r"""YaRN's inverse frequencies ``[dims / 2]``, and its factor on queries and keys.

    Pair ``i`` rotates by :math:`\theta^{-2i/d}` per token. Pairs with fewer than ``beta_slow`` rotations over
    the original length are divided by ``factor``, those with more than ``beta_fast`` are unchanged, and
    between the two a linear ramp interpolates. With ``truncate: false`` the ends of the ramp are not rounded.

    Args:
        dims: Size of a head.
        settings: The config's rope.
        max_positions: ``max_position_embeddings``: the original length if the rope has none.

    Source: Peng et al., YaRN: Efficient Context Window Extension of Large Language Models (2023). The order
    of float32 operations is that of transformers.
    """
    scaling, theta = settings.scaling, settings.theta
    factor = float(scaling["factor"])
    original = float(scaling.get("original_max_position_embeddings") or max_positions)
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1

    def dimension(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0.0
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    wavelengths = np.float32(theta) ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims))
    unchanged = np.float32(1) - ramp
    inverse = (1 / (np.float32(factor) * wavelengths)) * (1 - unchanged) + (1 / wavelengths) * unchanged
    return inverse.astype(np.float32), _attention_factor(scaling, factor)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor, 1.0)


def other_logits(reason: str) -> str:
    """The note on a model for which stock mlx-lm computes other logits than transformers and this package."""
    return f"computed as transformers does; stock mlx-lm 0.32 would give other logits ({reason})"


def stock_difference(dims: int, settings: RopeSettings, max_positions: int = 131_072) -> str | None:
    """Why stock mlx-lm computes a YaRN differently that it reads; None if the numbers are equal.

    >>> scaling = {"rope_type": "yarn", "factor": 32, "truncate": False}
    >>> rope = rope_settings({"rope_scaling": scaling, "rope_theta": 150000})
    >>> "it rounds YaRN's correction range" in stock_difference(64, rope)
    True
    """
    if settings.kind != "yarn":
        return None
    scaling = dict(settings.scaling)
    correct, scale = yarn_frequencies(dims, settings, max_positions)
    defaults = {"original_max_position_embeddings": 4096, "truncate": True}
    as_stock = replace(settings, scaling={**defaults, **scaling, "truncate": True})
    rounded, _ = yarn_frequencies(dims, as_stock, max_positions)
    if not np.allclose(correct, rounded, rtol=1e-5):
        if not scaling.get("truncate", True):
            return other_logits("it rounds YaRN's correction range")
        return other_logits("it assumes 4096 for YaRN's original length, which the config does not give")
    factor = float(scaling["factor"])
    stock = _mscale(factor, scaling.get("mscale") or 1) / _mscale(factor, scaling.get("mscale_all_dim") or 0)
    if not math.isclose(scale, stock, rel_tol=1e-5):
        return other_logits(f"it scales queries and keys by {stock:.4g}, the config says {scale:.4g}")
    return None


class YarnRope(nn.Module):
    """Rotates queries or keys ``[b, heads, l, dims]`` by YaRN's frequencies; it has no parameters."""

    def __init__(self, dims: int, settings: RopeSettings, max_positions: int) -> None:
        super().__init__()
        inverse, self.scale = yarn_frequencies(dims, settings, max_positions)
        self.dims = dims
        self._wavelengths = mx.array(1 / inverse)

    def __call__(
        self, x: Float[mx.array, "b h l d"], offset: int | mx.array = 0
    ) -> Float[mx.array, "b h l d"]:
        """Rotate; ``offset`` is the position of the first token, one for all rows or one for each."""
        if self.scale != 1.0:
            x = x * self.scale
        return mx.fast.rope(
            x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._wavelengths
        )


def build_rope(dims: int, settings: RopeSettings, max_positions: int) -> nn.Module:
    """The rope module for heads of size ``dims``."""
    if settings.kind == "yarn":
        return YarnRope(dims, settings, max_positions)
    scale = 1.0 / settings.scaling["factor"] if settings.kind == "linear" else 1.0
    return nn.RoPE(dims, traditional=False, base=settings.theta, scale=scale)
