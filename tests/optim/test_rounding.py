"""Stochastic rounding of 16-bit weights: the expected value of an update is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.optim import APOLLO, AdamW, APOLLOMini, GaLoreAdamW
from mlx_distill.optim.adamw import round_stochastically

TYPES = [mx.bfloat16, mx.float16]
MAKERS: dict[str, Callable[..., Any]] = {
    "adamw": AdamW,
    "galore": lambda rate, **more: GaLoreAdamW(rate, 4, scale=1.0, **more),
    "apollo": lambda rate, **more: APOLLO(rate, 4, **more),
    "apollo-mini": lambda rate, **more: APOLLOMini(rate, scale=4.0, **more),
}


def key(number: int = 0) -> mx.array:
    return mx.random.key(number)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_gives_a_neighbour_with_the_right_mean(dtype: mx.Dtype) -> None:
    x = mx.array(np.random.default_rng(0).normal(0, 0.02, 64).astype(np.float32))
    x = mx.where(mx.abs(x) < 1e-3, 1e-3, x)
    rounded = mx.stack([round_stochastically(x, dtype, key(i)).astype(mx.float32) for i in range(4000)])
    spacing = mx.abs(x) * (2.0**-7 if dtype == mx.bfloat16 else 2.0**-10)
    assert mx.all(mx.abs(rounded - x) < spacing).item()
    assert all(len(set(column)) <= 2 for column in np.array(rounded).T.tolist())
    # The mean of 4,000 numbers one spacing apart is off by 0.5 / sqrt(4000) of it, at most five times that.
    assert mx.all(mx.abs(rounded.mean(axis=0) - x) < 5 * 0.5 / 4000**0.5 * spacing).item()


@pytest.mark.parametrize("dtype", TYPES)
def test_exact_and_non_finite_numbers_are_unchanged(dtype: mx.Dtype) -> None:
    exact = mx.array([0.0, -0.0, 1.0, -3.5, 2.0**-10, 60_000.0 if dtype == mx.float16 else 3e38]).astype(
        dtype
    )
    for i in range(20):
        same = round_stochastically(exact.astype(mx.float32), dtype, key(i))
        assert mx.array_equal(mx.view(same, mx.uint16), mx.view(exact, mx.uint16)).item()
    bits = mx.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], mx.uint32)
    odd = round_stochastically(mx.view(bits, mx.float32), dtype, key())
    assert odd[:2].tolist() == [float("inf"), float("-inf")] and mx.all(mx.isnan(odd[2:])).item()


def test_float32_is_not_rounded() -> None:
    x = mx.random.normal((100,))
    assert mx.array_equal(round_stochastically(x, mx.float32, key()), x).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_small_updates_of_bfloat16_equal_those_of_float32_on_average(name: str) -> None:
    """At a rate of 2e-5 the neighbours of a weight of 0.02 are six steps apart; to the nearest nothing would
    move.
    """
    start, gradient = 0.02 * mx.random.normal((64, 32)), mx.random.normal((64, 32))
    moved = {}
    for dtype in (mx.float32, mx.bfloat16):
        optimizer, weights = MAKERS[name](2e-5), {"w": start.astype(mx.bfloat16).astype(dtype)}
        before = weights["w"].astype(mx.float32)
        for _ in range(30):
            weights = optimizer.apply_gradients({"w": gradient.astype(dtype)}, weights)
            mx.eval(weights, optimizer.state)
        assert weights["w"].dtype == dtype
        moved[dtype] = weights["w"].astype(mx.float32) - before
    wanted, found = moved[mx.float32], moved[mx.bfloat16]
    assert (mx.sum(wanted * found) / mx.sum(wanted * wanted)).item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", MAKERS)
def test_rounding_depends_on_seed_step_and_parameter(name: str) -> None:
    tree = {"a": mx.full((8, 32), 0.02, mx.bfloat16), "b": mx.full((8, 32), 0.02, mx.bfloat16)}
    gradients = {path: mx.full((8, 32), 0.1, mx.bfloat16) for path in tree}

    def after(steps: int, seed: int = 0) -> dict[str, list]:
        optimizer, weights = MAKERS[name](2e-5, seed=seed), dict(tree)
        for _ in range(steps):
            weights = optimizer.apply_gradients(gradients, tree)
        return {path: weight.tolist() for path, weight in weights.items()}

    first = after(1)
    assert first == after(1)
    assert first["a"] != first["b"] and first != after(1, seed=1) and first != after(2)


def test_a_compiled_step_rounds_as_a_plain_one() -> None:
    results = []
    for compiled in (False, True):
        optimizer, weights = AdamW(2e-5), {"w": mx.full((8, 32), 0.02, mx.bfloat16)}
        optimizer.init(weights)

        def step(weights: Any, gradient: mx.array, optimizer: AdamW = optimizer) -> Any:
            return optimizer.apply_gradients({"w": gradient}, weights)

        run = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state) if compiled else step
        for i in range(4):
            weights = run(weights, mx.full((8, 32), 0.1 * (i + 1)))
            mx.eval(weights, optimizer.state)
        results.append(weights["w"])
    assert mx.array_equal(*results).item()
