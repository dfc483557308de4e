"""Trajectories against the references, and APOLLO against a float64 implementation of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.optim import APOLLO, AdamW, APOLLOMini, GaLoreAdamW
from mlx_distill.optim.apollo import random_basis

GOLDEN = {
    name: np.array(a)
    for name, a in mx.load(
        str(Path(__file__).parents[1] / "golden" / "optim_trajectories.safetensors")
    ).items()
}
STEPS, RANK, GAP = 20, 4, 8


def loss_of(p: dict, x: mx.array, y: mx.array) -> mx.array:
    hidden = mx.tanh(x @ p["up"]["weight"].T) * p["norm"]["weight"]
    return mx.square(hidden @ p["down"]["weight"].T - y).mean()


def start() -> dict:
    return {name: {"weight": mx.array(GOLDEN[f"start.{name}.weight"])} for name in ("down", "norm", "up")}


def train(optimizer: Any, before_step: Any = lambda step: None) -> tuple[dict, list[float]]:
    """A plain MLX training loop."""
    parameters, losses = start(), []
    for step in range(STEPS):
        before_step(step)
        loss, gradients = mx.value_and_grad(loss_of)(
            parameters, mx.array(GOLDEN["x"][step]), mx.array(GOLDEN["y"][step])
        )
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        losses.append(loss.item())
    return parameters, losses


def assert_equal(name: str, parameters: dict, losses: list[float]) -> None:
    assert np.abs(np.array(losses) - GOLDEN[f"{name}.losses"]).max() <= 1e-5
    for key in ("up", "down", "norm"):
        assert np.abs(np.array(parameters[key]["weight"]) - GOLDEN[f"{name}.{key}.weight"]).max() <= 1e-5, key


@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right", "full"])
def test_galore_equals_galore_torch_across_two_refreshes(projection: str) -> None:
    """Of a tall matrix, a wide one and a vector; the bases are the reference's, made at the first step and
    twice again.
    """
    now, refreshed = 0, []

    def note(step: int) -> None:
        nonlocal now
        now = step

    def reference_basis(gradient: mx.array, rank: int, kind: str, old: Any) -> dict[str, mx.array]:
        name = "up.weight" if gradient.shape == (12, 8) else "down.weight"
        refreshed.append((now, name))
        found = [GOLDEN[f"{projection}.basis.{now}.{name}.{i}"] for i in range(2 if kind == "full" else 1)]
        if kind == "full":
            return {"left": mx.array(found[0]), "right": mx.array(found[1])}
        return {"right" if found[0].shape[0] == rank else "left": mx.array(found[0])}

    optimizer = GaLoreAdamW(0.02, RANK, GAP, 0.25, projection, weight_decay=0.01, basis=reference_basis)
    assert_equal(projection, *train(optimizer, note))
    assert sorted(refreshed) == [(step, f"{name}.weight") for step in (0, 8, 16) for name in ("down", "up")]


@pytest.mark.parametrize("method", ["eigh", "svd"])
def test_galore_with_its_own_bases_equals_galore_torch_up_to_the_first_refresh(method: str) -> None:
    _, losses = train(GaLoreAdamW(0.02, RANK, GAP, 0.25, weight_decay=0.01, basis=method))
    assert np.abs(np.array(losses[: GAP + 1]) - GOLDEN["std.losses"][: GAP + 1]).max() <= 1e-5


def test_adamw_equals_torch() -> None:
    assert_equal("adamw", *train(AdamW(0.02, weight_decay=0.01)))


class Apollo64:
    """Algorithm 1 of arXiv 2412.05270 in float64: one matrix."""

    def __init__(
        self, basis: Any, rank: int, rate: float, scale: float, channels: bool, decay: float
    ) -> None:
        self.basis, self.rank, self.rate, self.scale, self.channels, self.decay = (
            basis,
            rank,
            rate,
            scale,
            channels,
            decay,
        )
        self.m = self.v = self.last = None
        self.t = 0

    def step(self, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        tall = g.shape[0] >= g.shape[1]
        p = self.basis(self.t)
        r = g @ p.T if tall else p.T @ g
        self.m = 0.1 * r + (0.9 * self.m if self.t else 0)
        self.v = 0.001 * r**2 + (0.999 * self.v if self.t else 0)
        self.t += 1
        n = self.m / (np.sqrt(self.v) + 1e-6)
        if self.channels:
            axis = 1 if tall else 0
            s = np.sqrt((n**2).sum(axis, keepdims=True)) / (np.sqrt((r**2).sum(axis, keepdims=True)) + 1e-8)
        else:
            s = np.sqrt((n**2).sum()) / (np.sqrt((r**2).sum()) + 1e-8)
        d = g * s
        if self.last is not None:
            d = d / (max(np.linalg.norm(d) / (self.last + 1e-8), 1.01) / 1.01)
        self.last = np.linalg.norm(d)
        rate = self.rate * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        w = w - rate * self.scale * d
        return w - self.rate * self.decay * w


@pytest.mark.parametrize("kind", ["channels", "mini"])
@pytest.mark.parametrize("name", ["up", "down"])
def test_apollo_equals_the_paper_in_float64(kind: str, name: str) -> None:
    mini = kind == "mini"
    rank, scale = (1, 128**0.5) if mini else (RANK, 1.0)
    make = APOLLOMini if mini else (lambda rate, gap, **more: APOLLO(rate, RANK, gap, **more))
    optimizer = make(0.01, GAP, weight_decay=0.01, seed=7)
    parameters = {name: {"weight": mx.array(GOLDEN[f"start.{name}.weight"])}}
    shape = parameters[name]["weight"].shape

    def basis(t: int) -> np.ndarray:
        (array,) = random_basis(shape, rank, 7, 0, t // GAP).values()
        return np.array(array, np.float64)

    plain = Apollo64(basis, rank, 0.01, scale, not mini, 0.01)
    weight = GOLDEN[f"start.{name}.weight"].astype(np.float64)
    random = np.random.default_rng(3)
    for _ in range(STEPS):
        gradient = random.normal(size=shape).astype(np.float32)
        parameters = optimizer.apply_gradients({name: {"weight": mx.array(gradient)}}, parameters)
        weight = plain.step(weight, gradient.astype(np.float64))
        assert np.abs(np.array(parameters[name]["weight"]) - weight).max() <= 1e-5
