"""One-hot targets: what replaces the teacher's probabilities in the fair controls, and what stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.small_chain import finished, make_context

from mlx_distill.distill.hard_targets import (
    hard_labels,
    hard_settings,
    own_answer_targets,
    with_hard_labels,
)
from mlx_distill.distill.teacher import generate_answers
from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.losses.labels import label_kl
from mlx_distill.losses.numerics import log_softmax
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.recipe import DistillConfig, load_recipe
from mlx_distill.records import Batch
from mlx_distill.stages.context import read_rows
from mlx_distill.stages.distill import _first_rows, distill, own_answer_rows
from mlx_distill.stages.targets import targets as targets_stage


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_one_hot_label_makes_the_label_term_a_cross_entropy(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = (mx.array(np.log(rng.dirichlet([1.0] * 5, 6)).astype(np.float32)) for _ in range(2))
    hard = hard_labels(teacher)
    best = np.array(teacher)[:, :-1].argmax(1)
    expected = -np.array(log_softmax(student / temperature))[np.arange(6), best] * temperature**2
    np.testing.assert_allclose(label_kl(student, hard, temperature=temperature), expected, rtol=1e-5)
    # Everything else is no label, however probable it is.
    assert mx.argmax(hard_labels(mx.log(mx.array([[0.1, 0.2, 0.7]]))), axis=1).item() == 1
    assert hard_labels(mx.zeros((0, 3))).shape == (0, 3)


def test_a_hard_batch_differs_in_the_labels_alone() -> None:
    zero = mx.zeros((1, 4))
    labels = mx.log(mx.array([[0.4, 0.5, 0.1]]))
    batch = Batch(zero, zero, zero, extra={"label_logprobs": labels, "spans": zero})
    hard = with_hard_labels(lambda rows, chosen, multiple: batch)([], [], 16)
    assert hard.extra["spans"] is zero and hard.inputs is batch.inputs
    assert np.exp(np.array(hard.extra["label_logprobs"])).tolist() == [[0.0, 1.0, 0.0]]


def test_the_weight_of_a_token_loss_goes_to_the_text() -> None:
    settings = DistillConfig(label_weight=0.7, text_weight=0.3, token_weight=2.0, token_loss="alm")
    hard = hard_settings(settings)
    assert (hard.label_weight, hard.text_weight, hard.token_weight) == (0.7, 2.3, 0.0)
    none = hard_settings(replace(settings, token_loss="none"))
    assert (none.text_weight, none.token_weight) == (0.3, 0.0)


def test_own_answers_are_certain_of_each_token_and_of_the_label() -> None:
    context = make_context()
    row = next(iter(read_rows(context, "train")))
    targets = own_answer_targets(row, [5, 6, 7], context.task)
    assert targets.text == row["messages"][-1]["content"] and targets.ids.tolist() == [5, 6, 7]
    assert targets.topk_ids.tolist() == [[5], [6], [7]] and not targets.logprobs.any()
    assert targets.label_logprobs is not None
    assert targets.label_logprobs.argmax() == context.task.labels.index(row["answer"]["colour"])
    assert np.exp(targets.label_logprobs).sum() == 1


def test_the_first_rows_keep_all_their_targets_and_the_validation_rows() -> None:
    joined: list[Any] = [("train", {"id": i}, n) for i in "abc" for n in range(2)] + [
        ("valid", {"id": "v"}, 0)
    ]
    kept = [(row["id"], n) for _, row, n in _first_rows(iter(joined), 2)]
    assert kept == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("v", 0)]
    assert list(_first_rows(iter(joined), 0)) == joined


def test_samples_of_unsampled_text_and_one_hot_labels_without_a_label_term_are_refused() -> None:
    for overrides, message in (
        (["targets.text=greedy", "targets.samples=2"], r"targets\.samples"),
        (["controls.labels_hard=true", "distill.label_weight=0"], r"controls\.labels_hard"),
        (["controls.teacher_hard=true", "distill.label_weight=0"], r"controls\.teacher_hard"),
    ):
        recipe = load_recipe("tiny", overrides)
        with pytest.raises(ConfigError, match=message):
            graph(recipe, recipe.load_task())
    recipe = load_recipe("tiny", ["controls.labels_hard=true", "controls.teacher_hard=true"])
    parents = {stage.name: stage.parents for stage in graph(recipe, recipe.load_task())}
    assert parents["student_labels_hard"] == ("student_base", "data")  # it knows nothing of the teacher
    assert "targets" in parents["student_teacher_hard"]


@pytest.mark.slow
def test_a_sampled_answer_depends_on_its_own_seed_alone() -> None:
    model, tokenizer = load(finished() / "out" / "teacher", dtype="float32")
    prompts = [row["messages"][:-1] for row in list(read_rows(make_context(), "train"))[:4]]

    def tokens(some: list[Any], seeds: list[tuple[int, ...]] | None, batch_size: int = 4) -> list[Any]:
        return [g.tokens for g in generate_answers(model, tokenizer, some, 12, batch_size, seeds)]

    seeds = [(0, 0, n) for n in range(4)]
    first = tokens(prompts, seeds)
    assert tokens(prompts[2:], seeds[2:], 1) == first[2:]
    assert tokens(prompts, [(0, 1, n) for n in range(4)]) != first
    others = [tokens(prompts, [(0, sample, n) for n in range(4)]) for sample in range(1, 4)]
    assert sum(other != tokens(prompts, None) for other in others) >= 2


@pytest.mark.slow
def test_each_training_row_has_its_samples_in_order_after_an_interruption_too(tmp_path: Path) -> None:
    context = make_context("targets.text=sampled", "targets.samples=3", "targets.max_rows=30")
    ids = [row["id"] for row in read_rows(context, "train")][:30]
    valid = [row["id"] for row in read_rows(context, "valid")]
    targets_stage(context, tmp_path)
    whole = [(row.id, row.text) for row in TargetReader(tmp_path)]
    assert [id for id, _ in whole] == [id for id in ids for _ in range(3)] + valid
    # The last shards are gone, as after a kill.
    for path in sorted(tmp_path.glob("*-0000[1-9].*")):
        path.unlink()
    targets_stage(context, tmp_path)
    assert [(row.id, row.text) for row in TargetReader(tmp_path)] == whole


@pytest.mark.slow
def test_the_fair_controls_train_on_the_first_rows_and_differ_from_the_student(tmp_path: Path) -> None:
    overrides = ("distill.max_rows=8", "distill.steps=2", "distill.evaluate_every=0")
    context = make_context(*overrides)
    weights: dict[str | None, Any] = {}
    for control in (None, "labels", "labels_hard", "teacher_hard"):
        folder = tmp_path / str(control)
        folder.mkdir()
        facts = distill(context, folder, control)
        assert facts["rows"] == 8
        weights[control] = mx.load(str(folder / "adapters.safetensors"))
    names = list(weights)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert any(
                not mx.array_equal(weights[first][k], weights[second][k]).item() for k in weights[first]
            )


@pytest.mark.slow
def test_the_rows_of_labels_hard_have_their_own_labels_and_tokens(tmp_path: Path) -> None:
    context = make_context("distill.max_rows=12")
    tokenizer = load_tokenizer(finished() / "out" / "student_base")
    train, valid, inputs = own_answer_rows(context, tmp_path, tokenizer, context.recipe.distill)
    source = list(read_rows(context, "train"))[:12]
    assert len(train) == 12 and len(valid) and inputs["same_tokenizer"]
    for aligned, row in zip(train, source, strict=True):
        assert aligned.label_logprobs is not None and aligned.label_start is not None
        assert context.task.labels[aligned.label_logprobs.argmax()] == row["answer"]["colour"]
        assert tokenizer.decode(aligned.tokens[aligned.start : -1].tolist()) == row["messages"][-1]["content"]
        assert aligned.topk_ids[:, 0].tolist() == aligned.tokens[aligned.starts].tolist()
