"""A small language model with dropout, its batches, and settings, for the tests of training."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch

VOCABULARY = 23


class Trunk(nn.Module):
    """Embedding, one gated layer with dropout, norm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(width)

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        hidden = self.embed_tokens(inputs)
        hidden = hidden + self.down_proj(self.dropout(nn.silu(self.up_proj(hidden))))
        return self.norm(hidden)


class TinyModel(nn.Module):
    """A trunk and a head, with the layout of mlx-lm's models."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = Trunk(width, dropout)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def __call__(self, inputs: mx.array) -> mx.array:
        return self.lm_head(self.model(inputs))


class Deep(nn.Module):
    """Many layers that are added up, for peaks of memory."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(width, width, bias=False) for _ in range(layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = x + mx.tanh(layer(x))
        return x


def make_model(seed: int = 0, dropout: float = 0.0, width: int = 16) -> TinyModel:
    mx.random.seed(seed)
    model = TinyModel(width, dropout)
    mx.eval(model.parameters())
    return model


def make_rows(count: int, seed: int = 0, low: int = 3, high: int = 9) -> list[tuple[list[int], list[float]]]:
    """Rows of tokens with masks of different weight."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(random.integers(low, high))
        start = int(random.integers(VOCABULARY))
        tokens = [(start + 2 * i) % VOCABULARY for i in range(length + 1)]
        mask = [0.0 if i < int(random.integers(1, 3)) else 1.0 for i in range(length)]
        rows.append((tokens, mask))
    return rows


def collate(rows: list[tuple[list[int], list[float]]], indices: list[int], extra_padding: int = 0) -> Batch:
    """The rows as one right-padded batch."""
    length = max(len(rows[i][1]) for i in indices) + extra_padding
    inputs, labels, mask = (
        np.zeros((len(indices), length), dtype) for dtype in (np.int32, np.int32, np.float32)
    )
    for place, i in enumerate(indices):
        tokens, trained = rows[i]
        inputs[place, : len(trained)], labels[place, : len(trained)], mask[place, : len(trained)] = (
            tokens[:-1],
            tokens[1:],
            trained,
        )
    return Batch(mx.array(inputs), mx.array(labels), mx.array(mask), tuple(indices))


def make_batches(rows: list[tuple[list[int], list[float]]], size: int, **kwargs: Any) -> list[Batch]:
    return [
        collate(rows, list(range(i, min(i + size, len(rows)))), **kwargs) for i in range(0, len(rows), size)
    ]


def settings(**changes: Any) -> TrainConfig:
    plain = {
        "method": "full",
        "learning_rate": 1e-2,
        "accumulate": 2,
        "steps": 6,
        "checkpoint_every": 2,
        "evaluate_every": 0,
    }
    small = {
        "warmup": 0.2,
        "target_modules": ["up_proj", "down_proj"],
        "lora_rank": 4,
        "galore_rank": 4,
        "galore_update_gap": 6,
    }
    small |= {"apollo_rank": 4, "apollo_update_gap": 4}
    return TrainConfig(**{**plain, **small, **changes})
