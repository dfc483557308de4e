"""Scales, rounding, straight-through gradients and packed codes of every mode."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.models.grids import (
    E4M3_VALUES,
    Scales,
    find_scales,
    pack,
    round_to_grid,
    straight_through,
)
from mlx_distill.models.quantization import Quantization, parse_mode

MODES = ["mxfp4", "nvfp4", "mxfp8", *(f"affine{bits}" for bits in (1, 2, 3, 4, 5, 6, 8))]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weights(shape: tuple[int, ...] = (6, 128), seed: int = 0) -> mx.array:
    """Weights of the size of a language model's, with a zero group and a constant one."""
    values = np.random.default_rng(seed).standard_t(5, shape).astype(np.float32) * 0.02
    values[..., 0, :64] = 0
    values[..., 1, :64] = 0.03
    return mx.array(values)


def importance(columns: int = 128) -> mx.array:
    return mx.array(np.random.default_rng(7).lognormal(0, 1.5, columns).astype(np.float32))


def read(parts: dict[str, mx.array], q: Quantization) -> mx.array:
    """What MLX reads, in float32."""
    scales, biases = parts["scales"], parts.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(parts["weight"], scales, biases, q.group_size, q.bits, q.mode, dtype=mx.float32)


def loss(weight: mx.array, scales: Scales, q: Quantization, h: mx.array | None) -> float:
    difference = weight - round_to_grid(weight, scales, q)
    return float(mx.sum(mx.square(difference) * (1.0 if h is None else h)).item())


def rounded_by_mlx(weight: mx.array, q: Quantization, h: mx.array | None) -> float:
    parts = mx.quantize(weight.astype(mx.bfloat16), q.group_size, q.bits, mode=q.mode)
    back = read(dict(zip(("weight", "scales", "biases"), parts, strict=False)), q)
    return float(mx.sum(mx.square(weight - back) * (1.0 if h is None else h)).item())


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_mlx_reads_exactly_the_values_on_the_grid(mode: str, weighted: bool, on_host: bool) -> None:
    q, weight = parse_mode(mode), weights()
    scales = find_scales(weight, q, importance() if weighted else None, on_host=on_host)
    parts = pack(weight, scales, q, on_host=on_host)
    values = round_to_grid(weight, scales, q, on_host=on_host)
    assert mx.array_equal(read(parts, q), values)
    if mode != "affine1":  # MLX takes the same value for one bit and another for nothing
        assert mx.array_equal(values[0, :64], mx.zeros(64))
    assert mx.array_equal(pack(values, scales, q)["weight"], parts["weight"])
    rows = mx.random.normal((3, 128), key=mx.random.key(1))
    stored = {k: v.astype(mx.float32) if v.dtype == mx.bfloat16 else v for k, v in parts.items()}
    product = mx.quantized_matmul(
        rows, stored["weight"], stored["scales"], stored.get("biases"), True, q.group_size, q.bits, q.mode
    )
    assert mx.abs(product - rows @ values.T).max().item() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_host_and_device_find_the_same(mode: str) -> None:
    q, weight = parse_mode(mode), weights()
    for h in (None, importance()):
        host, device = (find_scales(weight, q, h, on_host=on_host) for on_host in (True, False))
        assert loss(weight, host, q, h) == pytest.approx(loss(weight, device, q, h), rel=1e-4)
        same = mx.mean((host.scale == device.scale).astype(mx.float32)).item()
        assert same > 0.9
        assert mx.array_equal(
            pack(weight, host, q, on_host=True)["weight"], pack(weight, host, q, on_host=False)["weight"]
        )


@pytest.mark.parametrize("mode", MODES)
def test_no_scale_is_worse_than_that_of_mlx(mode: str) -> None:
    q, weight = parse_mode(mode), weights((16, 256), 3)
    for h in (None, importance(256)):
        found, plain = loss(weight, find_scales(weight, q, h), q, h), rounded_by_mlx(weight, q, h)
        assert found <= plain * 1.0001
        if mode in ("mxfp4", "nvfp4") or (h is not None and mode in ("affine2", "affine3", "affine4")):
            assert found < 0.95 * plain


def test_scales_of_four_bit_floats_are_the_best_of_a_plain_search() -> None:
    weight = weights((4, 64), 5)
    h = np.array(importance(64))
    grid = np.array(sorted({*E2M1, *(-v for v in E2M1)}))
    for mode, group in (("mxfp4", 32), ("nvfp4", 16)):
        found = find_scales(weight, parse_mode(mode), importance(64))
        for row in range(1, 4):
            for g in range(64 // group):
                part = slice(g * group, (g + 1) * group)
                w = np.array(weight)[row, part].astype(np.float64)
                top = np.abs(w).max() / 6
                if mode == "mxfp4":
                    first = int(np.ceil(np.log2(top)))
                    tried = [2.0**k for k in range(first - 2, first + 2)]
                else:
                    first = int(np.abs(E4M3_VALUES - top).argmin())
                    tried = [float(v) for v in E4M3_VALUES[max(first - 6, 1) : first + 9]]
                rounded = [s * grid[np.abs(w[:, None] / s - grid).argmin(1)] for s in tried]
                losses = [(h[part] * (w - r) ** 2).sum() for r in rounded]
                assert found.scale[row, g].item() in tried
                assert losses[tried.index(found.scale[row, g].item())] <= min(losses) * (1 + 1e-5)


def test_the_unweighted_affine_scales_are_those_of_mlx() -> None:
    q, weight = parse_mode("affine4"), weights()
    _, scales, biases = mx.quantize(weight.astype(mx.bfloat16), q.group_size, q.bits)
    found = pack(weight, find_scales(weight, q), q)
    assert mx.array_equal(found["scales"], scales)
    assert mx.array_equal(found["biases"], biases)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", "affine3", "affine4"])
def test_straight_through_has_the_value_of_the_grid_and_the_gradient_of_the_weight(mode: str) -> None:
    q = parse_mode(mode)
    weight = mx.random.normal((4, 128), key=mx.random.key(2))
    scales = find_scales(weight, q)
    target = mx.random.normal(weight.shape, key=mx.random.key(3))
    far = mx.zeros(weight.shape)
    far[0, 0] = 1e3  # outside of every grid
    assert mx.array_equal(straight_through(weight, scales, q), round_to_grid(weight, scales, q))
    gradient = mx.grad(lambda w: mx.sum(straight_through(w, scales, q) * target))(weight + far)
    assert gradient[0, 0].item() == 0
    inside = mx.abs(gradient - target) < 1e-7
    assert mx.mean(inside.astype(mx.float32)).item() > 0.9
    assert mx.all(inside | (gradient == 0)).item()


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "affine3"])
def test_an_offset_of_half_a_step_reaches_both_neighbours_and_has_the_gradient_of_a_step(mode: str) -> None:
    q = parse_mode(mode)
    weight = mx.random.normal((4, 128), key=mx.random.key(4))
    scales = find_scales(weight, q)
    plain = round_to_grid(weight, scales, q)
    assert mx.array_equal(straight_through(weight, scales, q, mx.zeros(weight.shape)), plain)
    up, down = (straight_through(weight, scales, q, mx.full(weight.shape, v)) for v in (0.499, -0.499))
    assert mx.mean((up != down).astype(mx.float32)).item() > 0.8
    gradient = mx.grad(lambda v: mx.sum(straight_through(weight, scales, q, v)))(mx.zeros(weight.shape))
    steps = mx.abs(up - down)
    moved = (up != down) & (gradient != 0)
    ratio = mx.where(moved, mx.abs(gradient) / mx.where(moved, steps, 1.0), 1.0)
    assert mx.all((ratio > 0.45) & (ratio < 2.1)).item()  # a step doubles at the border of a binade


def test_stacks_of_experts_and_importances_of_each_expert() -> None:
    q, weight = parse_mode("affine4"), weights((3, 4, 128), 6)
    h = mx.stack([importance(), importance()[::-1], mx.ones(128)])
    one = find_scales(weight, q, mx.broadcast_to(h[:, None], weight.shape))
    for e in range(3):
        alone = find_scales(weight[e], q, h[e])
        assert mx.array_equal(one.scale[e], alone.scale)
        assert mx.array_equal(pack(weight, one, q)["weight"][e], pack(weight[e], alone, q)["weight"])


def test_scales_are_searched_for_the_stored_type() -> None:
    q, weight = replace(parse_mode("affine3"), group_size=32), weights(seed=8)
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        scales = find_scales(weight, q, importance(), dtype)
        parts = pack(weight, scales, q)
        assert parts["scales"].dtype == dtype
        assert mx.array_equal(parts["scales"].astype(mx.float32), scales.scale)
        assert mx.array_equal(read(parts, q), round_to_grid(weight, scales, q))
