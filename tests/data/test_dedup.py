from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.data.dedup import (
    PERMUTATIONS,
    Clusters,
    band_width,
    minhash,
    near_duplicates,
    shingles,
    words,
)
from mlx_distill.data.row_buffer import SignatureFile

VOCABULARY = [f"w{i}" for i in range(2000)]


def text(rng: random.Random, length: int = 120) -> list[str]:
    return rng.choices(VOCABULARY, k=length)


def changed(rng: random.Random, tokens: list[str], count: int) -> list[str]:
    out = list(tokens)
    for index in rng.sample(range(len(out)), count):
        out[index] = rng.choice(VOCABULARY)
    return out


def signatures(texts: list[list[str]]) -> np.ndarray:
    return np.stack([minhash(shingles(tokens)) for tokens in texts])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The exact similarity of two sets of shingles, which signatures estimate."""
    both = len(np.intersect1d(a, b))
    return both / max(len(a) + len(b) - both, 1)


def test_words_ignore_case_punctuation_and_width() -> None:
    assert words("Rain, RAIN — ｒａｉｎ!") == ["rain"] * 3
    assert words("雨が降る ok") == ["雨", "が", "降", "る", "ok"]
    assert words("!?") == ["!?"] and words("") == [""]


def test_shingles_are_the_distinct_runs_of_three_words() -> None:
    tokens = "a b c d a b c".split()
    assert len(shingles(tokens)) == 4  # abc bcd cda dab
    assert np.array_equal(shingles(tokens), shingles(tokens, cache={}))
    assert len(shingles(["a"])) == len(shingles(["a", "b"])) == 1
    assert shingles("a b c".split())[0] != shingles("c b a".split())[0]


def test_the_signature_estimates_the_exact_similarity() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(150):
        first = text(rng)
        second = changed(rng, first, rng.randrange(0, 25))
        a, b = shingles(first), shingles(second)
        errors.append(float((minhash(a) == minhash(b)).mean()) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01  # a narrow multiplier biases this by tenths
    assert np.std(errors) < 0.06 and np.abs(errors).max() < 0.2


def test_a_long_text_is_hashed_in_chunks_to_the_same_signature() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    parts = np.minimum(minhash(hashes[:4096]), np.minimum(minhash(hashes[4096:8192]), minhash(hashes[8192:])))
    assert np.array_equal(minhash(hashes), parts)
    assert minhash(hashes[:0]).min() == 2**32 - 1


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
def test_bands_miss_at_most_one_pair_in_a_hundred(threshold: float) -> None:
    width = band_width(threshold)
    assert PERMUTATIONS % width == 0
    assert (1 - threshold**width) ** (PERMUTATIONS // width) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.6, 0.85])
def test_clusters_equal_those_of_comparing_all_pairs(threshold: float) -> None:
    rng = random.Random(1)
    texts = [text(rng) for _ in range(120)]
    texts += [changed(rng, rng.choice(texts), rng.randrange(0, 12)) for _ in range(120)]
    rng.shuffle(texts)
    table = signatures(texts)
    plain = Clusters(len(texts))
    for i in range(len(texts)):
        for j in range(i):
            if (table[i] == table[j]).mean() >= threshold:
                plain.union(i, j)
    assert np.array_equal(near_duplicates(table, threshold).roots(), plain.roots())


def test_signatures_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = [text(rng) for _ in range(60)]
    texts += [changed(rng, rng.choice(texts), rng.randrange(0, 6)) for _ in range(60)]
    table, file = signatures(texts), SignatureFile(tmp_path / "signatures.bin", rows_per_read=7)
    for signature in table:
        file.append(signature)
    assert (
        len(file) == 120
        and np.array_equal(file[:, 8:12], table[:, 8:12])
        and np.array_equal(file[119], table[119])
    )
    rows = np.array(sorted(rng.sample(range(120), 90)))
    chosen = near_duplicates(table[rows], 0.85).roots()
    assert np.array_equal(near_duplicates(file, 0.85, rows).roots(), chosen) and len(np.unique(chosen)) < 90
    assert np.array_equal(near_duplicates(file, 0.85).roots(), near_duplicates(table, 0.85).roots())
    file.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_planted_duplicate_is_found() -> None:
    rng = random.Random(2)
    originals = [text(rng, 200) for _ in range(300)]
    copies = [changed(rng, tokens, 3) for tokens in originals]  # similarity about 0.91
    roots = near_duplicates(signatures(originals + copies), 0.8).roots()
    assert (roots[:300] == roots[300:]).all() and len(np.unique(roots)) == 300


def test_a_thousand_copies_of_one_text_are_one_cluster() -> None:
    rng = random.Random(3)
    one = text(rng)
    table = np.repeat(signatures([one]), 1000, axis=0)
    assert (near_duplicates(table, 0.85).roots() == 0).all()


def test_clusters_are_rooted_at_their_first_member() -> None:
    clusters = Clusters(6)
    for a, b in ((5, 4), (4, 1), (2, 3)):
        clusters.union(a, b)
    assert clusters.roots().tolist() == [0, 1, 2, 2, 1, 1]
