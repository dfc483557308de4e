"""Aligned rows: every index against a brute-force search, on texts that two tokenizers cut differently."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.distill.align import (
    AlignedRow,
    align_row,
    aligned_row_arrays,
    aligned_row_from_arrays,
    collate_aligned_rows,
)
from mlx_distill.storage.array_store import Store, StoreWriter

STOP, PAD = "<stop>", 0
# Prompt, the student's tokens of the answer, the teacher's tokens of it.
TEXTS = [
    ("Q?", "ab|c|de", "a|bc|d|e"),
    ("why so?", "abcdef", "a|b|c|d|e|f"),
    ("x", "a|b|c", "abc"),
    ("prompt", "a|b|c|d", "a|b|c|d"),
    ("p", "abc|d|ef|g", "ab|cd|e|fg"),
]
PIECES = sorted(
    {piece for _, ours, theirs in TEXTS for piece in (ours + "|" + theirs).split("|")}
    | set("".join(q for q, _, _ in TEXTS))
)
IDS = {piece: i + 1 for i, piece in enumerate([*PIECES, STOP])}
NAMES = {i: piece for piece, i in IDS.items()}


@dataclass(frozen=True)
class Case:
    row: AlignedRow
    ours: list[str]
    theirs: list[str]
    spans: list[tuple[int, int, int, int]]
    logprobs: np.ndarray
    top: np.ndarray


def spans_by_force(ours: list[str], theirs: list[str]) -> list[tuple[int, int, int, int]]:
    """The spans between common token ends, found by trying all pairs of ends."""
    ends = [
        (i, j)
        for i in range(len(ours) + 1)
        for j in range(len(theirs) + 1)
        if len("".join(ours[:i])) == len("".join(theirs[:j]))
    ]
    return [(a[0], b[0], a[1], b[1]) for a, b in itertools.pairwise(ends)]


def make_case(number: int) -> Case:
    question, ours, theirs = TEXTS[number][0], TEXTS[number][1].split("|"), TEXTS[number][2].split("|")
    random = np.random.default_rng(number)
    logprobs = -random.exponential(size=len(theirs) + 1).astype(np.float32)
    top = random.integers(0, 50, (len(theirs) + 1, 2)).astype(np.int32)
    spans = spans_by_force(ours, theirs)
    tokens = np.array([IDS[c] for c in question] + [IDS[p] for p in ours] + [IDS[STOP]])
    labelled = number != 2
    row = align_row(
        tokens,
        len(question),
        np.array(spans),
        teacher_logprobs=logprobs,
        topk_ids=top,
        topk_logprobs=-top.astype(np.float16),
        label_start=len(question) + 1 if labelled else None,
        label_logprobs=[-0.1 * number, -1.0] if labelled else None,
        label_node=number if labelled else 0,
    )
    return Case(row, ours, theirs, spans, logprobs, top)


CASES = [make_case(number) for number in range(len(TEXTS))]


def test_the_hand_made_spans_are_right() -> None:
    assert CASES[0].spans == [(0, 2, 0, 2), (2, 3, 2, 4)]
    assert CASES[1].spans == [(0, 1, 0, 6)]
    assert CASES[4].spans == [(0, 2, 0, 2), (2, 4, 2, 4)]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_a_row_joins_tokens_of_the_same_bytes(number: int) -> None:
    case = CASES[number]
    row, start = case.row, case.row.start
    wanted = [
        *case.spans,
        (len(case.ours), len(case.ours) + 1, len(case.theirs), len(case.theirs) + 1),
    ]  # both stop: a common span
    ours, theirs = [*case.ours, STOP], [*case.theirs, STOP]
    assert len(row.spans) == len(row.span_logprobs) == len(row.starts) == len(wanted)
    for i, (a, b, c, d) in enumerate(wanted):
        assert (
            "".join(NAMES[t] for t in row.tokens[slice(*row.spans[i])])
            == "".join(theirs[c:d])
            == "".join(ours[a:b])
        )
        assert row.span_logprobs[i] == pytest.approx(case.logprobs[c:d].sum(), abs=1e-6)
        assert row.starts[i] == start + a
        assert (row.topk_ids[i] == case.top[c]).all() and (row.topk_logprobs[i] == -case.top[c]).all()


def test_a_label_needs_both_a_position_and_a_distribution() -> None:
    assert CASES[2].row.label_start is None and CASES[2].row.label_logprobs is None
    tokens, spans = np.array([1, 2, 3]), np.array([[0, 1, 0, 1]])
    row = align_row(
        tokens,
        1,
        spans,
        teacher_logprobs=np.zeros(2, np.float32),
        topk_ids=np.zeros((2, 1), np.int32),
        topk_logprobs=np.zeros((2, 1), np.float32),
        label_start=1,
        label_logprobs=None,
    )
    assert row.label_start is None


def test_an_answer_whose_only_common_boundary_is_its_end() -> None:
    row = align_row(
        np.array([5, 9]),
        1,
        np.zeros((0, 4), np.int32),
        teacher_logprobs=np.array([-2.0], np.float32),
        topk_ids=np.array([[9]], np.int32),
        topk_logprobs=np.array([[-2.0]], np.float32),
        label_start=None,
        label_logprobs=None,
    )
    assert (
        row.spans.tolist() == [[1, 2]] and row.starts.tolist() == [1] and row.span_logprobs.tolist() == [-2.0]
    )


def test_rows_from_a_store_make_the_same_batches(tmp_path: Path) -> None:
    aligned = [case.row for case in CASES]
    with StoreWriter(tmp_path / "store") as writer:
        for row in aligned:
            writer.append(**aligned_row_arrays(row))
    store = Store(tmp_path / "store", aligned_row_from_arrays)
    assert store.lengths.tolist() == [len(row.tokens) for row in aligned]
    assert [(row.start, row.label_start, row.label_node, row.label_logprobs is None) for row in store] == [
        (row.start, row.label_start, row.label_node, row.label_logprobs is None) for row in aligned
    ]
    for rows in ([0, 2], [(3, 1), (4,)]):
        ours, theirs = (collate_aligned_rows(data, rows, PAD, 2) for data in (store, aligned))
        assert ours.rows == theirs.rows and ours.extra.keys() == theirs.extra.keys()
        for a, b in zip(
            [ours.inputs, ours.labels, ours.mask, *ours.extra.values()],
            [theirs.inputs, theirs.labels, theirs.mask, *theirs.extra.values()],
            strict=True,
        ):
            assert a.dtype == b.dtype and np.array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("rows", [[0], [2], [3, 0], [4, 1, 2, 0, 3], [2, 2]])
@pytest.mark.parametrize("multiple", [1, 16])
def test_indices_of_a_batch_point_at_the_tokens_of_each_row(rows: list[int], multiple: int) -> None:
    batch = collate_aligned_rows([case.row for case in CASES], rows, PAD, 2, multiple=multiple)
    inputs, labels, mask = (np.array(a) for a in (batch.inputs, batch.labels, batch.mask))
    extra = {name: np.array(value) for name, value in batch.extra.items()}
    assert (
        batch.rows == tuple(rows)
        and inputs.shape == labels.shape == mask.shape
        and inputs.shape[1] % multiple == 0
    )
    flat = labels.reshape(-1)
    trained = [(i, j) for i in range(len(rows)) for j in range(inputs.shape[1]) if mask[i, j]]
    assert extra["positions"].tolist() == [i * inputs.shape[1] + j for i, j in trained]
    starts, spans, labelled, sums, tops = [], [], [], [], []
    for i, number in enumerate(rows):
        row = CASES[number].row
        n = len(row.tokens) - 1
        assert (
            inputs[i, :n].tolist() == row.tokens[:-1].tolist()
            and labels[i, :n].tolist() == row.tokens[1:].tolist()
        )
        assert (
            (inputs[i, n:] == PAD).all()
            and not mask[i, n:].any()
            and not mask[i, : row.start - 1].any()
            and mask[i, row.start - 1 : n].all()
        )
        # The place of a token among the trained positions: search for (row, position that predicts it).
        place = {j: trained.index((i, j - 1)) for j in range(row.start, len(row.tokens))} | {
            len(row.tokens): trained.index((i, n - 1)) + 1
        }
        starts += [place[j] for j in row.starts]
        spans += [[place[a], place[b]] for a, b in row.spans]
        sums += row.span_logprobs.tolist()
        tops += row.topk_ids.tolist()
        if row.label_start is not None:
            labelled.append((place[row.label_start], row))
    assert extra["start_index"].tolist() == starts
    assert extra["spans"].tolist() == spans
    assert extra["span_logprobs"].tolist() == sums and extra["topk_ids"].tolist() == tops
    assert extra["label_index"].tolist() == [at for at, _ in labelled]
    assert extra["label_logprobs"].shape == (len(labelled), 2)
    for at, row in labelled:
        assert flat[extra["positions"][at]] == row.tokens[row.label_start]
    numbers = [number for number in rows for _ in CASES[number].row.spans]
    for (a, b), number in zip(extra["spans"], numbers, strict=True):
        text = "".join(NAMES[t] for t in flat[extra["positions"][a:b]])
        assert text in "".join(CASES[number].theirs) + STOP
