"""YaRN in float32 against the paper's formula in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.rope import (
    build_rope,
    rope_settings,
    stock_difference,
    yarn_frequencies,
)

GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def plain(dims: int, theta: float, scaling: dict[str, float]) -> list[float]:
    """One pair at a time."""
    out = []
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    ends = [
        dims * math.log(original / (scaling[key] * 2 * math.pi)) / (2 * math.log(theta))
        for key in ("beta_fast", "beta_slow")
    ]
    low, high = ends if not scaling.get("truncate", True) else (math.floor(ends[0]), math.ceil(ends[1]))
    for pair in range(dims // 2):
        share = min(
            max((pair - max(low, 0)) / (min(high, dims - 1) - max(low, 0)), 0.0), 1.0
        )  # 0: left alone, 1: stretched
        frequency = theta ** (-2 * pair / dims)
        out.append(frequency * (1 - share) + frequency / factor * share)
    return out


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("dims", "theta"), [(64, 150_000.0), (128, 1e6), (16, 1e4)])
def test_frequencies_equal_the_formula(dims: int, theta: float, truncate: bool) -> None:
    scaling = {**GPT_OSS, "truncate": truncate}
    found, factor = yarn_frequencies(dims, rope_settings({"rope_theta": theta, "rope_scaling": scaling}))
    assert np.allclose(found, plain(dims, theta, scaling), rtol=2e-6)
    assert factor == pytest.approx(0.1 * math.log(32) + 1)


def test_rounding_the_range_changes_gpt_oss_by_far() -> None:
    exact, rounded = (
        yarn_frequencies(
            64, rope_settings({"rope_theta": 150_000, "rope_scaling": {**GPT_OSS, "truncate": t}})
        )[0]
        for t in (False, True)
    )
    assert 1.7 < (rounded / exact).max() < 1.9


def test_both_spellings_are_one() -> None:
    old = rope_settings({"rope_theta": 150_000, "rope_scaling": GPT_OSS})
    new = rope_settings({"rope_parameters": {**GPT_OSS, "rope_theta": 150_000}})
    assert np.array_equal(yarn_frequencies(64, old)[0], yarn_frequencies(64, new)[0])


def test_explicit_attention_factors_count() -> None:
    def factor(**more: float) -> float:
        return yarn_frequencies(64, rope_settings({"rope_theta": 1e4, "rope_scaling": {**GPT_OSS, **more}}))[
            1
        ]

    assert factor(attention_factor=1.25) == 1.25
    assert factor(mscale=0.7, mscale_all_dim=0.7) == 1.0


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"truncate": True},
        {"truncate": True, "attention_factor": 1.25},
        {"truncate": True, "mscale": 0.7, "mscale_all_dim": 0.7},
        {"truncate": True, "mscale": 0.7},
        {"truncate": True, "original_max_position_embeddings": None},
        {"rope_type": "linear"},
        {"rope_type": "default"},
        {"original_max_position_embeddings": 32, "factor": 1.0},
    ],
)
def test_what_is_said_of_stock_mlx_lm_is_so(scaling: dict[str, Any]) -> None:
    """Its own rope beside ours: said to differ where it does, and only there."""
    import mlx.core as mx
    from mlx_lm.models.rope_utils import initialize_rope

    scaling = {key: value for key, value in {**GPT_OSS, **scaling}.items() if value is not None}
    settings = rope_settings({"rope_theta": 150_000.0, "rope_scaling": scaling})
    x = mx.random.normal((1, 1, 200, 64), key=mx.random.key(0))
    stock = initialize_rope(64, 150_000.0, False, scaling, 131_072)(x)
    ours = build_rope(64, settings, 131_072)(x)
    said = stock_difference(64, settings, 131_072)
    assert (said is None) == (mx.abs(stock - ours).max().item() < 1e-3), said


def test_other_ropes_are_refused() -> None:
    with pytest.raises(ModelError, match="longrope"):
        rope_settings({"rope_theta": 1e4, "rope_scaling": {"rope_type": "longrope"}})
