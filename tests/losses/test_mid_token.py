"""Targets in the middle of tokens, against the probabilities of all texts of a small language."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.tokenizer_kinds import LOSSLESS, make
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from mlx_distill.losses import (
    TokenGroups,
    across_token_kl,
    align_bytes,
    build_token_groups,
    inside_token_kl,
    token_bytes,
)
from mlx_distill.losses.byte_alignment import align_tokens
from mlx_distill.losses.mid_token import MidTokens, MidTokenTargets
from mlx_distill.losses.numerics import LOWEST


def tiny(vocab: Sequence[str], merges: Sequence[tuple[str, str]]) -> Any:
    """Numbers are cut every two digits from the left, so that no token depends on what follows it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]{1,2}|,|[a-z]+"), "isolated")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# Numbers of up to two digits, and digits one by one; words in two halves, and whole.
PACKED = tiny(["7", "3", ",", "a", "b", "73", "37", "77", "33"], [*product("73", repeat=2)])
SINGLE = tiny(["7", "3", ",", "a", "b", "ab"], [("a", "b")])
STOP = "."


class Language:
    """Texts with probabilities, and the next-token distributions of a model that knows them exactly."""

    def __init__(self, seed: int, length: int = 5) -> None:
        random = np.random.default_rng(seed)
        self.texts = ["".join(parts) for parts in product(["7", "3", ",", "ab"], repeat=length)]
        self.p = random.dirichlet(np.full(len(self.texts), 0.3))

    def next(self, tokenizer: Any, before: Sequence[int]) -> np.ndarray:
        """The probabilities of each token, and last those of the end, behind some tokens."""
        out = np.zeros(tokenizer.get_vocab_size() + 1)
        n = len(before)
        for text, p in zip(self.texts, self.p, strict=True):
            ids = tokenizer.encode(text).ids
            if ids[:n] == list(before):
                out[ids[n] if len(ids) > n else -1] += p
        return out / out.sum()

    def targets(
        self, text: str, student: Any, teacher: Any, k: int | None = None
    ) -> tuple[MidTokens, TokenGroups, MidTokenTargets, list[int], list[int]]:
        groups = build_token_groups(student, teacher)
        ours, theirs = student.encode(text).ids, teacher.encode(text).ids
        p = np.stack([self.next(teacher, theirs[:i])[:-1] for i in range(len(theirs))])
        ids = np.argsort(-p, axis=1)[:, :k]
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log(np.take_along_axis(p, ids, axis=1)), LOWEST)
        middle = MidTokens(student, teacher, groups)
        spans = align_bytes(ours, theirs, student, teacher)
        found = middle.targets(np.array(ours), np.array(theirs), spans, ids.astype(np.int32), logs)
        return middle, groups, found, ours, theirs

    def logits(self, student: Any, ours: Sequence[int], starts: np.ndarray, noise: float = 0.0) -> mx.array:
        rows = np.stack([self.next(student, ours[:i])[:-1] for i in starts.tolist()])
        seeds = [np.random.default_rng(int(start)) for start in starts]
        with np.errstate(divide="ignore"):
            z = np.maximum(np.log(rows), -60)
        different = np.stack([random.normal(size=z.shape[1]) for random in seeds])
        return mx.array(z + noise * different).astype(mx.float32)


def inside(z: mx.array, found: MidTokenTargets, groups: TokenGroups) -> np.ndarray:
    return np.array(
        inside_token_kl(z, mx.array(found.inside_groups), mx.array(found.inside_logprobs), groups)
    )


def across(z: mx.array, found: MidTokenTargets) -> np.ndarray:
    return np.array(
        across_token_kl(
            z,
            mx.array(found.across_logprobs),
            found.across_sizes,
            mx.array(found.across_tokens),
            mx.array(found.across_slots),
        )
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ["73737", "7,373", "77ab3", "ab7ab", "ab,33"])
def test_a_student_with_the_probabilities_of_the_same_texts_has_no_loss(seed: int, text: str) -> None:
    language = Language(seed)
    # Words and numbers of a teacher in one token, begun by the student in the middle; and the reverse.
    for student, teacher in ((PACKED, SINGLE), (SINGLE, PACKED)):
        _, groups, found, ours, _ = language.targets(text, student, teacher)
        z = language.logits(student, ours, found.inside_starts) if len(found.inside_starts) else None
        if z is not None:
            np.testing.assert_allclose(inside(z, found, groups), 0, atol=2e-5)
        if len(found.across_starts):
            z = language.logits(student, ours, found.across_starts)
            np.testing.assert_allclose(across(z, found), 0, atol=2e-5)


def enumerated(language: Language, text: str, at: int, key: Callable[[str], str | None]) -> dict[str, float]:
    """Probabilities of what follows the first bytes of a text, over all texts that go on so."""
    out: dict[str, float] = {}
    for other, p in zip(language.texts, language.p, strict=True):
        name = key(other) if other.startswith(text[:at]) else None
        if name is not None:
            out[name] = out.get(name, 0.0) + p
    total = sum(out.values())
    return {name: p / total for name, p in out.items()}


@pytest.mark.parametrize("seed", range(3))
def test_behind_the_first_digit_of_a_packed_number_the_outcomes_are_the_next_digit_and_an_end(
    seed: int,
) -> None:
    language, text = Language(seed), "73,ab7"[:6]
    language.texts[0] = text
    _, _, found, ours, _ = language.targets(text, PACKED, SINGLE)
    assert found.across_starts.tolist() == [0] and found.across_sizes.tolist() == [3]
    exact = enumerated(language, text, 1, lambda other: other[1:2] if other[1:2] in ("7", "3") else "end")
    names = {PACKED.token_to_id(token): name for token, name in (("77", "7"), ("73", "3"), ("7", "end"))}
    by_slot = dict(zip(found.across_slots.tolist(), found.across_tokens.tolist(), strict=True))
    for slot, logprob in enumerate(found.across_logprobs[0].tolist()):
        if logprob > LOWEST / 2:
            assert np.exp(logprob) == pytest.approx(exact[names[by_slot[slot]]], rel=1e-5)
    # Against another student: in float64 over the enumerated texts.
    z = language.logits(PACKED, ours, found.across_starts, noise=1.0)
    q = {name: np.exp(np.array(z, np.float64)[0, i]) for i, name in names.items()}
    total = sum(q.values())
    wanted = sum(p * np.log(p / (q[name] / total)) for name, p in exact.items())
    assert across(z, found)[0] == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_inside_a_packed_number_the_teacher_says_what_its_tokens_hold_behind_the_first_digit(
    seed: int,
) -> None:
    language, text = Language(seed), "73,7,3"
    language.texts[0] = text
    middle, groups, found, ours, _ = language.targets(text, SINGLE, PACKED)
    assert found.inside_starts.tolist() == [1]
    first = language.next(PACKED, [])
    known = {digit: first[PACKED.token_to_id("7" + digit)] for digit in "73"}
    alone = first[PACKED.token_to_id("7")]  # then a comma or a word: not known
    total = sum(known.values()) + alone
    for group, logprob in zip(found.inside_groups[0], found.inside_logprobs[0], strict=True):
        if group != groups.outside:
            digit = next(d for d in "73" if groups.student[SINGLE.token_to_id(d)] == group)
            assert np.exp(logprob) == pytest.approx(known[digit] / total, rel=1e-5)
    assert middle.facts()["unplaced_mass"] == pytest.approx(alone / total, rel=1e-5)
    z = language.logits(SINGLE, ours, found.inside_starts, noise=0.7)
    wanted = smallest([known[d] / total for d in "73"], SINGLE, "73", z)
    assert inside(z, found, groups)[0] == pytest.approx(wanted, rel=1e-3)


def smallest(p: Sequence[float], student: Any, names: str, z: mx.array) -> float:
    """The smallest KL over all divisions of the missing mass, found by a numerical optimizer."""
    q = np.exp(np.array(z, np.float64)[0])
    q /= q.sum()
    q = np.array([q[student.token_to_id(name)] for name in names])
    q = np.append(q, 1 - q.sum())
    base = np.append(p, 0.0)
    missing = 1 - base.sum()

    def kl(x: np.ndarray) -> float:
        share = np.exp(x - x.max())
        r = base + missing * share / share.sum()
        return float((r * np.log(np.maximum(r, 1e-300) / q)).sum())

    return min(
        minimize(
            kl, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
        ).fun
        for start in (np.zeros(3), np.array([0.0, 0.0, 5.0]), np.array([3.0, -3.0, 0]))
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_shorter_list_is_a_lower_bound(k: int) -> None:
    language = Language(5)
    for student, teacher in ((PACKED, SINGLE), (SINGLE, PACKED)):
        values = {}
        for size in (k, None):
            _, groups, found, ours, _ = language.targets("73377", student, teacher, size)
            for kind, starts in (("inside", found.inside_starts), ("across", found.across_starts)):
                if len(starts):
                    z = language.logits(student, ours, starts, noise=1.0)
                    loss = inside(z, found, groups) if kind == "inside" else across(z, found)
                    values[size, kind] = dict(zip(starts.tolist(), loss.tolist(), strict=True))
        for kind in ("inside", "across"):
            for start, value in values.get((k, kind), {}).items():
                assert -1e-6 <= value <= values[None, kind][start] + 1e-5


# --- where groups do not hold -------------------------------------------------------------------------------


def test_a_token_that_depends_on_the_text_before_is_compared_as_the_student_writes_it_there() -> None:
    from tokenizers import Regex, pre_tokenizers

    vocab = ["x", "y", "a", "b", "c", "ab"]
    student, teacher = tiny(vocab, [("a", "b")]), tiny(vocab, [("a", "b")])
    for side, pattern in ((student, "(?<=x)a|ab|[a-z]"), (teacher, "ab|[a-z]")):
        side.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    ours, theirs = np.array(student.encode("yabxab").ids), np.array(teacher.encode("yabxab").ids)
    assert [vocab[i] for i in ours] == ["y", "ab", "x", "a", "b"] and len(theirs) == 4
    middle = MidTokens(student, teacher, build_token_groups(student, teacher))
    spans = align_bytes(ours, theirs, student, teacher)
    assert middle.in_other_groups(ours, theirs, spans).tolist() == [False, False, False, True]
    ids = np.array([[5, 4, 0]] * 4, dtype=np.int32)
    logs = np.log(np.array([[0.6, 0.3, 0.05]] * 4))
    found = middle.targets(ours, theirs, spans, ids, logs)
    by_start = dict(zip(found.inside_starts.tolist(), range(2), strict=True))
    groups = middle.groups.student
    assert set(by_start) == {3, 4} and not len(found.across_starts)
    start, behind = by_start[3], by_start[4]
    assert found.inside_groups[start].tolist() == [groups[2], groups[4], groups[0]]
    np.testing.assert_allclose(np.exp(found.inside_logprobs[start]), [0.6, 0.3, 0.05], rtol=1e-5)
    assert found.inside_groups[behind, 0] == groups[3]
    np.testing.assert_allclose(np.exp(found.inside_logprobs[behind, 0]), 0.6 / 0.65, rtol=1e-5)
    facts = middle.facts()
    assert (facts["inside"], facts["by_context"], sum(facts["left_out"].values())) == (2, 1, 0)


def test_a_token_that_depends_on_the_text_behind_counts_as_what_the_student_wrote() -> None:
    from tokenizers import Regex, pre_tokenizers

    vocab = ["x", "a", "b", "c", "ab"]
    student, teacher = tiny(vocab, [("a", "b")]), tiny(vocab, [("a", "b")])
    for side, pattern in ((student, "ab(?!c)|[a-z]"), (teacher, "ab|[a-z]")):
        side.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    ours, theirs = np.array(student.encode("abcab").ids), np.array(teacher.encode("abcab").ids)
    assert [vocab[i] for i in ours] == ["a", "b", "c", "ab"] and len(theirs) == 3
    middle = MidTokens(student, teacher, build_token_groups(student, teacher))
    spans = align_bytes(ours, theirs, student, teacher)
    assert middle.in_other_groups(ours, theirs, spans).tolist() == [True, False, False]
    ids = np.array([[4, 3]] * 3, dtype=np.int32)
    found = middle.targets(ours, theirs, spans, ids, np.log(np.array([[0.6, 0.3]] * 3)))
    start = found.inside_starts.tolist().index(0)
    groups = middle.groups.student
    assert found.inside_groups[start].tolist() == [groups[1], groups[3]]  # "a" and "c"
    np.testing.assert_allclose(np.exp(found.inside_logprobs[start]), [0.6, 0.3], rtol=1e-5)


# --- any text ----------------------------------------------------------------------------------------------

TEXT = st.text(
    st.one_of(st.sampled_from('0123456789 ,.{"}theafgr\n'), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)


PAIRS = [(a, b) for a, b in product(LOSSLESS, repeat=2) if a != b]


@cache
def pair(student: str, teacher: str) -> tuple[Any, Any, TokenGroups]:
    return make(student), make(teacher), build_token_groups(make(student), make(teacher))


@settings(max_examples=200, deadline=None)
@given(text=TEXT, kinds=st.sampled_from(PAIRS))
def test_each_place_has_targets_or_a_reason_and_a_certain_teacher_gives_its_own_text(
    text: str, kinds: tuple[str, str]
) -> None:
    student, teacher, groups = pair(*kinds)
    text = unicodedata.normalize("NFC", text)  # as the tokenizer like Qwen's does
    ours, theirs = (
        np.array(side.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        for side in (student, teacher)
    )
    middle = MidTokens(student, teacher, groups)
    spans, same_start = align_tokens(ours, theirs, student, teacher)
    # The spans hold the same bytes, and end wherever both tokenizations end a token.
    said = [[token_bytes(side)[i] for i in ids] for side, ids in ((student, ours), (teacher, theirs))]
    for first, last, other_first, other_last in spans.tolist():
        parts = b"".join(said[0][first:last]), b"".join(said[1][other_first:other_last])
        assert parts[0].lstrip(b" ") == parts[1].lstrip(b" ")
        assert parts[0] == parts[1] or first == 0 or other_first == 0
    spans = spans if same_start else spans[1:]
    found = middle.targets(ours, theirs, spans, theirs[:, None], np.zeros((len(theirs), 1), np.float32))
    facts, others = middle.facts(), middle.in_other_groups(ours, theirs, spans)
    places = int((spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2] - 2).sum()) + int(others.sum())
    assert facts["inside"] + facts["across"] + sum(facts["left_out"].values()) == places
    assert facts["inside"] == len(found.inside_starts) and facts["across"] == len(found.across_starts)
    assert not facts["inside"] + facts["across"] or facts["unplaced_mass"] == pytest.approx(0, abs=1e-6)
    assert found.inside_groups[:, 0].tolist() == groups.student[ours[found.inside_starts]].tolist()
    assert np.allclose(found.inside_logprobs, 0) and np.allclose(found.across_logprobs, 0)
    bounds = np.concatenate([[0], np.cumsum(found.across_sizes)])
    for start, (first, last) in zip(found.across_starts, pairwise(bounds.tolist()), strict=True):
        tokens = found.across_tokens[first:last].tolist()
        assert found.across_slots[first:last][tokens.index(ours[start])] == 0
