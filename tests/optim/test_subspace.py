"""Bases: the share of a gradient that they capture, projecting to the subspace and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.optim.subspace import (
    basis_shapes,
    captured,
    carry_moments,
    find_basis,
    project,
    project_back,
    sides_of,
)


def decaying(m: int, n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> mx.array:
    """A matrix whose singular values fall as i^-0.7."""
    random = np.random.default_rng(seed)
    a, b = (np.linalg.qr(random.normal(size=(*batch, k, min(m, n))))[0] for k in (m, n))
    return mx.array((a * np.arange(1, min(m, n) + 1) ** -0.7 @ b.swapaxes(-1, -2)).astype(np.float32))


@pytest.mark.parametrize("method", ["eigh", "svd", "subspace", "auto"])
@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (12, 12), (3, 20, 8)])
def test_a_basis_is_orthonormal_and_captures_what_the_svd_captures(
    method: str, projection: str, shape: tuple[int, ...]
) -> None:
    g = decaying(*shape[-2:], batch=shape[:-2])
    basis = find_basis(g, 4, projection, method)
    assert {side: b.shape for side, b in basis.items()} == basis_shapes(g.shape, 4, projection)
    values = np.linalg.svd(np.array(g), compute_uv=False) ** 2
    best = values[..., :4].sum() / values.sum()
    for side, b in basis.items():
        product = b.swapaxes(-1, -2) @ b if side == "left" else b @ b.swapaxes(-1, -2)
        assert np.abs(np.array(product) - np.eye(4)).max() < 1e-4
        assert captured(g, {side: b}) == pytest.approx(best, rel=2e-2 if method == "subspace" else 1e-4)


def test_projecting_back_recovers_a_gradient_inside_the_subspace() -> None:
    g = decaying(12, 8)
    for projection in ("std", "reverse_std", "full"):
        basis = find_basis(g, 8, projection)
        low = project(g, basis)
        assert mx.allclose(project(project_back(low, basis), basis), low, atol=1e-5)


def test_a_warm_start_is_as_good_as_a_random_one() -> None:
    g = decaying(64, 96)
    old = find_basis(g, 8, "std")
    later = g + 0.02 * decaying(64, 96, seed=1)
    warm = captured(later, find_basis(later, 8, "std", "subspace", old))
    best = captured(later, find_basis(later, 8, "std", "svd"))
    assert warm == pytest.approx(best, rel=1e-3)


def test_a_zero_gradient_still_gives_a_basis() -> None:
    for method in ("eigh", "subspace"):
        basis = find_basis(mx.zeros((6, 4)), 2, "std", method)
        assert np.isfinite(np.array(basis["right"])).all()


def test_computing_a_basis_does_not_change_the_random_state() -> None:
    before = mx.random.state[0].tolist()
    find_basis(decaying(16, 24), 4, "std", "subspace")
    assert mx.random.state[0].tolist() == before


def test_moments_are_carried_like_mean_and_variance() -> None:
    """A rotation inside the subspace loses nothing; a flipped sign flips the mean and keeps the variance."""
    g = decaying(12, 8)
    old = find_basis(g, 4, "std")
    m, v = 0.1 * project(g, old), 0.001 * mx.square(project(g, old)) + 0.01
    flipped = {"right": -old["right"]}
    turned_m, turned_v = carry_moments(m, v, old, flipped, (0.9, 0.999), 5)
    assert mx.allclose(turned_m, -m, atol=1e-6) and mx.allclose(turned_v, v, rtol=1e-4, atol=1e-6)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    rotated = {"right": mx.array(turn) @ old["right"]}
    turned_m, turned_v = carry_moments(m, v, old, rotated, (0.9, 0.999), 5)
    assert mx.allclose(project_back(turned_m, rotated), project_back(m, old), atol=1e-6)
    assert (turned_v >= 0).all()


def test_unknown_names_are_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(ConfigError, match="reverse_std"):
        sides_of((2, 2), "diagonal")
    with pytest.raises(ConfigError, match="eigh"):
        find_basis(mx.zeros((2, 2)), 1, "std", "magic")


def test_eigh_above_the_limit_of_lapack_is_refused() -> None:
    with pytest.raises(ConfigError, match="eigenvectors of 2895") as caught:
        find_basis(mx.zeros((2895, 2895)), 1, "std", "eigh")
    assert "basis: auto" in (caught.value.fix or "")
