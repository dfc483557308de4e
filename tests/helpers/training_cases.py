"""Trainings that are stopped, killed and distributed over ranks: one list of settings, and how to run one.

A new kind of training that has to resume bitwise is an entry of ``CASES``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from helpers.list_batches import ListBatches
from helpers.tiny_model import VOCABULARY, make_batches, make_model, make_rows, settings
from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import build_batch, plan_sequences
from mlx_distill.models.load import load_model
from mlx_distill.optim import galore, make_optimizer
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.train import (
    BatchSource,
    RowBatches,
    TrainResult,
    make_trainable,
    sft,
    total_steps,
    train,
)
from mlx_distill.train.distributed import current_ranks
from mlx_distill.train.profiling import Stopwatch

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = [21, 9, 34, 13, 40, 17, 12, 26]  # of tokens; the golden gpt-oss has a window of 8
SEQUENCES = plan_sequences(LENGTHS, 40, 0, True)  # five, so that two ranks do not come out even
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PACKED: dict[str, Any] = {"packing": True, "target_modules": ATTENTION, "evaluate_every": 0}

# By default seven steps of two micro-batches with warm-up, decay and dropout, and with a refresh of the bases
# and a validation after the interruption. A case lists what differs.
CASES: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "galore"},
    {"method": "full", "schedule": "wsd"},
    {"method": "dora"},
    {"method": "apollo"},
    {"method": "apollo-mini"},
    {"method": "full", "stream_gradients": True, "accumulate": 1},
    {"method": "apollo", "stream_gradients": True, "accumulate": 1, "clip_norm": 0.0},
    {
        "method": "galore",
        "stream_gradients": True,
        "accumulate": 1,
        "galore_stagger": True,
        "galore_moments": "project",
    },
    {"method": "full", "steps": 0, "epochs": 2.5, "accumulate": 4},
    {
        "method": "full",
        "steps": 40,
        "evaluate_every": 1,
        "learning_rate": 0.5,
        "patience": 3,
        "use_best": True,
        "keep_checkpoints": 1,
    },
    {"method": "lora", **PACKED, "grad_checkpoint": True},
    {
        "method": "galore",
        **PACKED,
        "galore_rank": 2,
        "grad_checkpoint": True,
        "stream_gradients": True,
        "accumulate": 1,
    },
    {"method": "galore", **PACKED, "galore_rank": 1, "galore_projection": "full", "galore_moments": "keep"},
    {
        "method": "galore",
        **PACKED,
        "galore_rank": 1,
        "galore_projection": "full",
        "galore_moments": "project",
        "galore_update_gap": 2,
    },
    {"method": "full", "schedule": "wsd", "compile": True},
    {"method": "galore", "compile": True},
    {"method": "lora", **PACKED, "grad_checkpoint": True, "compile": True},
]
# Those that a real process is killed in; the first imports least.
KILLED = CASES[-3:]


def name_of(case: dict[str, Any]) -> str:
    """The test id of a case."""
    return " ".join(
        str(v) if k == "method" else f"{k}={v}" for k, v in case.items() if k not in PACKED or k == "packing"
    )


def make_tokenized_rows() -> list[TokenizedRow]:
    """Rows of :data:`LENGTHS`, one of them without trained tokens."""
    generator = np.random.default_rng(0)
    rows = [
        TokenizedRow(generator.integers(0, VOCABULARY, n).astype(np.int32), generator.random(n - 1) < 0.4)
        for n in LENGTHS
    ]
    rows[5].trained[:] = False
    return rows


TOKENIZED = make_tokenized_rows()


def batch_of_sequences(lines: Sequence[Sequence[int]]) -> Batch:
    """Some sequences of rows as a batch."""
    return build_batch(
        [[TOKENIZED[row] for row in line] for line in lines], 0, rows=[row for line in lines for row in line]
    )


def packed_source(batch_size: int = 2, seed: int = 0, **more: Any) -> RowBatches:
    """Batches of :data:`SEQUENCES`."""
    return RowBatches(
        SEQUENCES.lengths,
        lambda chosen: batch_of_sequences(SEQUENCES.rows_of(chosen)),
        batch_size,
        seed,
        **more,
    )


def start_of(case: dict[str, Any], dropout: float = 0.2) -> tuple[Any, TrainConfig]:
    """The model before the first step, with its trainable parameters unfrozen, and the settings."""
    config = settings(**{"steps": 7, "evaluate_every": 3, "lora_dropout": dropout, **case})
    model = (
        load_model(GOLDEN / "models_gpt_oss", dtype="float32")[0]
        if config.packing
        else make_model(dropout=dropout)
    )
    make_trainable(model, config)
    return model, config


def run_case(
    folder: Path, case: dict[str, Any], dropout: float = 0.2, **more: Any
) -> tuple[dict[str, mx.array], TrainResult]:
    """Train, or resume; the weights and the result."""
    model, config = start_of(case, dropout)
    ranks, rows = current_ranks(), make_rows(24)
    valid = make_batches(rows, 8) if config.evaluate_every else []
    source: BatchSource
    if config.packing:
        source = packed_source(1, config.seed, rank=ranks.rank, size=ranks.size)
    else:
        source = ListBatches(make_batches(rows, 2), config.seed, rank=ranks.rank, size=ranks.size)
    optimizer = make_optimizer(config, total_steps(config, len(source)))
    result = train(model, source, sft(), optimizer, config, folder=folder, valid=valid, **more)
    return dict(tree_flatten(model.trainable_parameters())), result


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")}
        for row in rows
    ]


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    """Whether two sets of weights are equal bit by bit."""
    return a.keys() == b.keys() and all(mx.array_equal(a[path], b[path]).item() for path in b)


@contextmanager
def hit_after(parts: int, hit: Any) -> Iterator[list[int]]:
    """Inside, ``hit()`` is called at the start of the given part of the steps; the list counts the parts."""
    plain, begun = Stopwatch.part, [0]

    def part(self: Stopwatch, name: str) -> Any:
        begun[0] += 1
        if begun[0] == parts:
            hit()
        return plain(self, name)

    Stopwatch.part = part  # type: ignore[method-assign]
    try:
        yield begun
    finally:
        Stopwatch.part = plain  # type: ignore[method-assign]


@contextmanager
def counted_bases() -> Iterator[list[str]]:
    """Inside, the list gets a line for each basis that this process computes."""
    plain, found = galore.find_basis, []

    def counted(gradient: mx.array, *arguments: Any) -> Any:
        found.append(str(gradient.shape))
        return plain(gradient, *arguments)

    galore.find_basis = counted  # type: ignore[assignment]
    try:
        yield found
    finally:
        galore.find_basis = plain


def random_part(seed: str, low: int = 1, high: int = 70) -> int:
    """A random number of parts; only the streamed cases have fewer than 74."""
    return random.Random(seed).randrange(low, high)
