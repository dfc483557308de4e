"""Packed rows train as unpacked ones do: loss, terms and gradient norm, for real attention with windows,
sinks and experts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.list_batches import ListBatches
from helpers.real_models import KINDS, batch_of, make_model, windows
from helpers.tiny_model import settings
from helpers.training_cases import LENGTHS, TOKENIZED, packed_source

from mlx_distill.data.packing import build_batch
from mlx_distill.errors import DataError
from mlx_distill.train import sft, train
from mlx_distill.train.grad_checkpoint import checkpointed_layers
from mlx_distill.train.gradients import global_norm, window_gradients
from mlx_distill.train.validation import evaluate


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_with_validation_and_gradient_checkpointing(kind: str) -> None:
    model = make_model(kind)
    forms = windows("sft")
    plain = window_gradients(model, forms["1x8"], sft())
    assert evaluate(model, forms["one sequence each"], sft())["loss"] == pytest.approx(plain.loss, rel=1e-5)
    with checkpointed_layers(model):
        again = window_gradients(model, forms["all sequences"], sft())
    assert again.loss == pytest.approx(plain.loss, rel=1e-5)
    assert global_norm(again.gradients) == pytest.approx(global_norm(plain.gradients), rel=1e-5)


def test_a_sequence_without_trained_tokens_is_skipped() -> None:
    model = make_model("qwen3")
    prompts = build_batch(
        [[replace(piece, trained=np.zeros_like(piece.trained)) for piece in TOKENIZED[:3]]], 0
    )
    rest = batch_of([(3, 4)], "sft")
    alone, with_it = (window_gradients(model, batches, sft()) for batches in ([rest], [prompts, rest]))
    assert with_it.loss == alone.loss and global_norm(with_it.gradients) == global_norm(alone.gradients)
    empty = window_gradients(model, [prompts], sft())
    assert empty.loss == 0.0 and not empty.gradients


def test_every_row_is_used_once_an_epoch_and_ranks_share_them() -> None:
    alone, ranks = packed_source(), [packed_source(rank=rank, size=2) for rank in range(2)]
    epochs = [[next(alone).rows for _ in range(len(alone))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(len(LENGTHS)))
    assert not epochs[0] == epochs[1] == epochs[2]
    found = [next(rank) for _ in range(len(ranks[0])) for rank in ranks]
    assert [batch.rows for batch in found if batch.rows] == epochs[0]
    spare = next(
        batch
        for batch in [*found, next(ListBatches([batch_of([(0, 1)], "sft")], rank=1, size=2))]
        if not batch.rows
    )
    assert spare.segments is not None and not spare.mask.any().item()


def test_a_packed_batch_with_a_nan_is_saved_with_its_segments(tmp_path: Path) -> None:
    plain = sft()
    poisoned = replace(plain, sums=lambda model, batch: {"text": plain.sums(model, batch)["text"] * math.nan})
    model, config = make_model("qwen3"), settings(steps=1, accumulate=1)
    with pytest.raises(DataError, match=r"rows 0, 1, 2"):
        train(
            model,
            ListBatches([batch_of([(0, 1, 2)], "sft")]),
            poisoned,
            optim.SGD(0.1),
            config,
            folder=tmp_path,
        )
    saved = mx.load(str(tmp_path / "nan.safetensors"))
    assert saved["0.segments"].max().item() == 3
