"""What a refresh does: the projections that APOLLO draws; of GaLore the moments, what is skipped, warm
starts, the choice of a method.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.optim import APOLLO, GaLoreAdamW
from mlx_distill.optim.apollo import random_basis
from mlx_distill.optim.galore import basis_of
from mlx_distill.optim.subspace import captured, find_basis, project


@pytest.mark.parametrize(
    ("shape", "rank", "kept"), [((2000, 400), 64, 64), ((400, 2000), 64, 64), ((3000, 48), 96, 48)]
)
def test_a_random_projection_preserves_norms_on_average(shape: tuple[int, int], rank: int, kept: int) -> None:
    """Gaussian entries of mean 0 and variance 1/r, r cut to the shorter side: within five standard errors of
    each.
    """
    (drawn,) = random_basis(shape, rank, seed=1, index=2, period=3).values()
    entries = np.array(drawn).ravel() * kept**0.5
    assert entries.size == kept * min(shape)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs((entries**power).mean() - expected) < 5 * (variance / entries.size) ** 0.5, power


def test_each_seed_matrix_and_period_has_a_projection_of_its_own() -> None:
    """The same arguments give the same projection; different ones are uncorrelated."""
    places = [(seed, place, period) for seed in range(2) for place in range(3) for period in range(3)]
    drawn = [np.array(random_basis((256, 64), 16, *place)["right"]).ravel() for place in places]
    assert np.array_equal(drawn[-1], np.array(random_basis((256, 64), 16, *places[-1])["right"]).ravel())
    alike = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(alike).max() < 5 / drawn[0].size ** 0.5


def test_apollo_draws_a_new_projection_at_each_gap_and_for_each_matrix() -> None:
    """With the identity as gradient and beta_1 = 0 the first moment is the projection itself."""
    gap, eyes = 3, {name: mx.eye(8) for name in ("a", "b")}
    optimizer, seen = APOLLO(0.1, 4, gap, betas=(0.0, 0.999)), []
    for _ in range(2 * gap + 1):
        optimizer.apply_gradients(eyes, eyes)
        seen.append([np.array(optimizer.state[name]["m"]) for name in eyes])
    for step, (a, b) in enumerate(seen):
        assert not np.array_equal(a, b)
        for one, before in zip((a, b), seen[step - 1], strict=True):
            assert step == 0 or np.array_equal(one, before) == (step % gap > 0), step


def flat(*shape: int, seed: int = 0) -> mx.array:
    """A random matrix: its singular values are nearly equal, so no basis captures much of it."""
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def train(optimizer: Any, gradients: list[mx.array]) -> list[mx.array]:
    weights = [{"w": mx.zeros(gradients[0].shape)}]
    for gradient in gradients:
        weights.append(optimizer.apply_gradients({"w": gradient}, weights[-1]))
        mx.eval(weights[-1], optimizer.state)
    return [w["w"] for w in weights]


def test_the_step_after_a_reset_is_that_of_a_new_optimizer() -> None:
    """Moments and correction of their bias: the first step after is that of a new optimizer, not a tenth or
    ten times of it.
    """
    *before, last = [flat(12, 8, seed=i) for i in range(6)]
    *_, a, b = train(GaLoreAdamW(0.1, 3, 5, moments="reset"), [*before, last])
    assert mx.allclose(b - a, train(GaLoreAdamW(0.1, 3, 5), [last])[1], atol=1e-6)


def test_carried_moments_equal_those_of_the_new_basis() -> None:
    """Seven times one gradient, the seventh in a basis that is turned: without its bias each moment is the
    projection, or its square.
    """
    gradient, turn = (
        flat(12, 8),
        mx.array(np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32)),
    )

    def basis(gradient: mx.array, rank: int, kind: str, old: Any) -> dict[str, mx.array]:
        return find_basis(gradient, rank, kind) if old is None else {"right": turn @ old["right"]}

    optimizer = GaLoreAdamW(0.1, 3, 6, moments="project", basis=basis)
    train(optimizer, [gradient] * 7)
    state = optimizer.state["w"]
    low = project(gradient, basis_of(state))
    assert mx.allclose(state["m"] / (1 - 0.9**7), low, atol=1e-4)
    assert mx.allclose(state["v"] / (1 - 0.999**7), mx.square(low), atol=1e-3)


def test_refresh_below_is_relative_to_the_share_captured_by_the_new_basis() -> None:
    """Shares of the gradient on the one axis that every basis is: below half of what the last refresh saw,
    and only there, is the next.
    """
    shares, refreshed = [0.4, 0.39, 0.21, 0.19, 0.1, 0.09, 0.9, 0.05, 0.04], []

    def basis(gradient: mx.array, rank: int, kind: str, old: Any) -> dict[str, mx.array]:
        refreshed.append(round(gradient[0, 0].item() ** 2, 2))
        return {"right": mx.array([[1.0, 0.0]])}

    gradients = [mx.array([[share**0.5, 0.0], [0.0, (1 - share) ** 0.5]]) for share in shares]
    train(GaLoreAdamW(0.1, 1, 1, basis=basis, refresh_below=0.5), gradients)
    assert refreshed == [0.4, 0.19, 0.09, 0.04]


@pytest.mark.parametrize("projection", ["std", "full"])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_power_iteration_starts_from_the_previous_basis(shape: tuple[int, int], projection: str) -> None:
    """Each refresh on one gradient goes on where the last one ended, on either side, until it has what the
    svd has.
    """
    gradient = flat(*shape)
    optimizer, found = GaLoreAdamW(0.1, 4, 1, projection=projection, basis="subspace"), []
    for _ in range(12):
        train(optimizer, [gradient])
        found.append(
            [captured(gradient, {side: basis}) for side, basis in basis_of(optimizer.state["w"]).items()]
        )
    for side, (first, *_, last) in zip(basis_of(optimizer.state["w"]), zip(*found, strict=True), strict=True):
        best = captured(gradient, {side: find_basis(gradient, 4, side, "svd")[side]})
        assert last == pytest.approx(best, rel=1e-4) and first < 0.997 * best, side


@pytest.mark.parametrize("shape", [(48, 40), (40, 48)])
def test_auto_computes_eigenvectors_up_to_the_limit_of_the_shorter_side(shape: tuple[int, int]) -> None:
    gradient = flat(*shape)
    old = find_basis(flat(*shape, seed=1), 4, "full")
    for limit, method, other in ((40, "eigh", "subspace"), (39, "subspace", "eigh")):
        bases = {
            name: find_basis(gradient, 4, "full", name, old, eigh_limit=limit)
            for name in ("auto", method, other)
        }
        for side, basis in bases["auto"].items():
            assert mx.array_equal(basis, bases[method][side]), (limit, side)
            assert not mx.allclose(basis, bases[other][side], atol=1e-3), (limit, side)
