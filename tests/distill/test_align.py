"""Pairs of a student's row and a teacher's targets: every index against a search by brute force, on text cut
two ways.
"""

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
    aligned_row_of,
    collate_aligned_rows,
)
from mlx_distill.storage.array_store import Store, StoreWriter

STOP, PAD = "<stop>", 0
# The same answers, as the student and as the teacher cut them; the student's prompts have different lengths.
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
class Made:
    pair: AlignedRow
    ours: list[str]
    theirs: list[str]
    spans: list[tuple[int, int, int, int]]
    logprobs: np.ndarray
    top: np.ndarray


def spans_by_force(ours: list[str], theirs: list[str]) -> list[tuple[int, int, int, int]]:
    """Common ends of the two cuts, found by trying all of them."""
    ends = [
        (i, j)
        for i in range(len(ours) + 1)
        for j in range(len(theirs) + 1)
        if len("".join(ours[:i])) == len("".join(theirs[:j]))
    ]
    return [(a[0], b[0], a[1], b[1]) for a, b in itertools.pairwise(ends)]


def make(number: int) -> Made:
    question, ours, theirs = TEXTS[number][0], TEXTS[number][1].split("|"), TEXTS[number][2].split("|")
    random = np.random.default_rng(number)
    logprobs = -random.exponential(size=len(theirs) + 1).astype(np.float32)
    top = random.integers(0, 50, (len(theirs) + 1, 2)).astype(np.int32)
    spans = spans_by_force(ours, theirs)
    tokens = np.array([IDS[c] for c in question] + [IDS[p] for p in ours] + [IDS[STOP]])
    judged = number != 2
    pair = align_row(
        tokens,
        len(question),
        np.array(spans),
        teacher_logprobs=logprobs,
        topk_ids=top,
        topk_logprobs=-top.astype(np.float16),
        label_at=len(question) + 1 if judged else None,
        label_logprobs=[-0.1 * number, -1.0] if judged else None,
    )
    return Made(pair, ours, theirs, spans, logprobs, top)


ALL = [make(number) for number in range(len(TEXTS))]


def test_the_hand_made_spans_are_the_ones_meant() -> None:
    assert ALL[0].spans == [(0, 2, 0, 2), (2, 3, 2, 4)]
    assert ALL[1].spans == [(0, 1, 0, 6)]
    assert ALL[4].spans == [(0, 2, 0, 2), (2, 4, 2, 4)]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_a_pair_joins_what_stands_for_the_same_bytes(number: int) -> None:
    made = ALL[number]
    pair, start = made.pair, made.pair.start
    wanted = [
        *made.spans,
        (len(made.ours), len(made.ours) + 1, len(made.theirs), len(made.theirs) + 1),
    ]  # both stop: a common event
    ours, theirs = [*made.ours, STOP], [*made.theirs, STOP]
    assert len(pair.spans) == len(pair.span_logprobs) == len(pair.starts) == len(wanted)
    for i, (a, b, c, d) in enumerate(wanted):
        assert (
            "".join(NAMES[t] for t in pair.tokens[slice(*pair.spans[i])])
            == "".join(theirs[c:d])
            == "".join(ours[a:b])
        )
        assert pair.span_logprobs[i] == pytest.approx(made.logprobs[c:d].sum(), abs=1e-6)
        assert pair.starts[i] == start + a
        assert (pair.topk_ids[i] == made.top[c]).all() and (pair.topk_logprobs[i] == -made.top[c]).all()


def test_a_label_needs_both_a_place_and_a_distribution() -> None:
    assert ALL[2].pair.label_at is None and ALL[2].pair.label_logprobs is None
    tokens, spans = np.array([1, 2, 3]), np.array([[0, 1, 0, 1]])
    pair = align_row(
        tokens,
        1,
        spans,
        teacher_logprobs=np.zeros(2, np.float32),
        topk_ids=np.zeros((2, 1), np.int32),
        topk_logprobs=np.zeros((2, 1), np.float32),
        label_at=1,
        label_logprobs=None,
    )
    assert pair.label_at is None


def test_an_answer_without_a_common_boundary_but_its_end() -> None:
    pair = align_row(
        np.array([5, 9]),
        1,
        np.zeros((0, 4), np.int32),
        teacher_logprobs=np.array([-2.0], np.float32),
        topk_ids=np.array([[9]], np.int32),
        topk_logprobs=np.array([[-2.0]], np.float32),
        label_at=None,
        label_logprobs=None,
    )
    assert (
        pair.spans.tolist() == [[1, 2]]
        and pair.starts.tolist() == [1]
        and pair.span_logprobs.tolist() == [-2.0]
    )


def test_pairs_from_a_store_make_the_same_batches(tmp_path: Path) -> None:
    pairs = [made.pair for made in ALL]
    with StoreWriter(tmp_path / "store") as writer:
        for pair in pairs:
            writer.append(**aligned_row_arrays(pair))
    store = Store(tmp_path / "store", aligned_row_of)
    assert store.lengths.tolist() == [len(pair.tokens) for pair in pairs]
    assert [(pair.start, pair.label_at, pair.label_logprobs is None) for pair in store] == [
        (pair.start, pair.label_at, pair.label_logprobs is None) for pair in pairs
    ]
    for rows in ([0, 2], [(3, 1), (4,)]):
        ours, theirs = (collate_aligned_rows(some, rows, PAD, 2) for some in (store, pairs))
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
    batch = collate_aligned_rows([made.pair for made in ALL], rows, PAD, 2, multiple=multiple)
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
    starts, spans, judged, sums, tops = [], [], [], [], []
    for i, row in enumerate(rows):
        pair = ALL[row].pair
        n = len(pair.tokens) - 1
        assert (
            inputs[i, :n].tolist() == pair.tokens[:-1].tolist()
            and labels[i, :n].tolist() == pair.tokens[1:].tolist()
        )
        assert (
            (inputs[i, n:] == PAD).all()
            and not mask[i, n:].any()
            and not mask[i, : pair.start - 1].any()
            and mask[i, pair.start - 1 : n].all()
        )
        # The place of a token among the trained positions: search for (row, position that predicts it).
        place = {j: trained.index((i, j - 1)) for j in range(pair.start, len(pair.tokens))} | {
            len(pair.tokens): trained.index((i, n - 1)) + 1
        }
        starts += [place[j] for j in pair.starts]
        spans += [[place[a], place[b]] for a, b in pair.spans]
        sums += pair.span_logprobs.tolist()
        tops += pair.topk_ids.tolist()
        if pair.label_at is not None:
            judged.append((place[pair.label_at], pair))
    assert extra["start_index"].tolist() == starts
    assert extra["spans"].tolist() == spans
    assert extra["span_logprobs"].tolist() == sums and extra["topk_ids"].tolist() == tops
    assert extra["label_index"].tolist() == [at for at, _ in judged]
    assert extra["label_logprobs"].shape == (len(judged), 2)
    for at, pair in judged:
        assert flat[extra["positions"][at]] == pair.tokens[pair.label_at]
    for (a, b), row in zip(extra["spans"], [r for r in rows for _ in ALL[r].pair.spans], strict=True):
        text = "".join(NAMES[t] for t in flat[extra["positions"][a:b]])
        assert text in "".join(ALL[row].theirs) + STOP
