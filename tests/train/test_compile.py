"""The compiled trunk: the numbers and random draws of the plain one, one trace for each shape of batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import collate, make_batches, make_model, make_rows, settings
from helpers.training_cases import run_case
from mlx.utils import tree_map_with_path

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import build_batch
from mlx_distill.errors import ConfigError
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.models.load import load_model
from mlx_distill.optim import make_optimizer
from mlx_distill.recipe import ATTENTION
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key
from mlx_distill.train import sft, train
from mlx_distill.train.grad_checkpoint import checkpointed_layers
from mlx_distill.train.gradients import differentiate
from mlx_distill.train.trunk_head import make_trunk

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = make_rows(12)


def make(kind: str, trained: str) -> Any:
    """Adapters with dropout that are no longer zero, or every weight, the head included."""
    model, _ = load_model(GOLDEN / f"models_{kind}", dtype="float32")
    mx.random.seed(1)
    if trained == "adapters":
        add_lora(model, LoraSettings(2, 4.0, 0.3, ATTENTION))
        model.update(
            tree_map_with_path(lambda _, x: x + 0.1 * mx.random.normal(x.shape), model.trainable_parameters())
        )
    else:
        model.unfreeze()
    mx.eval(model.parameters())
    return model.train()


def batch_of(columns: int, lines: list[list[int]], seed: int) -> Batch:
    random = np.random.default_rng(seed)
    pieces = [
        [
            TokenizedRow(random.integers(0, columns, n).astype(np.int32), random.random(n - 1) < 0.5)
            for n in line
        ]
        for line in lines
    ]
    return build_batch(pieces, 0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["adapters", "everything"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt_oss"])
def test_a_compiled_trunk_equals_one_graph(kind: str, trained: str, checkpointing: bool) -> None:
    """Values, gradients and the place in the random stream, alone and packed, before and after an update of
    the weights.
    """
    model = make(kind, trained)
    columns = model.model.embed_tokens.weight.shape[0]
    with checkpointed_layers(model) if checkpointing else nullcontext():
        trunk = make_trunk(model, compiled=True)
        for number, lines in enumerate(([[12], [9]], [[6, 7], [14]], [[13], [11]])):
            batch = batch_of(columns, lines, number)
            found = []
            for objective, by in (
                (replace(sft(), head_split=None), None),
                (sft(), trunk),
                (sft(dense_limit=0), trunk),
            ):
                mx.random.seed(number)
                gradients, parts = differentiate(model, batch, objective, {"text": 0.5}, by)
                found.append((dict(gradients), parts["text"].item(), random_key()))
            (plain, value, key), *others = found
            scale = max(mx.abs(gradient).max().item() for gradient in plain.values())
            for gradients, other, their_key in others:
                assert (
                    other == pytest.approx(value, rel=1e-5)
                    and their_key == key
                    and gradients.keys() == plain.keys()
                )
                for path, gradient in plain.items():
                    assert mx.abs(gradients[path] - gradient).max().item() < 1e-5 * scale, path
            assert scale > 1e-3
            model.update(
                tree_map_with_path(
                    lambda path, x, plain=plain: x - 0.1 * plain[path], model.trainable_parameters()
                )
            )


def test_one_trace_for_each_shape_and_no_tracers_in_the_weights() -> None:
    traces = 0

    model = make_model()
    plain = type(model.model).__call__

    class Trunk(type(model.model)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> mx.array:
            nonlocal traces
            traces += 1
            return plain(self, *args)

    object.__setattr__(model.model, "__class__", Trunk)
    trunk = make_trunk(model, compiled=True)
    for batch in [collate(ROWS, [0, 1], extra) for extra in (0, 3, 0, 3, 0)]:
        differentiate(model, batch, sft(), {"text": 1.0}, trunk)
        mx.eval(model.parameters())  # tracers could not be
    assert traces == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "galore", "full"])
def test_a_compiled_run_equals_the_plain_one(tmp_path: Path, method: str) -> None:
    """With dropout, accumulation, a schedule and a refresh of the bases."""
    plain, compiled = (
        run_case(tmp_path / str(on), {"method": method, "compile": on})[0] for on in (False, True)
    )
    for path, weight in plain.items():
        assert mx.allclose(compiled[path], weight, rtol=1e-5, atol=1e-5), path


def test_an_objective_without_a_head_split_cannot_be_compiled(tmp_path: Path) -> None:
    config = settings(compile=True)
    with pytest.raises(ConfigError, match="compile: true for an objective in one piece"):
        train(
            make_model(),
            ListBatches(make_batches(ROWS, 2)),
            replace(sft(), head_split=None),
            make_optimizer(config, 6),
            config,
            folder=tmp_path,
        )
