"""Targets in the middle of tokens in aligned rows: on disk, in batches, in the objective and in the stage."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.small_chain import make_context

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.distill.align import (
    AlignedRow,
    aligned_row_arrays,
    aligned_row_from_arrays,
    aligner,
    collate_aligned_rows,
)
from mlx_distill.distill.objective import kd
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.losses import across_token_kl, inside_token_kl, token_group_kl
from mlx_distill.losses.mid_token import MidTokens, MidTokenTargets
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_groups import TokenGroups, build_token_groups
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import TopK
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.tasks.task import load_task
from mlx_distill.train.objective import LogitReader

WIDTH, K = 12, 3
GROUPS = TokenGroups(np.arange(WIDTH) // 2, np.arange(WIDTH) // 2, WIDTH // 2 + 1, WIDTH)


def make_row(seed: int, length: int) -> AlignedRow:
    random = np.random.default_rng(seed)
    start, answer = 2, length - 2

    def logs(n: int) -> np.ndarray:
        p = random.dirichlet(np.ones(K + 1), n)[:, :K]
        return np.log(p).astype(np.float32)

    a, b = 1 + seed % 2, 2
    sizes = np.array([2 + seed % 3, 4], dtype=np.int32)
    across = logs(b)
    across[0, -1] = LOWEST
    middle = MidTokenTargets(
        random.choice(answer, a, replace=False).astype(np.int32),
        np.stack([random.permutation(GROUPS.outside)[:K] for _ in range(a)]).astype(np.int32),
        logs(a),
        random.choice(answer, b, replace=False).astype(np.int32),
        across,
        sizes,
        np.concatenate([random.permutation(WIDTH)[:size] for size in sizes]).astype(np.int32),
        random.integers(0, K + 1, sizes.sum()).astype(np.int32),
    )
    starts = np.arange(start, length, 2, dtype=np.int32)
    return AlignedRow(
        random.integers(0, WIDTH, length).astype(np.int32),
        start,
        None,
        None,
        starts=starts,
        topk_ids=np.stack([random.permutation(WIDTH)[:K] for _ in starts]).astype(np.int32),
        topk_logprobs=logs(len(starts)),
        spans=np.zeros((0, 2), np.int32),
        span_logprobs=np.zeros(0, np.float32),
        mid_token=middle,
    )


ROWS = [make_row(seed, 5 + seed) for seed in range(4)]


class Model:
    """A trunk of one table and a head, so that a position's logits depend on its token alone."""

    def __init__(self) -> None:
        self.table = mx.random.normal((WIDTH, WIDTH), key=mx.random.key(3))

    def logits(self, tokens: Any) -> mx.array:
        return self.table[mx.array(np.asarray(tokens, dtype=np.int32))] * 2


def row_by_row(model: Model) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in ROWS:
        z, middle = model.logits(row.tokens), row.mid_token
        assert middle is not None
        total += token_group_kl(
            z[mx.array(row.starts - 1)], TopK(mx.array(row.topk_ids), mx.array(row.topk_logprobs)), GROUPS
        ).sum().item()  # fmt: skip
        total += inside_token_kl(
            z[mx.array(middle.inside_starts + row.start - 1)],
            mx.array(middle.inside_groups),
            mx.array(middle.inside_logprobs),
            GROUPS,
        ).sum().item()  # fmt: skip
        ends = np.cumsum([0, *middle.across_sizes])
        for i, start in enumerate(middle.across_starts):
            its = slice(ends[i], ends[i + 1])
            total += across_token_kl(
                z[int(start) + row.start - 1][None],
                mx.array(middle.across_logprobs[i : i + 1]),
                middle.across_sizes[i : i + 1],
                mx.array(middle.across_tokens[its]),
                mx.array(middle.across_slots[its]),
            ).sum().item()  # fmt: skip
        count += len(row.starts) + len(middle.inside_starts) + len(middle.across_starts)
    return total, count


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [(0, 1), (2, 3)], [(3, 1, 0, 2)]])
def test_batched_and_packed_rows_have_the_loss_of_each_row_alone(chosen: list[Any]) -> None:
    model = Model()
    batch = collate_aligned_rows(ROWS, chosen, 0, 1, multiple=4)
    objective = kd(
        DistillConfig(label_weight=0.0, text_weight=0.0, token_weight=1.0, mid_token_rows=True), groups=GROUPS
    )
    assert objective.head_split is not None

    class Reader(LogitReader):
        def __init__(self) -> None:
            self.small, self.hidden = True, mx.zeros((1, 1))
            positions = np.array(batch.extra["positions"])
            self._logits = model.logits(np.array(batch.inputs).reshape(-1)[positions])

    total, count = row_by_row(model)
    assert objective.weights(batch) == {"token": count}
    found = objective.head_split.read(Reader(), batch)["token"].item()
    assert found == pytest.approx(total, rel=1e-5)


def test_a_start_whose_tokens_are_in_different_groups_is_compared_by_context_alone() -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    sides = []
    for pattern in ("(?<=x)a|ab|[a-z]", "ab|[a-z]"):  # behind an x the student writes an a alone
        side = Tokenizer(
            models.BPE({text: i for i, text in enumerate(["x", "a", "b", "ab", "."])}, [("a", "b")])
        )
        side.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        side.decoder = decoders.ByteLevel()
        sides.append(side)
    groups = build_token_groups(*sides, student_stop=4, teacher_stop=4)
    ours, theirs = (np.array([*side.encode("abxab").ids, 4], dtype=np.int32) for side in sides)
    chat = TokenizedRow(np.append(np.int32(4), ours), np.ones(len(ours), dtype=np.bool_), ((1, len(ours)),))
    targets = TeacherTargets(
        "row",
        "abxab",
        None,
        theirs,
        np.zeros(len(theirs), np.float32),
        theirs[:, None],
        np.zeros((len(theirs), 1), np.float32),
    )
    task = load_task("moderation")
    plain, alone, by_context = (
        aligner(task, *sides, None, same_tokenizer=False, mid_tokens=middle)(chat, [], targets)
        for middle in (None, MidTokens(*sides, groups, in_middle=False), MidTokens(*sides, groups))
    )
    assert plain.starts.tolist() == [1, 2, 3, 5] and by_context.starts.tolist() == [1, 2, 5]
    assert by_context.topk_ids[:, 0].tolist() == [3, 0, 4] and by_context.teacher_starts is not None
    assert (
        by_context.teacher_starts.tolist() == [0, 1, 3] and by_context.spans.tolist() == plain.spans.tolist()
    )
    assert by_context.mid_token is not None
    assert sorted(by_context.mid_token.inside_starts.tolist()) == [2, 3]
    # Without targets in the middle of tokens that start is compared by context all the same.
    np.testing.assert_array_equal(alone.starts, by_context.starts)
    assert alone.mid_token is not None and alone.mid_token.inside_starts.tolist() == [2]
    assert alone.mid_token.inside_groups[0, 0] == groups.student[int(ours[2])]
    assert alone.mid_token.inside_logprobs[0, 0] == 0 and len(alone.mid_token.across_starts) == 0


def test_rows_on_disk_and_back() -> None:
    for row in ROWS:
        back = aligned_row_from_arrays(**aligned_row_arrays(row))
        assert back.mid_token is not None and row.mid_token is not None
        for field in fields(MidTokenTargets):
            np.testing.assert_array_equal(
                getattr(back.mid_token, field.name), getattr(row.mid_token, field.name)
            )
    assert aligned_row_from_arrays(**aligned_row_arrays(replace(ROWS[0], mid_token=None))).mid_token is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.token_loss=alm"], "mid_token_rows: true, and token_loss is alm"),
        (["targets.draws=4"], "mid_token_rows: true from targets.draws is biased"),
    ],
)
def test_where_there_are_no_such_targets_they_are_refused(settings: list[str], message: str) -> None:
    context = make_context("distill.mid_token_rows=true", *settings)
    with pytest.raises(ConfigError, match=message):
        graph(context.recipe, context.task)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["cached", "live"])
def test_the_stage_has_them_for_a_cached_and_a_live_teacher(tmp_path: Path, teacher: str) -> None:
    from mlx_distill.models.load import load_tokenizer

    settings = ["distill.mid_token_rows=true", "distill.label_weight=0", f"distill.teacher={teacher}"]
    context = make_context(*settings)
    tokenizer = load_tokenizer(context.run / "student_base")
    train, _, inputs = aligned_rows(context, tmp_path, tokenizer, context.recipe.distill)
    facts = train.facts["mid_token"]
    rows = [train[i] for i in range(len(train))]
    assert facts["inside"] == sum(len(row.mid_token.inside_starts) for row in rows if row.mid_token)
    assert all(row.mid_token is not None for row in rows)
    assert facts["across"] >= 0 and inputs["groups"] is not None
    batch = collate_aligned_rows(rows, [0, (1, 2)], 0, len(context.task.labels) + 1)
    assert "inside_index" in batch.extra and "across_index" in batch.extra
