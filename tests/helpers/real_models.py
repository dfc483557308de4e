"""The same rows in micro-batches of every form, on one and two ranks, for real attention with windows, sinks
and experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from helpers.labels import one_node
from helpers.tiny_model import VOCABULARY
from helpers.training_cases import ATTENTION, GOLDEN, LENGTHS, SEQUENCES, batch_of_sequences
from mlx_distill.distill.align import AlignedRow, align_row, collate_aligned_rows
from mlx_distill.distill.objective import kd
from mlx_distill.distill.token_losses import TOKEN_LOSSES
from mlx_distill.losses.cross_tokenizer import TokenGroups
from mlx_distill.models.load import load_model
from mlx_distill.recipe import DistillConfig, TrainConfig
from mlx_distill.records import Batch
from mlx_distill.train import Objective, RowBatches, make_trainable, sft
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.gradients import window_gradients

KINDS = ["qwen3", "gpt_oss"]
GROUPS = TokenGroups(
    *2 * (np.minimum(np.arange(VOCABULARY), 12).astype(np.int32),),
    count=14,
    shared=12,
    same_token=np.where(np.arange(VOCABULARY) < 12, np.arange(VOCABULARY), -1).astype(np.int32),
    pieces=np.arange(VOCABULARY, dtype=np.int32)[:, None],
)
OBJECTIVES: dict[str, Objective] = {
    "sft": sft(),
    "sft tiled": sft(dense_limit=0),
    **{
        name: kd(
            DistillConfig(token_loss=name),
            one_node(("a", "b"), ((0, 3), (1,))),
            GROUPS,
            same_tokenizer=TOKEN_LOSSES[name].needs == "same_tokenizer",
        )
        for name in ("kl", "js_divergence", "token_groups", "alm", "uld", "gold", "x_token")
    },
}


def make_model(kind: str) -> Any:
    """A golden model whose attention weights are trainable."""
    model, _ = load_model(GOLDEN / f"models_{kind}", dtype="float32")
    make_trainable(model, TrainConfig(method="galore", galore_rank=1, target_modules=ATTENTION))
    return model


def make_pairs() -> list[AlignedRow]:
    """Rows with a teacher's targets; one in three has no label."""
    random, pairs = np.random.default_rng(1), []
    for number, length in enumerate(LENGTHS):
        start, answer = length // 2, length - length // 2 - 1
        spans = np.array([[i, i + 1, i, i + 1] for i in range(answer)])
        logits = random.normal(size=(answer + 1, VOCABULARY))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-logprobs, axis=1)[:, :4]
        pairs.append(
            align_row(
                random.integers(0, VOCABULARY, length),
                start,
                spans,
                teacher_logprobs=logprobs[:, 0].astype(np.float32),
                topk_ids=order.astype(np.int32),
                topk_logprobs=np.take_along_axis(logprobs, order, 1).astype(np.float32),
                label_start=start + 1 if number % 3 else None,
                label_logprobs=np.log(random.dirichlet([1, 1, 1])).tolist(),
            )
        )
    return pairs


PAIRS = make_pairs()


def batch_of(lines: Sequence[Sequence[int]], name: str) -> Batch:
    """Some sequences as a batch for an objective."""
    if name.startswith("sft"):
        return batch_of_sequences(lines)
    return collate_aligned_rows(PAIRS, lines, 0, 3)


def windows(name: str) -> dict[str, list[Batch]]:
    """The same rows, in micro-batches of every form."""
    single, packed = [(row,) for row in range(len(LENGTHS))], SEQUENCES.rows
    return {
        "1x8": [batch_of(single, name)],
        "8x1": [batch_of([row], name) for row in single],
        "one sequence each": [batch_of([line], name) for line in packed],
        "all sequences": [batch_of(packed, name)],
        "one sequence": [batch_of([tuple(range(len(LENGTHS)))], name)],
    }


def shares(name: str, ranks: Ranks) -> dict[str, list[Batch]]:
    """This rank's part of the same rows."""
    forms = windows(name)
    lonely = RowBatches(
        SEQUENCES.lengths,
        lambda some: batch_of(SEQUENCES.rows_of(some), name),
        8,
        0,
        rank=ranks.rank,
        size=ranks.size,
    )
    return {
        "two ranks": forms["8x1"][ranks.rank :: ranks.size],
        "two ranks, packed": forms["one sequence each"][ranks.rank :: ranks.size],
        "two ranks, one without rows": [next(lonely)],
    }


def write_shares(folder: Path, ranks: Ranks) -> None:
    """Save the gradients of the ranks together for every model, objective and micro-batching."""
    for kind in KINDS:
        model = make_model(kind)
        for name, objective in OBJECTIVES.items():
            for form, batches in shares(name, ranks).items():
                found = window_gradients(model, batches, objective, ranks)
                if ranks.rank == 0:
                    here = folder / kind / name / form
                    here.mkdir(parents=True)
                    mx.save_safetensors(str(here / "gradients.safetensors"), found.gradients)
                    (here / "window.json").write_text(
                        json.dumps([found.loss, dict(found.terms), dict(found.weights)])
                    )
