"""Trunk and head differentiated in two stages: the same numbers and random draws as in one, and only the
arrays that the backward pass needs are kept.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_model import TinyModel, collate, make_model, make_rows, settings
from mlx.utils import tree_flatten

from mlx_distill.losses.numerics import row_logsumexp
from mlx_distill.losses.tiled import linear_rows
from mlx_distill.runtime import random_key
from mlx_distill.train import make_trainable
from mlx_distill.train.grad_checkpoint import checkpointed_layers
from mlx_distill.train.gradients import differentiate
from mlx_distill.train.objective import sft
from mlx_distill.train.trunk_head import can_fill_in_place, fill_in_place, make_trunk, two_stage_grad

BATCH = collate(make_rows(6), list(range(6)))
TWO_STAGE = sft(dense_limit=0)
WHOLE = replace(TWO_STAGE, head_split=None)


def frozen_head(dropout: float = 0.0) -> TinyModel:
    model = make_model(dropout=dropout)
    model.lm_head.freeze()
    model.train()
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_stages_equal_one(dropout: float, dtype: mx.Dtype) -> None:
    """Value, gradient, their types, and the place in the random stream afterwards; the parameters stay what
    they were.
    """
    found = []
    for objective in (TWO_STAGE, WHOLE):
        model = frozen_head(dropout)
        model.set_dtype(dtype)
        before = model.trainable_parameters()
        mx.random.seed(3)
        gradients, parts = differentiate(model, BATCH, objective, {"text": 0.25})
        assert model.model.up_proj.weight is before["model"]["up_proj"]["weight"]
        found.append((dict(gradients), parts["text"].item(), random_key()))
    (one, value, key), (other, expected, their_key) = found
    close: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-7} if dtype == mx.float32 else {"rtol": 2e-2, "atol": 2e-3}
    )
    assert value == pytest.approx(expected, rel=1e-6) and key == their_key and one.keys() == other.keys()
    for path, gradient in one.items():
        assert gradient.dtype == other[path].dtype == dtype
        assert mx.allclose(gradient, other[path], **close), path
    assert mx.abs(one["model.up_proj.weight"]).max().item() > 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_filling_in_place_equals_the_second_pass(compiled: bool) -> None:
    """Bitwise, with dropout, and with the same random state afterwards."""
    assert can_fill_in_place(str(mx.default_device()))
    results = []
    for in_place in (True, False, None):
        model = frozen_head(0.3)
        trunk = make_trunk(model, compiled=True) if compiled else None
        assert TWO_STAGE.head_split is not None
        for seed in (3, 4):
            mx.random.seed(seed)
            gradients, _ = two_stage_grad(
                model, BATCH, TWO_STAGE.head_split, {"text": 0.25}, trunk, in_place=in_place
            )
            mx.eval(gradients)
        results.append((dict(gradients), random_key()))
    (one, key), *others = results
    for other, their_key in others:
        assert key == their_key
        assert all(mx.array_equal(gradient, other[path]) for path, gradient in one.items())


def test_a_graph_reads_the_numbers_that_were_filled_in() -> None:
    array = mx.array([0.0, 0.0])
    graph = array + 1
    fill_in_place(array, mx.array([1.0, float("nan")]))
    assert graph.tolist()[0] == 2.0 and mx.isnan(graph[1]).item()


class Layer(nn.Module):
    """Many arrays that the backward pass does not need."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.proj(x)
        for _ in range(12):
            y = y + 1.0
        return x + 0.1 * y


class DeepTrunk(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, width)
        self.layers = [Layer(width) for _ in range(layers)]

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        hidden = self.embed_tokens(inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class DeepModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = DeepTrunk(64, 8)
        self.lm_head = nn.Linear(64, 64, bias=False)
        self.lm_head.freeze()

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers


def peak(objective: Any, checkpointing: bool) -> float:
    """Peak memory above the weights, in units of the hidden states of the whole batch."""
    mx.random.seed(0)
    model = DeepModel()
    inputs = mx.zeros((8, 512), mx.int32)
    batch = replace(BATCH, inputs=inputs, labels=inputs, mask=mx.zeros((8, 512)).at[0, 0].add(1.0))
    mx.eval(model.parameters(), vars(batch))
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    with checkpointed_layers(model) if checkpointing else nullcontext():
        gradients, _ = differentiate(model, batch, objective, {"text": 1.0})
        mx.eval(gradients)
    return (mx.get_peak_memory() - base) / (8 * 512 * 64 * 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_the_backward_pass_needs_is_kept(checkpointing: bool) -> None:
    """In one graph the evaluation of the head keeps each array of each layer, checkpointed or not."""
    two_stage, whole = peak(TWO_STAGE, checkpointing), peak(WHOLE, checkpointing)
    assert whole > 80 and two_stage < whole / 3, (two_stage, whole)


def nats(z: mx.array, at: slice) -> mx.array:
    return row_logsumexp(z) - z[:, 0]


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_slices_equal_the_whole(method: str, dtype: mx.Dtype) -> None:
    """The gradient of the hidden states, and of the head's own parameters."""
    model = make_model()
    model.set_dtype(dtype)
    make_trainable(model, settings(method=method, target_modules=["lm_head"], lora_dropout=0.0))
    head, hidden = model.lm_head, mx.random.normal((11, 16)).astype(dtype)
    own, found = head.trainable_parameters(), []
    for rows in (0, 4, 64):

        def loss(weights: Any, hidden: mx.array, rows: int = rows) -> mx.array:
            head.update(weights)
            each = (
                linear_rows(nats, hidden, head, rows=rows)
                if rows
                else nats(head(hidden).astype(mx.float32), slice(None))
            )
            return (each * mx.arange(11)).sum()

        value, (by_head, by_hidden) = mx.value_and_grad(loss, argnums=(0, 1))(own, hidden)
        head.update(own)
        found.append([value, by_hidden, *(gradient for _, gradient in tree_flatten(by_head))])
    close: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == mx.float32 else {"rtol": 5e-2, "atol": 5e-2}
    )
    for sliced in found[1:]:
        for one, other in zip(sliced, found[0], strict=True):
            assert one.dtype == other.dtype and mx.allclose(one, other, **close)
    assert linear_rows(nats, hidden[:0], head).shape == (0,)


def test_a_recomputed_slice_has_the_same_dropout() -> None:
    """The derivative by a scale of the adapter's output, against a finite difference with the same key."""
    model = make_model()
    make_trainable(model, settings(method="lora", target_modules=["lm_head"], lora_dropout=0.5))
    head, hidden = model.lm_head, mx.random.normal((11, 16))
    head.lora_b = mx.random.normal(head.lora_b.shape)
    model.train()
    start, weight = random_key(), head.lora_b

    def loss(scale: mx.array) -> mx.array:
        head.lora_b = weight * scale
        return linear_rows(nats, hidden, head, rows=4).sum()

    def at(scale: float) -> float:
        mx.random.seed((start[0] << 32) | start[1])
        return float(loss(mx.array(scale)).item())

    value = at(1.0)
    after = random_key()
    mx.random.seed((start[0] << 32) | start[1])
    found, slope = mx.value_and_grad(loss)(mx.array(1.0))
    assert found.item() == value and random_key() == after != start
    assert slope.item() == pytest.approx((at(1.01) - at(0.99)) / 0.02, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_logits_of_a_trainable_head_are_never_in_memory_together(method: str) -> None:
    width, columns, positions = 8, 4096, 1024
    base = nn.Linear(width, columns, bias=False)
    model = make_model()
    model.lm_head = base
    make_trainable(model, settings(method=method, target_modules=["lm_head"], lora_dropout=0.0))
    hidden, head = mx.random.normal((positions, width)), model.lm_head
    own = head.trainable_parameters()

    def loss(weights: Any, hidden: mx.array) -> mx.array:
        head.update(weights)
        return linear_rows(nats, hidden, head, rows=16).sum()

    mx.eval(hidden, model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(own, hidden))
    head.update(own)
    assert (
        mx.get_peak_memory() - before < positions * columns * 4 / 3
    )  # a third of one copy; the plain form holds several
