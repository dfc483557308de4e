"""The teacher beside the student: its distributions, every loss from them, the stage, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.given_logits import GivenLogits
from helpers.small_chain import finished, make_context
from helpers.tiny_model import VOCABULARY, make_model
from mlx.utils import tree_flatten

from mlx_distill.distill.align import AlignedRow, collate_aligned_rows
from mlx_distill.distill.live_teacher import LiveTeacher, with_live_teacher
from mlx_distill.distill.objective import kd
from mlx_distill.distill.token_losses import TOKEN_LOSSES, TokenLossInput
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.losses import TokenGroups, divergences
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.recipe import DistillConfig, load_recipe
from mlx_distill.records import Batch
from mlx_distill.stages.distill import aligned_rows

NO_TOKENIZER = None


def row(length: int, start: int, seed: int) -> AlignedRow:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)
    n = length - start
    empty = np.zeros(n, np.float32)
    return AlignedRow(
        tokens,
        start,
        None,
        None,
        starts=np.arange(start, length, dtype=np.int32),
        topk_ids=np.zeros((n, 1), np.int32),
        topk_logprobs=empty[:, None],
        spans=np.zeros((0, 2), np.int32),
        span_logprobs=np.zeros(0, np.float32),
        teacher_starts=np.arange(start, length, dtype=np.int32),
        teacher_tokens=tokens,
    )


ROWS = [row(9, 4, 0), row(21, 3, 1), row(12, 11, 2)]


def collate_plain(rows: Sequence[AlignedRow], chosen: Sequence[Any], multiple: int) -> Batch:
    return collate_aligned_rows(rows, chosen, 0, 1, multiple)


def plain(model: Any) -> np.ndarray:
    """The logits at the starts of all rows, a row at a time."""
    parts = [np.array(model(mx.array(r.tokens[None])))[0, r.starts - 1] for r in ROWS]
    return np.concatenate(parts).astype(np.float64)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def test_the_distributions_are_the_whole_ones_of_each_row_alone() -> None:
    teacher = LiveTeacher(make_model(), NO_TOKENIZER)
    found = teacher.distribution(teacher.hidden(ROWS), 2.0)
    np.testing.assert_allclose(found.logprobs, log_softmax(plain(teacher.model) / 2), atol=1e-5)
    narrow = teacher.distribution(teacher.hidden(ROWS), 1.0, 7)
    np.testing.assert_allclose(narrow.logprobs, log_softmax(plain(teacher.model)[:, :7]), atol=1e-5)
    assert (np.array(narrow.ids) == np.arange(7)).all()


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js_divergence", "skew_kl", "total_variation"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_divergence_is_that_of_the_whole_distributions(name: str, temperature: float) -> None:
    teacher = LiveTeacher(make_model(), NO_TOKENIZER)
    collate = with_live_teacher(collate_plain, teacher)
    extra = collate(ROWS, [(0, 1), 2], 1).extra
    student = mx.array(np.random.default_rng(5).normal(size=(len(extra["start_index"]), VOCABULARY)) * 2)
    student = student.astype(mx.float32)
    data = TokenLossInput(
        GivenLogits(student), extra, lambda: student[:, 0], None, temperature, teacher=teacher
    )
    exact = getattr(divergences, "forward_kl" if name == "kl" else name)
    dense = mx.array(plain(teacher.model).astype(np.float32))
    expected = exact(student, dense, temperature=temperature)
    np.testing.assert_allclose(TOKEN_LOSSES[name].loss(data), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, loss in TOKEN_LOSSES.items()
        if loss.needs != "same_tokenizer" and loss.events == "start_index"
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_between_two_tokenizers_it_is_a_cache_of_every_token(name: str, temperature: float) -> None:
    teacher, tokens = LiveTeacher(make_model(), NO_TOKENIZER), np.arange(VOCABULARY, dtype=np.int32)
    same = np.where(tokens < 9, (tokens * 5) % VOCABULARY, -1).astype(np.int32)
    groups = TokenGroups(
        tokens % 6, tokens % 6, 7, 9, same, np.stack([tokens, (tokens + 1) % VOCABULARY], axis=1)
    )
    extra = with_live_teacher(collate_plain, teacher)(ROWS, [(0, 1), 2], 1).extra
    student = mx.array(np.random.default_rng(5).normal(size=(len(extra["start_index"]), VOCABULARY)) * 2)
    student = student.astype(mx.float32)
    t = temperature if TOKEN_LOSSES[name].over_tokens else 1.0
    whole = teacher.distribution(teacher.hidden(ROWS), t)
    given = (GivenLogits(student), extra, lambda: student[:, 0], groups, temperature)
    cached = {"topk_ids": whole.ids, "topk_logprobs": whole.logprobs, "temperature": mx.array([t])}
    data = TokenLossInput(*given, teacher=teacher)
    found = np.array(TOKEN_LOSSES[name].loss(data))
    expected = TOKEN_LOSSES[name].loss(replace(data, teacher=None, extra={**extra, **cached}))
    assert found.min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class SomeIds:
    """A tokenizer whose ids leave out some columns of the head."""

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY - 3) if i != 2}


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js_divergence", "skew_kl", "total_variation"])
@pytest.mark.parametrize("tokenizer", [None, SomeIds()], ids=["all columns", "some columns"])
def test_by_tiles_of_both_heads_value_and_gradient_are_the_dense_ones(name: str, tokenizer: Any) -> None:
    teacher = LiveTeacher(make_model(), tokenizer)
    batch = with_live_teacher(collate_plain, teacher)(ROWS, [0, 1, 2], 1)
    settings = replace(
        DistillConfig(),
        teacher="live",
        token_loss=name,
        label_weight=0.0,
        text_weight=0.0,
        token_weight=1.0,
        temperature=2.0,
    )
    student = make_model(seed=3)
    student.freeze()
    student.model.up_proj.unfreeze()
    found = []
    for limit in (1 << 24, 0):
        objective = kd(settings, same_tokenizer=True, teacher=teacher, dense_limit=limit)
        loss = nn.value_and_grad(student, lambda model, one=objective: one.sums(model, batch)["token"])
        value, gradient = loss(student)
        found.append([value, *(array for _, array in tree_flatten(gradient))])
    for dense, tiled in zip(*found, strict=True):
        assert np.abs(np.array(dense)).max() > 0
        np.testing.assert_allclose(tiled, dense, rtol=2e-4, atol=2e-5 * np.abs(np.array(dense)).max())
    tiles = teacher.tiled_head(VOCABULARY, masked=name != "reverse_kl")
    assert (tiles is None) == (name == "reverse_kl" and tokenizer is not None)


def test_a_head_that_has_other_columns_or_a_soft_cap_and_unused_ones_is_not_read_in_tiles() -> None:
    assert LiveTeacher(make_model(), None).tiled_head(VOCABULARY + 1) is None
    model = make_model()
    model.final_logit_softcapping = 30.0
    assert LiveTeacher(model, SomeIds()).tiled_head(VOCABULARY) is None
    capped = LiveTeacher(model, None).tiled_head(VOCABULARY)
    assert capped is not None and capped.softcap == 30.0


def test_the_objective_needs_the_teacher_that_the_recipe_names() -> None:
    live = replace(DistillConfig(), teacher="live", label_weight=0.0)
    with pytest.raises(ConfigError, match="no live teacher is given"):
        kd(live, same_tokenizer=True)
    with pytest.raises(ConfigError, match="a live teacher is given"):
        kd(
            replace(live, teacher="cached"),
            same_tokenizer=True,
            teacher=LiveTeacher(make_model(), NO_TOKENIZER),
        )


@pytest.mark.slow
def test_aligned_rows_of_a_live_teacher_have_its_chat_and_a_cache_is_a_lower_bound(folder: Path) -> None:
    context, out = make_context("distill.teacher=live", "distill.label_weight=0"), finished() / "out"
    student, tokenizer = load(out / "student_base", dtype="float32")
    settings = context.recipe.distill
    for name in ("live", "cached"):
        (folder / name).mkdir()
    live, _, inputs = aligned_rows(context, folder / "live", tokenizer, settings)
    cached, _, others = aligned_rows(
        context, folder / "cached", tokenizer, replace(settings, teacher="cached")
    )
    theirs = load_tokenizer(out / "teacher")
    for ours, kept in zip(live, cached, strict=True):
        assert theirs.decode(ours.teacher_tokens[ours.teacher_starts[0] : -1].tolist()) == tokenizer.decode(
            ours.tokens[ours.starts[0] : -1].tolist()
        )
        assert kept.teacher_tokens is None and (ours.topk_ids == kept.topk_ids).all()

    def collate(rows: Sequence[AlignedRow], chosen: Sequence[Any], multiple: int) -> Batch:
        return collate_aligned_rows(rows, chosen, 0, len(context.task.labels) + 1, multiple)

    exact, bound = (
        kd(replace(settings, teacher=name, token_loss="token_groups"), **given)
        for name, given in (("live", inputs), ("cached", others))
    )
    batch = with_live_teacher(collate, inputs["teacher"])(live, [0, 1, 2], 16)
    student.eval()
    whole = exact.sums(student, batch)["token"].item()
    part = bound.sums(student, collate(cached, [0, 1, 2], 16))["token"].item()
    assert 0 < part <= whole * (1 + 1e-3)


def refused(*overrides: str) -> ConfigError:
    recipe = load_recipe("tiny", overrides)
    with pytest.raises(ConfigError) as caught:
        graph(recipe, recipe.load_task())
    return caught.value


def test_what_a_cache_of_samples_cannot_give_is_refused_when_the_recipe_is_read() -> None:
    assert "temperature 1" in str(refused("targets.draws=20", "distill.temperature=2"))
    assert "biased" in str(refused("targets.draws=20", "distill.token_loss=reverse_kl"))
    assert "no loss reads" in str(refused("distill.teacher=live", "distill.token_loss=alm"))
    for overrides in (["targets.draws=20"], ["distill.teacher=live", "distill.temperature=2"]):
        recipe = load_recipe("tiny", overrides)
        stages = {stage.name: stage for stage in graph(recipe, recipe.load_task())}
        assert ("teacher" in stages["student"].parents) == ("distill.teacher=live" in overrides)


def test_the_key_of_targets_has_the_temperatures_that_the_cache_needs() -> None:
    def config(*overrides: str) -> Any:
        recipe = load_recipe("tiny", overrides)
        return next(s for s in graph(recipe, recipe.load_task()) if s.name == "targets").config

    assert config("distill.temperature=2")["temperatures"] == [2.0]
    for overrides in (
        (),
        ("distill.temperature=2", "distill.teacher=live"),
        ("distill.temperature=2", "distill.token_loss=token_groups"),
    ):
        assert "temperatures" not in config(*overrides)
