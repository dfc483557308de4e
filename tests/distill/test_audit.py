"""The audit of a student: targets in the middle of tokens, temperatures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_model import VOCABULARY, make_model

from mlx_distill.distill.align import AlignedRow
from mlx_distill.distill.audit import StudentAudit
from mlx_distill.distill.live_teacher import LiveTeacher
from mlx_distill.losses.cross_tokenizer import token_group_kl
from mlx_distill.losses.mid_token import MidTokenTargets
from mlx_distill.losses.token_groups import TokenGroups
from mlx_distill.losses.uld import uld
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import TopK

K = 3
MEMBERS = np.arange(VOCABULARY) // 2
GROUPS = TokenGroups(MEMBERS, MEMBERS, int(MEMBERS.max()) + 2, VOCABULARY)
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)


def make_row(seed: int, length: int) -> AlignedRow:
    random = np.random.default_rng(seed)
    start, starts = 3, np.arange(3, length, 2, dtype=np.int32)

    def logs(n: int) -> np.ndarray:
        return np.log(random.dirichlet(np.ones(K + 1), n)[:, :K]).astype(np.float32)

    def ids(n: int, below: int) -> np.ndarray:
        return np.stack([random.permutation(below)[:K] for _ in range(n)]).astype(np.int32)

    middle = MidTokenTargets(
        np.array([1], np.int32),
        ids(1, GROUPS.outside),
        logs(1),
        np.array([2], np.int32),
        logs(1),
        np.array([2], np.int32),
        np.array([4, 5], np.int32),
        np.array([0, K], np.int32),
    )
    tokens = random.integers(0, VOCABULARY, length).astype(np.int32)
    return AlignedRow(
        tokens,
        start,
        None,
        None,
        starts=starts,
        topk_ids=ids(len(starts), VOCABULARY),
        topk_logprobs=logs(len(starts)),
        spans=np.zeros((0, 2), np.int32),
        span_logprobs=np.zeros(0, np.float32),
        teacher_starts=starts,
        teacher_tokens=tokens[::-1].copy(),
        mid_token=middle,
    )


def audit_over_groups(settings: DistillConfig, teacher: LiveTeacher) -> StudentAudit:
    """The audit of a student of two tokenizers, whose divergence is over token groups."""
    return StudentAudit(
        TOKENIZER,
        settings,
        1,
        None,
        GROUPS,
        same_tokenizer=False,
        teacher=teacher,
        compared="token_groups",
    )


def test_places_in_the_middle_of_tokens_are_in_the_parts_and_not_in_the_comparison() -> None:
    rows = [make_row(0, 9), make_row(1, 6)]
    student, teacher = make_model(width=16), LiveTeacher(make_model(width=8), None)
    settings = DistillConfig(label_weight=0.0, text_weight=0.0, token_weight=1.0, mid_token_rows=True)
    audit = audit_over_groups(settings, teacher)
    parts, lines = audit.measure(student, rows, teacher.hidden(rows))
    starts = [len(row.starts) for row in rows]
    assert parts["token"]["words"][0] == sum(starts) + 2 * len(rows)
    assert [line["positions"] for line in lines] == starts
    for row, line in zip(rows, lines, strict=True):
        z = student(mx.array(row.tokens[None]))[0][mx.array(row.starts - 1)]
        whole = teacher.distribution(teacher.hidden([row]))
        assert line["exact"] == pytest.approx(token_group_kl(z, whole, GROUPS).sum().item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["token_groups", "uld"])
def test_with_a_temperature_token_groups_are_compared_at_one(loss: str) -> None:
    """What a temperature softens are the groups that the top k reaches: of the whole distributions others."""
    rows = [replace(make_row(n, 9), mid_token=None) for n in range(2)]
    softened = [replace(row, temperature=2.0) for row in rows] if loss == "uld" else rows
    student, teacher = make_model(width=16), LiveTeacher(make_model(width=8), None)
    settings = DistillConfig(
        label_weight=0.0, text_weight=0.0, token_weight=1.0, token_loss=loss, temperature=2.0
    )
    audit = audit_over_groups(settings, teacher)
    parts, lines = audit.measure(student, softened, teacher.hidden(rows), rows)
    for row, line in zip(rows, lines, strict=True):
        z = student(mx.array(row.tokens[None]))[0][mx.array(row.starts - 1)]
        whole = teacher.distribution(teacher.hidden([row]))
        listed = TopK(mx.array(row.topk_ids), mx.array(row.topk_logprobs))
        for key, targets in (("exact", whole), ("cached", listed)):
            expected = token_group_kl(z, targets, GROUPS).sum().item()
            assert line[key] == pytest.approx(expected, rel=1e-4), key
    # The parts of the loss are those that are trained, at T.
    z = mx.concatenate([student(mx.array(row.tokens[None]))[0][mx.array(row.starts - 1)] for row in rows])
    arrays = (np.concatenate([getattr(row, name) for row in rows]) for name in ("topk_ids", "topk_logprobs"))
    listed = TopK(*map(mx.array, arrays))
    trained = uld(z / 2, listed) if loss == "uld" else token_group_kl(z, listed, GROUPS, temperature=2.0)
    total = sum(value for _, value in parts["token"].values())
    assert total == pytest.approx(trained.sum().item(), rel=1e-4)
