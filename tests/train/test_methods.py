"""Which weights move, and LoRA and DoRA against PEFT."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from train.tiny import make_model, settings

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.optim import AdamW
from mlx_distill.recipe import TrainConfig
from mlx_distill.train import make_trainable

GOLDEN = {name: np.array(a) for name, a in mx.load(str(Path(__file__).parents[1] / "golden" / "optim_trajectories.safetensors")).items()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 6, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(mx.tanh(self.up(x)))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_walk_as_those_of_peft(kind: str) -> None:
    model = Net()
    model.load_weights([(name, mx.array(GOLDEN[f"start.{name}"])) for name in ("up.weight", "down.weight")])
    make_trainable(model, TrainConfig(method=kind, lora_rank=3, lora_alpha=6.0, lora_dropout=0.0, target_modules=["up", "down"]))
    for name in ("up", "down"):
        model[name].lora_a = mx.array(GOLDEN[f"{kind}.{name}.lora_A.start"].T)
    optimizer, losses = AdamW(0.02, weight_decay=0.01), []
    step = nn.value_and_grad(model, lambda m, x, y: mx.square(m(x) - y).mean())
    for x, y in zip(GOLDEN["x"], GOLDEN["y"], strict=True):
        loss, gradients = step(model, mx.array(x), mx.array(y))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert np.abs(np.array(losses) - GOLDEN[f"{kind}.losses"]).max() <= 1e-5
    for name in ("up", "down"):
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            assert np.abs(np.array(model[name][ours]).T - GOLDEN[f"{kind}.{name}.{theirs}"]).max() <= 1e-5, (name, ours)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", {"model.up_proj.lora_a", "model.up_proj.lora_b"}),
        ("dora", {"model.up_proj.lora_a", "model.up_proj.lora_b", "model.up_proj.m"}),
        ("galore", {"model.up_proj.weight"}),
        ("apollo-mini", {"model.up_proj.weight"}),
    ],
)
def test_a_method_moves_its_own_weights_and_no_others(method: str, expected: set[str]) -> None:
    model = make_model()
    assert make_trainable(model, settings(method=method, target_modules=["up_proj"])) == ["model.up_proj"]
    assert {path for path, _ in tree_flatten(model.trainable_parameters())} == expected


def test_rank_stabilized_adapters_start_with_a_larger_scale() -> None:
    plain, stabilized = make_model(), make_model()
    make_trainable(plain, settings(method="dora", lora_alpha=8.0))
    make_trainable(stabilized, settings(method="dora", lora_alpha=8.0, use_rslora=True))
    assert (plain.model.up_proj.scale, stabilized.model.up_proj.scale) == (2.0, 4.0)


def test_full_moves_what_is_not_packed() -> None:
    model = make_model(width=32)
    nn.quantize(model.model, 32, 4, class_predicate=lambda path, _: path == "up_proj")
    make_trainable(model, settings())
    moving = {path for path, _ in tree_flatten(model.trainable_parameters())}
    assert "model.down_proj.weight" in moving and "lm_head.weight" in moving
    assert not any("up_proj" in path for path in moving)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"galore_rank": 17}, ConfigError, "galore_rank 17 for a matrix of 16 x 32"),
        ({"method": "apollo", "apollo_rank": 17}, ConfigError, "apollo_rank 17 for a matrix of 16 x 32"),
        ({"target_modules": ["gate"]}, ModelError, "'gate' matches nothing"),
        ({"method": "lora", "target_modules": ["gate"]}, ModelError, "'gate' matches nothing"),
        ({"method": "lora", "lora_rank": 17}, ModelError, "rank 17"),
    ],
)
def test_targets_and_ranks_that_do_not_fit_are_refused_with_a_cure(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make_trainable(make_model(), settings(**{"method": "galore", **changes}))
    assert caught.value.fix


def test_galore_refuses_packed_weights() -> None:
    model = make_model(width=32)
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: "up_proj" in path)
    with pytest.raises(ModelError, match="packed"):
        make_trainable(model, settings(method="galore"))
