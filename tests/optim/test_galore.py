"""GaLore: what is projected, the size of its state, refreshes; and what all our optimizers guarantee."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_distill import recipe_training
from mlx_distill.errors import ConfigError
from mlx_distill.optim import (
    APOLLO,
    SCHEDULES,
    AdamW,
    APOLLOMini,
    GaLoreAdamW,
    ProjectedGradient,
    by_modules,
    make_optimizer,
    make_schedule,
    state_bytes,
)
from mlx_distill.optim.galore import MOMENTS
from mlx_distill.optim.subspace import PROJECTIONS
from mlx_distill.recipe import TrainConfig

ALL: dict[str, Callable[..., optim.Optimizer]] = {
    "adamw": lambda rate, **more: AdamW(rate, **more),
    "galore": lambda rate, **more: GaLoreAdamW(rate, 4, 5, **more),
    "galore full": lambda rate, **more: GaLoreAdamW(rate, 4, 5, projection="full", **more),
    "galore staggered, carried": lambda rate, **more: GaLoreAdamW(
        rate, 4, 5, moments="project", stagger=True, **more
    ),
    "galore reset, lazy": lambda rate, **more: GaLoreAdamW(
        rate, 4, 5, moments="reset", refresh_below=0.9, **more
    ),
    "galore subspace": lambda rate, **more: GaLoreAdamW(rate, 4, 5, basis="subspace", **more),
    "apollo": lambda rate, **more: APOLLO(rate, 4, 5, **more),
    "apollo mini": lambda rate, **more: APOLLOMini(rate, 5, **more),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = [nn.Linear(8, 16), nn.Linear(16, 8)]
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 11)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.embed_tokens(x)
        return self.lm_head(self.norm(h + self.layers[1](nn.relu(self.layers[0](h)))))


def loss_of(model: Net, x: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), (3 * x + 1) % 11, reduction="mean")


def make_net() -> Net:
    mx.random.seed(0)
    model = Net()
    mx.eval(model.parameters())
    return model


def learn(model: Net, optimizer: optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    step = nn.value_and_grad(model, loss_of)
    for i in range(start, start + steps):
        loss, gradients = step(model, mx.array(np.random.default_rng(i).integers(0, 11, (4, 6))))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_each_learns_in_a_plain_mlx_loop(name: str) -> None:
    losses = learn(make_net(), ALL[name](0.03), 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_each_resumes_bitwise_from_its_saved_state(name: str, tmp_path: Path) -> None:
    """Saved and read again, since BLAS rounding depends on the memory layout of the arrays."""
    rate = make_schedule("cosine", 0.03, 20)
    whole = make_net()
    learn(whole, ALL[name](rate), 13)
    model, optimizer = make_net(), ALL[name](rate)
    learn(model, optimizer, 7)
    saved = dict(tree_flatten(optimizer.state))
    assert all(np.array(array, copy=False).flags.c_contiguous for array in saved.values())
    later = ALL[name](rate)
    later.init(model.trainable_parameters())
    assert {k: v.shape for k, v in tree_flatten(later.state)} == {k: v.shape for k, v in saved.items()}
    mx.save_safetensors(str(tmp_path / "state.safetensors"), saved)
    later.state = tree_map_with_path(
        lambda path, _: mx.load(str(tmp_path / "state.safetensors"))[path], optimizer.state
    )
    later.init(model.trainable_parameters())
    learn(model, later, 6, start=7)
    for (path, a), (_, b) in zip(
        tree_flatten(whole.parameters()), tree_flatten(model.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), path


@pytest.mark.parametrize("name", ALL)
def test_each_keeps_float32_state_and_the_type_of_the_weights(name: str) -> None:
    model = make_net()
    model.set_dtype(mx.bfloat16)
    optimizer = ALL[name](0.03)
    learn(model, optimizer, 2)
    assert {str(a.dtype) for _, a in tree_flatten(model.parameters())} == {"mlx.core.bfloat16"}
    assert all(
        a.dtype == mx.float32
        for path, a in tree_flatten(optimizer.state)
        if path.endswith((".m", ".v", ".left", ".right"))
    )


@pytest.mark.parametrize("name", ALL)
def test_each_decays_weights_that_get_no_gradient(name: str) -> None:
    optimizer = ALL[name](0.5, weight_decay=0.2)
    new = optimizer.apply_gradients({"w": {"weight": mx.zeros((6, 8))}}, {"w": {"weight": mx.ones((6, 8))}})
    assert mx.allclose(new["w"]["weight"], mx.full((6, 8), 0.9), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_each_works_inside_a_multi_optimizer(name: str) -> None:
    model = make_net()
    both = optim.MultiOptimizer([ALL[name](0.03), optim.SGD(0.1)], [lambda path, _: "layers" in path])
    losses = learn(model, both, 20)
    assert losses[-1] < losses[0]


def test_embeddings_norms_head_and_biases_are_not_projected() -> None:
    optimizer = GaLoreAdamW(0.1, 4)
    optimizer.init(make_net().trainable_parameters())
    assert set(optimizer.projected) == {"layers.0.weight", "layers.1.weight"}
    assert (
        "right" not in optimizer.state["embed_tokens"]["weight"]
        and "right" in optimizer.state["layers"][0]["weight"]
    )
    chosen = GaLoreAdamW(0.1, 4, filter=by_modules(["layers.1", "lm_head"]))
    chosen.init(make_net().trainable_parameters())
    assert set(chosen.projected) == {"layers.1.weight", "lm_head.weight"}


def test_an_expert_without_a_token_keeps_its_basis() -> None:
    optimizer = GaLoreAdamW(0.1, 2, update_gap=1, moments="project")
    random = np.random.default_rng(0)
    seen = []
    for step in range(2):
        gradient = mx.array(random.normal(size=(3, 8, 6)).astype(np.float32)) * mx.array(
            [1.0, 1.0, 1.0 - step]
        ).reshape(3, 1, 1)
        optimizer.apply_gradients(
            {"experts": {"up_proj": {"weight": gradient}}},
            {"experts": {"up_proj": {"weight": mx.zeros((3, 8, 6))}}},
        )
        seen.append(optimizer.state["experts"]["up_proj"]["weight"]["right"])
    assert [mx.array_equal(seen[0][i], seen[1][i]).item() for i in range(3)] == [False, False, True]


def test_a_stack_of_experts_gets_a_basis_each() -> None:
    random = np.random.default_rng(0)
    stack = {"experts": {"up_proj": {"weight": mx.array(random.normal(size=(3, 8, 6)).astype(np.float32))}}}
    optimizer = GaLoreAdamW(0.1, 2)
    together = optimizer.apply_gradients(stack, stack)["experts"]["up_proj"]["weight"]
    assert optimizer.state["experts"]["up_proj"]["weight"]["right"].shape == (3, 2, 6)
    for i in range(3):
        one = {"up_proj": {"weight": stack["experts"]["up_proj"]["weight"][i]}}
        alone = GaLoreAdamW(0.1, 2).apply_gradients(one, one)["up_proj"]["weight"]
        assert mx.allclose(together[i], alone, atol=1e-5)


def test_the_state_has_the_size_of_the_formula() -> None:
    """(ar + 2br) numbers against 2ab; <= 0.40 at rank = dim / 4."""
    parameters = {"q_proj": {"weight": mx.zeros((256, 256))}, "up_proj": {"weight": mx.zeros((512, 256))}}
    galore, full = GaLoreAdamW(0.1, 64), AdamW(0.1)
    for optimizer in (galore, full):
        optimizer.init(parameters)

    def of_matrices(path: str, _: mx.array) -> bool:
        return ".weight." in path

    ours, theirs = (state_bytes(optimizer, of_matrices) for optimizer in (galore, full))
    expected = 4 * (3 * 256 * 64 + 256 * 64 + 2 * 512 * 64)
    assert expected <= ours <= expected + 64
    assert ours <= 0.40 * theirs


def gradient_like(seed: int, shape: tuple[int, int] = (12, 8)) -> mx.array:
    random = np.random.default_rng(seed)
    base = np.random.default_rng(99).normal(size=(shape[0], 3)) @ np.random.default_rng(98).normal(
        size=(3, shape[1])
    )
    return mx.array((base + 0.05 * random.normal(size=shape)).astype(np.float32))


def feed(optimizer: Any, steps: int) -> mx.array:
    w = {"w": mx.zeros((12, 8))}
    for i in range(steps):
        w = optimizer.apply_gradients({"w": gradient_like(i)}, w)
        mx.eval(w, optimizer.state)
    return w["w"]


def momentum(optimizer: Any) -> mx.array:
    state = optimizer.state["w"]
    return state["m"] @ state["right"]


@pytest.mark.parametrize(
    ("moments", "low", "high"), [("project", 0.99, 1.01), ("keep", -1.0, 0.9), ("reset", -0.01, 0.01)]
)
def test_only_carried_moments_survive_a_refresh(moments: str, low: float, high: float) -> None:
    """Momentum before and after a refresh that rotates the basis inside the same subspace."""
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0].astype(np.float32)
    seen: list[mx.array] = []

    def basis(gradient: mx.array, rank: int, kind: str, old: Any) -> dict[str, mx.array]:
        if old is None:
            right = np.linalg.qr(np.random.default_rng(98).normal(size=(3, 8)).T)[0].T
            return {"right": mx.array(right.astype(np.float32))}
        seen.append(momentum(optimizer))
        return {"right": mx.array(turn) @ old["right"]}

    optimizer = GaLoreAdamW(0.1, 3, 6, moments=moments, basis=basis)
    feed(optimizer, 6)
    optimizer.project_and_refresh("w", gradient_like(6))
    before, after = seen[0], momentum(optimizer)
    cosine = (before * after).sum() / mx.maximum(
        mx.sqrt(mx.square(before).sum() * mx.square(after).sum()), 1e-12
    )
    assert low <= cosine.item() <= high


def test_a_refresh_is_skipped_while_the_old_basis_captures_the_gradient() -> None:
    found = []

    def basis(gradient: mx.array, rank: int, kind: str, old: Any) -> dict[str, mx.array]:
        from mlx_distill.optim.subspace import find_basis

        found.append(len(found))
        return find_basis(gradient, rank, kind)

    feed(GaLoreAdamW(0.1, 3, 4, basis=basis, refresh_below=0.9), 17)
    assert len(found) == 1
    found.clear()
    feed(GaLoreAdamW(0.1, 3, 4, basis=basis), 17)
    assert len(found) == 5


def test_staggered_refreshes_are_distributed_over_the_gap() -> None:
    parameters = {f"l{i}": {"weight": mx.zeros((8, 6))} for i in range(4)}
    optimizer = GaLoreAdamW(0.1, 2, 8, stagger=True)
    optimizer.init(parameters)
    at = {}
    for updates in range(1, 9):
        for path in parameters:
            if optimizer.needs_refresh(f"{path}.weight", updates):
                at.setdefault(path, []).append(updates)
    assert sorted(at.values()) == [[2], [4], [6], [8]]


def array_of(gradient: Any) -> mx.array:
    return gradient.array if isinstance(gradient, ProjectedGradient) else gradient


def test_sums_of_projected_gradients_equal_the_projected_sum() -> None:
    parameters = {"w": {"weight": gradient_like(50)}, "norm": {"weight": mx.ones((8,))}}

    def gradients(i: int) -> dict[str, mx.array]:
        return {"w.weight": gradient_like(i), "norm.weight": mx.full((8,), 0.1 * i)}

    plain, compact = GaLoreAdamW(0.1, 3, 3), GaLoreAdamW(0.1, 3, 3)
    compact.init(parameters)
    a = b = parameters
    for step in range(7):
        parts = [gradients(10 * step + k) for k in range(4)]
        total = {path: sum((p[path] for p in parts[1:]), parts[0][path]) for path in parts[0]}
        a = plain.apply_gradients(
            {"w": {"weight": total["w.weight"]}, "norm": {"weight": total["norm.weight"]}}, a
        )
        small = [{path: compact.project(path, g) for path, g in p.items()} for p in parts]
        assert array_of(small[0]["w.weight"]).shape == ((12, 8) if step % 3 == 0 else (12, 3))
        summed = {path: sum((p[path] for p in small[1:]), small[0][path]) for path in small[0]}
        low = {path: compact.project_and_refresh(path, g) for path, g in summed.items()}
        assert array_of(low["w.weight"]).shape == (12, 3)
        b = compact.apply_gradients(
            {"w": {"weight": low["w.weight"]}, "norm": {"weight": low["norm.weight"]}}, b
        )
        for (path, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True):
            assert mx.allclose(x, y, atol=1e-5), path


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_projected_gradients_are_leaves_that_an_update_takes_in_place_of_plain_ones(rank: int) -> None:
    """Through ``tree_map`` and ``update``, also where one of the matrices is projected at full rank."""
    plain, projecting = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)) for _ in range(2))
    projecting.update(plain.parameters())
    a, b = (GaLoreAdamW(0.1, rank, 3, filter=lambda path, p: p.ndim == 2) for _ in range(2))
    b.init(projecting.trainable_parameters())
    for step in range(5):
        random = np.random.default_rng(step)
        gradients = tree_map(
            lambda p, random=random: mx.array(random.normal(size=p.shape).astype(np.float32)),
            plain.trainable_parameters(),
        )
        a.update(plain, tree_map(lambda g: g * 0.5, gradients))
        low = tree_map_with_path(b.project_and_refresh, gradients)
        kept = [isinstance(leaf, ProjectedGradient) for _, leaf in tree_flatten(low)]
        assert sum(kept) == (2 if rank < 6 else 1)
        b.update(projecting, tree_map(lambda g: g * 0.5, low))
        for (path, x), (_, y) in zip(
            *(tree_flatten(m.parameters()) for m in (plain, projecting)), strict=True
        ):
            assert mx.allclose(x, y, atol=1e-5), path


@pytest.mark.parametrize("rank", [6, 9])
def test_at_full_rank_gradients_are_projected_in_the_update_alone(rank: int) -> None:
    parameters = {"w": {"weight": mx.zeros((6, 6))}}
    optimizer = GaLoreAdamW(0.1, rank, 2)
    optimizer.init(parameters)
    g = gradient_like(0, (6, 6))
    assert optimizer.paths_to_refresh({"w.weight": g}) == []
    assert optimizer.project_and_refresh("w.weight", optimizer.project("w.weight", g)) is g
    new = optimizer.apply_gradients({"w": {"weight": g}}, parameters)
    assert mx.abs(new["w"]["weight"]).max().item() > 0


def test_bad_settings_are_refused_with_a_fix() -> None:
    for make in (
        lambda: GaLoreAdamW(0.1, 0),
        lambda: GaLoreAdamW(0.1, 2, 0),
        lambda: GaLoreAdamW(0.1, 2, moments="forget"),
        lambda: GaLoreAdamW(0.1, 2, projection="middle"),
        lambda: APOLLO(0.1, 0),
        lambda: make_schedule("steps", 0.1, 10),
        lambda: make_schedule("cosine", 0.1, 0),
        lambda: make_schedule("cosine", 0.1, 10, warmup=1.5),
        lambda: make_schedule("cosine", 0.1, 10, warmup=1.0),
        lambda: make_schedule("wsd", 0.1, 10, warmup=0.81),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 11 / 12, 0.5, 0.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.98296, 0.5, 0.0]),
        ("wsd", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_schedules_have_their_shapes(name: str, expected: list[float]) -> None:
    rate = make_schedule(name, 2.0, 15, warmup=0.2)
    assert [rate(t).item() / 2 for t in (0, 1, 2, 3, 4, 9, 15)] == pytest.approx(expected, abs=1e-5)
    assert rate(mx.array(9, mx.uint64)).item() == rate(9).item()
    assert rate(100).item() == rate(15).item()


@pytest.mark.parametrize("total", [101, 147, 3000])
def test_warm_up_in_steps_has_as_many(total: int) -> None:
    config = TrainConfig(learning_rate=1.0, schedule="constant", warmup=0.5, warmup_steps=100)
    optimizer = make_optimizer(config, total)
    rates = []
    for step in (0, 98, 99, 100):
        optimizer.state["step"] = mx.array(step, mx.uint64)
        rates.append(optimizer._schedulers["learning_rate"](optimizer.step).item())
    assert rates == pytest.approx([1 / 101, 99 / 101, 100 / 101, 1.0])


def test_warm_up_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps: 100 in a training of 100 steps") as caught:
        make_optimizer(TrainConfig(warmup_steps=100), 100)
    assert caught.value.fix


def test_wsd_decays_over_the_last_fifth() -> None:
    rate = make_schedule("wsd", 1.0, 100)
    assert [round(rate(t).item(), 3) for t in (0, 79, 80, 90, 99)] == [1.0, 1.0, 1.0, 0.5, 0.05]


def test_the_recipe_chooses_the_optimizer() -> None:
    galore = make_optimizer(
        TrainConfig(method="galore", galore_rank=7, galore_update_gap=9, galore_scale=0.5), 10
    )
    assert isinstance(galore, GaLoreAdamW) and (galore.rank, galore.update_gap, galore.scale) == (7, 9, 0.5)
    assert galore.filter("model.layers.0.self_attn.q_proj.weight", mx.zeros((4, 4)))
    assert not galore.filter("model.embed_tokens.weight", mx.zeros((4, 4)))
    assert (galore.projection, galore.moments, galore.stagger, galore.refresh_below) == (
        "std",
        "project",
        True,
        0.0,
    )
    own = {
        "galore_projection": "full",
        "galore_moments": "reset",
        "galore_stagger": False,
        "galore_refresh_below": 0.9,
    }
    galore = make_optimizer(TrainConfig(method="galore", **own), 10)
    assert isinstance(galore, GaLoreAdamW)
    assert (galore.projection, galore.moments, galore.stagger, galore.refresh_below) == (
        "full",
        "reset",
        False,
        0.9,
    )
    assert isinstance(make_optimizer(TrainConfig(), 10), AdamW)
    apollo = make_optimizer(TrainConfig(method="apollo", apollo_rank=7, apollo_update_gap=9, seed=3), 10)
    mini = make_optimizer(TrainConfig(method="apollo-mini"), 10)
    assert isinstance(apollo, APOLLO) and isinstance(mini, APOLLO)
    assert (apollo.rank, apollo.update_gap, apollo.scale, apollo.channels, apollo.seed) == (
        7,
        9,
        1.0,
        True,
        3,
    )
    assert (mini.rank, mini.scale, mini.channels) == (1, 128**0.5, False)
    scaled = make_optimizer(TrainConfig(method="apollo-mini", apollo_scale=2.0), 10)
    assert isinstance(scaled, APOLLO) and scaled.scale == 2.0


def test_the_choices_of_a_recipe_are_those_of_the_code() -> None:
    assert set(MOMENTS) == set(recipe_training.MOMENTS) and set(PROJECTIONS) == set(
        recipe_training.PROJECTIONS
    )
    schedules = next(f for f in fields(TrainConfig) if f.name == "schedule").metadata["choices"]
    assert set(SCHEDULES) == set(schedules)
