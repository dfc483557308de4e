"""Which weights each method trains, and LoRA and DoRA against PEFT."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny_model import make_model, settings
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.optim import AdamW, make_optimizer
from mlx_distill.recipe import TrainConfig
from mlx_distill.train import make_trainable

GOLDEN = {
    name: np.array(a)
    for name, a in mx.load(
        str(Path(__file__).parents[1] / "golden" / "optim_trajectories.safetensors")
    ).items()
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 6, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(mx.tanh(self.up(x)))


@pytest.mark.parametrize("kind", ["lora", "dora", "whole"])
def test_adapters_train_as_those_of_peft(kind: str) -> None:
    """``whole`` has an adapter on one matrix and trains all weights of the other."""
    model = Net()
    model.load_weights([(name, mx.array(GOLDEN[f"start.{name}"])) for name in ("up.weight", "down.weight")])
    targets, whole = (["up"], ["down"]) if kind == "whole" else (["up", "down"], [])
    config = TrainConfig(
        method="dora" if kind == "dora" else "lora",
        lora_rank=3,
        lora_alpha=6.0,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=whole,
    )
    assert make_trainable(model, config) == (["up", "down"] if whole else ["down", "up"])
    for name in targets:
        model[name].lora_a = mx.array(GOLDEN[f"{kind}.{name}.lora_A.start"].T)
    optimizer, losses = AdamW(0.02, weight_decay=0.01), []
    step = nn.value_and_grad(model, lambda m, x, y: mx.square(m(x) - y).mean())
    for x, y in zip(GOLDEN["x"], GOLDEN["y"], strict=True):
        loss, gradients = step(model, mx.array(x), mx.array(y))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert len(losses) == 20 and np.abs(np.array(losses) - GOLDEN[f"{kind}.losses"]).max() <= 1e-5
    names = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m", "weight": "weight"}
    ends = {
        key: array
        for key, array in GOLDEN.items()
        if key.startswith(f"{kind}.") and key.rpartition(".")[2] in names
    }
    assert len(ends) == {"lora": 4, "dora": 6, "whole": 3}[kind]
    for key, theirs in ends.items():
        _, name, leaf = key.split(".")
        ours = np.array(model[name][names[leaf]])
        assert np.abs((ours if leaf == "weight" else ours.T) - theirs).max() <= 1e-5, key


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", {"model.up_proj.lora_a", "model.up_proj.lora_b"}),
        ("dora", {"model.up_proj.lora_a", "model.up_proj.lora_b", "model.up_proj.m"}),
        ("galore", {"model.up_proj.weight"}),
        ("apollo-mini", {"model.up_proj.weight"}),
    ],
)
def test_a_method_trains_its_own_weights_and_no_others(method: str, expected: set[str]) -> None:
    model = make_model()
    assert make_trainable(model, settings(method=method, target_modules=["up_proj"])) == ["model.up_proj"]
    assert {path for path, _ in tree_flatten(model.trainable_parameters())} == expected


@pytest.mark.parametrize("method", ["lora", "dora", "galore", "apollo", "apollo-mini"])
def test_modules_to_save_are_trained_by_adamw(method: str) -> None:
    """At every step they equal those of an AdamW that updates only them."""
    config = settings(
        method=method,
        target_modules=["up_proj"],
        modules_to_save=["embed_tokens", "norm"],
        schedule="constant",
        warmup=0.0,
    )
    model, rate = make_model(), config.learning_rate
    assert make_trainable(model, config) == ["model.up_proj", "model.embed_tokens", "model.norm"]
    trainable = {path: a.shape for path, a in tree_flatten(model.trainable_parameters())}
    assert "model.embed_tokens.weight" in trainable and "model.norm.weight" in trainable
    assert not any("down_proj" in path or "lm_head" in path for path in trainable)
    optimizer, alone = make_optimizer(config, 3), AdamW(rate)
    own = {name: model.model[name]["weight"] for name in ("embed_tokens", "norm")}
    random = np.random.default_rng(0)
    for _ in range(3):
        flat = {
            path: mx.array(random.normal(size=shape).astype(np.float32)) for path, shape in trainable.items()
        }
        optimizer.update(model, tree_unflatten(list(flat.items())))
        own = alone.apply_gradients({name: flat[f"model.{name}.weight"] for name in own}, own)
        for name, weight in own.items():
            assert mx.allclose(model.model[name].weight, weight, atol=1e-4), (
                name
            )  # they differ in where epsilon stands
    state = dict(tree_flatten(optimizer.state))
    assert (
        sum(state[f"model.embed_tokens.weight.{m}"].nbytes for m in "mv")
        == 8 * model.model.embed_tokens.weight.size
    )


def test_rank_stabilized_adapters_start_with_a_larger_scale() -> None:
    plain, stabilized = make_model(), make_model()
    make_trainable(plain, settings(method="dora", lora_alpha=8.0))
    make_trainable(stabilized, settings(method="dora", lora_alpha=8.0, use_rslora=True))
    assert (plain.model.up_proj.scale, stabilized.model.up_proj.scale) == (2.0, 4.0)


def test_full_trains_what_is_not_quantized() -> None:
    model = make_model(width=32)
    nn.quantize(model.model, 32, 4, class_predicate=lambda path, _: path == "up_proj")
    make_trainable(model, settings())
    trainable = {path for path, _ in tree_flatten(model.trainable_parameters())}
    assert "model.down_proj.weight" in trainable and "lm_head.weight" in trainable
    assert not any("up_proj" in path for path in trainable)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"galore_rank": 17}, ConfigError, "galore_rank 17 for a matrix of 16 x 32"),
        ({"method": "apollo", "apollo_rank": 17}, ConfigError, "apollo_rank 17 for a matrix of 16 x 32"),
        ({"target_modules": ["gate"]}, ModelError, "'gate' matches nothing"),
        ({"method": "lora", "target_modules": ["gate"]}, ModelError, "'gate' matches nothing"),
        ({"method": "lora", "lora_rank": 17}, ConfigError, "rank 17"),
        ({"modules_to_save": ["q_norm"]}, ModelError, "'q_norm' matches nothing"),
        ({"method": "dora", "modules_to_save": ["norms"]}, ModelError, "'norms' matches nothing"),
        (
            {"modules_to_save": ["model.up_proj"]},
            ConfigError,
            "model.up_proj in target_modules and in modules_to_save",
        ),
    ],
)
def test_targets_and_ranks_that_do_not_fit_are_refused_with_a_fix(
    changes: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        make_trainable(make_model(), settings(**{"method": "galore", **changes}))
    assert caught.value.fix


def test_galore_refuses_quantized_weights() -> None:
    model = make_model(width=32)
    nn.quantize(model, 32, 4, class_predicate=lambda path, _: "up_proj" in path)
    with pytest.raises(ModelError, match="quantized"):
        make_trainable(model, settings(method="galore"))
    with pytest.raises(ModelError, match="up_proj: modules_to_save cannot train quantized weights"):
        make_trainable(
            model, settings(method="galore", target_modules=["down_proj"], modules_to_save=["up_proj"])
        )
