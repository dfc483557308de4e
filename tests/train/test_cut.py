"""The head apart from the trunk: the same numbers as in one piece, the same random draws, and only what the backward pass needs is kept."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from train.tiny import TinyModel, collate, make_model, make_rows

from mlx_distill.train import cut
from mlx_distill.train.gradients import differentiate
from mlx_distill.train.objectives import sft
from mlx_distill.train.randomness import random_key
from mlx_distill.train.recompute import recomputed_layers

BATCH = collate(make_rows(6), list(range(6)))
CUT = sft(dense_limit=0)
WHOLE = replace(CUT, cut=None)


def frozen_head(dropout: float = 0.0) -> TinyModel:
    model = make_model(dropout=dropout)
    model.lm_head.freeze()
    model.train()
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cut_equals_whole(dropout: float, dtype: mx.Dtype) -> None:
    """Value, gradient, their types, and the place in the random stream afterwards; the parameters stay what they were."""
    found = []
    for objective in (CUT, WHOLE):
        model = frozen_head(dropout)
        model.set_dtype(dtype)
        before = model.trainable_parameters()
        mx.random.seed(3)
        gradients, parts = differentiate(model, BATCH, objective, {"text": 0.25})
        assert model.model.up_proj.weight is before["model"]["up_proj"]["weight"]
        found.append((dict(gradients), parts["text"].item(), random_key()))
    (one, value, key), (other, expected, their_key) = found
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7} if dtype == mx.float32 else {"rtol": 2e-2, "atol": 2e-3}
    assert value == pytest.approx(expected, rel=1e-6) and key == their_key and one.keys() == other.keys()
    for path, gradient in one.items():
        assert gradient.dtype == other[path].dtype == dtype
        assert mx.allclose(gradient, other[path], **close), path
    assert mx.abs(one["model.up_proj.weight"]).max().item() > 1e-3


def test_a_backend_whose_views_are_copies_gets_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fills in (True, False):
        if not fills:
            monkeypatch.setattr(cut, "_fill", lambda array, values: False)
        model = frozen_head(0.3)
        mx.random.seed(3)
        gradients, _ = differentiate(model, BATCH, CUT, {"text": 0.25})
        mx.eval(gradients)
        found.append((dict(gradients), random_key()))
    (one, key), (other, their_key) = found
    assert key == their_key and all(mx.array_equal(gradient, other[path]) for path, gradient in one.items())


def test_a_filled_array_is_read_again_by_the_graph_that_holds_it() -> None:
    held = mx.array([0.0, 0.0])
    waiting = held + 1
    assert cut._fill(held, mx.array([1.0, float("nan")]))
    assert waiting.tolist()[0] == 2.0


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


def peak(objective: Any, recompute: bool) -> float:
    """Above the weights, in hidden states of the whole batch."""
    mx.random.seed(0)
    model = DeepModel()
    inputs = mx.zeros((8, 512), mx.int32)
    batch = replace(BATCH, inputs=inputs, labels=inputs, mask=mx.zeros((8, 512)).at[0, 0].add(1.0))
    mx.eval(model.parameters(), vars(batch))
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    with recomputed_layers(model) if recompute else nullcontext():
        gradients, _ = differentiate(model, batch, objective, {"text": 1.0})
        mx.eval(gradients)
    return (mx.get_peak_memory() - base) / (8 * 512 * 64 * 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_the_backward_pass_needs_is_kept(recompute: bool) -> None:
    """In one piece the evaluation of the head keeps each array of each layer, recomputed or not."""
    cut, whole = peak(CUT, recompute), peak(WHOLE, recompute)
    assert whole > 80 and cut < whole / 3, (cut, whole)
