"""Packed rows train as unpacked ones do: loss, terms and gradient norm, for real attention with windows, sinks and experts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from train.tiny import VOCABULARY, settings

from mlx_distill.data.packing import Lines, Piece, lay_out, make_lines
from mlx_distill.errors import DataError, Interrupted
from mlx_distill.losses.cross_tokenizer import CellMap
from mlx_distill.losses.labels import LabelTokens
from mlx_distill.models.load import load_model
from mlx_distill.recipe import DistillConfig, TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import StopFlag
from mlx_distill.train import ListBatches, Objective, RowBatches, TrainResult, kd, make_trainable, sft, train
from mlx_distill.train.gradients import evaluate, global_norm, window_gradients
from mlx_distill.train.pairs import Pair, collate_pairs, make_pair
from mlx_distill.train.recompute import recomputed_layers

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = [21, 9, 34, 13, 40, 17, 12, 26]  # of tokens; the golden gpt-oss has a window of 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_model(kind: str) -> Any:
    model, _ = load_model(GOLDEN / f"models_{kind}", dtype="float32")
    make_trainable(model, TrainConfig(method="galore", galore_rank=1, target_modules=ATTENTION))
    return model


def make_pieces() -> list[Piece]:
    random = np.random.default_rng(0)
    rows = [Piece(random.integers(0, VOCABULARY, n).astype(np.int32), random.random(n - 1) < 0.4) for n in LENGTHS]
    return [*rows[:5], replace(rows[5], trained=np.zeros(LENGTHS[5] - 1, dtype=bool)), *rows[6:]]  # one is all prompt


def make_pairs() -> list[Pair]:
    random, pairs = np.random.default_rng(1), []
    for number, length in enumerate(LENGTHS):
        start, answer = length // 2, length - length // 2 - 1
        spans = np.array([[i, i + 1, i, i + 1] for i in range(answer)])
        logits = random.normal(size=(answer + 1, VOCABULARY))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-logprobs, axis=1)[:, :4]
        pairs.append(
            make_pair(
                random.integers(0, VOCABULARY, length), start, spans, teacher_logprobs=logprobs[:, 0].astype(np.float32),
                topk_ids=order.astype(np.int32), topk_logprobs=np.take_along_axis(logprobs, order, 1).astype(np.float32),
                label_at=start + 1 if number % 3 else None, label_logprobs=np.log(random.dirichlet([1, 1, 1])).tolist(),
            )
        )  # fmt: skip
    return pairs


PIECES, PAIRS = make_pieces(), make_pairs()
CELLS = CellMap(*2 * (np.minimum(np.arange(VOCABULARY), 12).astype(np.int32),), cells=14, shared=12)
OBJECTIVES: dict[str, Objective] = {
    "sft": sft(),
    "sft tiled": sft(dense_limit=0),
    **{
        name: kd(DistillConfig(token_loss=name), LabelTokens(("a", "b"), ((0, 3), (1,))), CELLS, same_tokenizer=name == "kl")
        for name in ("kl", "cells", "alm")
    },
}


def batch_of(lines: list[tuple[int, ...]], name: str) -> Batch:
    if name.startswith("sft"):
        return lay_out([[PIECES[row] for row in line] for line in lines], 0, rows=[row for line in lines for row in line])
    return collate_pairs(PAIRS, lines, 0, 3)


def lines_of(capacity: int) -> Lines:
    return make_lines(LENGTHS, capacity, 0, True)


def windows(name: str) -> dict[str, list[Batch]]:
    """The same rows, cut in every way."""
    single, packed = [(row,) for row in range(len(LENGTHS))], list(lines_of(48).rows)
    assert any(len(line) > 1 for line in packed)
    return {
        "1x8": [batch_of(single, name)],
        "8x1": [batch_of([row], name) for row in single],
        "one line each": [batch_of([line], name) for line in packed],
        "all lines": [batch_of(packed, name)],
        "one line": [batch_of([tuple(range(len(LENGTHS)))], name)],
    }


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_unpacked_in_loss_terms_and_gradient(kind: str, name: str) -> None:
    model = make_model(kind)
    found = {cut: window_gradients(model, batches, OBJECTIVES[name]) for cut, batches in windows(name).items()}
    plain = found.pop("1x8")
    norm = global_norm(plain.gradients)
    assert plain.loss > 0 and norm > 0
    for cut, other in found.items():
        assert other.loss == pytest.approx(plain.loss, rel=1e-5), cut
        assert other.terms == pytest.approx(plain.terms, rel=1e-5) and other.weights == plain.weights, cut
        assert global_norm(other.gradients) == pytest.approx(norm, rel=1e-5), cut
        for path, gradient in plain.gradients.items():
            assert mx.abs(other.gradients[path] - gradient).max().item() < 1e-5 * norm, (cut, path)


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_packed_rows_can_be_validated_and_recomputed(kind: str) -> None:
    model = make_model(kind)
    cuts = windows("sft")
    plain = window_gradients(model, cuts["1x8"], sft())
    assert evaluate(model, cuts["one line each"], sft())["loss"] == pytest.approx(plain.loss, rel=1e-5)
    with recomputed_layers(model):
        again = window_gradients(model, cuts["all lines"], sft())
    assert again.loss == pytest.approx(plain.loss, rel=1e-5)
    assert global_norm(again.gradients) == pytest.approx(global_norm(plain.gradients), rel=1e-5)


def test_a_line_that_is_all_prompt_is_passed_over() -> None:
    model = make_model("qwen3")
    prompts = lay_out([[replace(piece, trained=np.zeros_like(piece.trained)) for piece in PIECES[:3]]], 0)
    rest = batch_of([(3, 4)], "sft")
    alone, with_it = (window_gradients(model, batches, sft()) for batches in ([rest], [prompts, rest]))
    assert with_it.loss == alone.loss and global_norm(with_it.gradients) == global_norm(alone.gradients)
    empty = window_gradients(model, [prompts], sft())
    assert empty.loss == 0.0 and not empty.gradients


def source(seed: int = 0, **more: int) -> RowBatches:
    lines = lines_of(48)
    return RowBatches(lines.sizes, lambda chosen: batch_of(lines.batch(chosen), "sft"), 2, seed, **more)  # type: ignore[arg-type]


def test_every_row_comes_once_an_epoch_and_ranks_share_them() -> None:
    alone, ranks = source(), [source(rank=rank, size=2) for rank in range(2)]
    epochs = [[next(alone).rows for _ in range(len(alone))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(len(LENGTHS)))
    assert not epochs[0] == epochs[1] == epochs[2]
    found = [next(rank) for _ in range(len(ranks[0])) for rank in ranks]
    assert [batch.rows for batch in found if batch.rows] == epochs[0]
    spare = next(batch for batch in [*found, next(ListBatches([batch_of([(0, 1)], "sft")], rank=1, size=2))] if not batch.rows)
    assert spare.segments is not None and not spare.mask.any().item()


def run(folder: Path, config: TrainConfig, **more: Any) -> tuple[dict[str, Any], TrainResult]:
    model, _ = load_model(GOLDEN / "models_gpt_oss", dtype="float32")
    make_trainable(model, config)
    result = train(model, source(), sft(), optim.AdamW(1e-2), config, folder=folder, **more)
    return {name: a.tolist() for name, a in tree_flatten(model.trainable_parameters())}, result


def test_a_stopped_run_over_packed_rows_goes_on_bitwise(tmp_path: Path) -> None:
    config = settings(method="lora", target_modules=ATTENTION, packing=True, steps=5, accumulate=1, lora_dropout=0.2)
    whole, _ = run(tmp_path / "whole", config)
    flag = StopFlag()
    with pytest.raises(Interrupted, match="step 3 of 5"):
        run(tmp_path / "cut", config, stop=flag, hooks=[lambda row: setattr(flag, "set", row["step"] == 3)])
    again, result = run(tmp_path / "cut", config)
    assert again == whole and result.resumed == 3


def test_a_packed_batch_that_made_a_nan_is_kept_with_its_segments(tmp_path: Path) -> None:
    plain = sft()
    poisoned = replace(plain, sums=lambda model, batch: {"text": plain.sums(model, batch)["text"] * math.nan})
    model, config = make_model("qwen3"), settings(steps=1, accumulate=1)
    with pytest.raises(DataError, match=r"rows 0, 1, 2"):
        train(model, ListBatches([batch_of([(0, 1, 2)], "sft")]), poisoned, optim.SGD(0.1), config, folder=tmp_path)
    saved = mx.load(str(tmp_path / "nan.safetensors"))
    assert saved["0.segments"].max().item() == 3
