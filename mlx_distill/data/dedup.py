"""Exact and near duplicates: normalised text, MinHash signatures of word shingles, and clusters of rows that
belong to one split.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

PERMUTATIONS = 128
_SHINGLE = 3  # words
# Signatures [n, 128]: an array, or an object with its indexing by [row] and [:, a:b].
Signatures = Any
_REPRESENTATIVES = 16  # rows of a bucket that each further row is compared with
_CACHED = 50_000  # hashes of words, about 8 MB

# Scripts without spaces between words are split into characters.
_WORDS = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


def _odd(count: int) -> UInt64[np.ndarray, " n"]:
    """Random odd multipliers of 64 bits: an even one would lose bits of the product, and a small one would
    hardly change the order of small hashes.
    """
    return np.random.default_rng(20250101).integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)


_FACTORS = _odd(PERMUTATIONS)
_POSITION_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


def words(text: str, *, punctuation: bool = False) -> list[str]:
    """The words of a text in NFKC and without case; the text itself where it has no words.

    Args:
        text: Any text.
        punctuation: Keep punctuation: split at white space alone.

    >>> words("Don't   STOP, café!")
    ['don', 't', 'stop', 'café']
    >>> words("Don't   STOP, café!", punctuation=True)
    ["don't", 'stop,', 'café!']
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return (text.split() if punctuation else _WORDS.findall(text)) or [text.strip()]


def hash64(text: str) -> int:
    """A 64-bit BLAKE2b hash, the same on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingles(tokens: Sequence[str], cache: dict[str, int] | None = None) -> UInt64[np.ndarray, " n"]:
    """Hashes of the distinct runs of three words; one hash of the whole text where it has fewer.

    Args:
        tokens: Words.
        cache: Hashes of words, extended here and emptied beyond 50,000 words.
    """
    cache = {} if cache is None else cache
    if len(cache) > _CACHED:
        cache.clear()
    numbers = []
    for token in tokens:
        number = cache.get(token)
        if number is None:
            number = cache[token] = hash64(token)
        numbers.append(number)
    hashes = np.array(numbers, dtype=np.uint64)
    width = min(_SHINGLE, len(hashes))
    total = np.zeros(len(hashes) - width + 1, dtype=np.uint64)
    for position in range(width):
        total += hashes[position : position + len(total)] * np.uint64(_POSITION_FACTORS[position])
    return np.unique(_mix(total))


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Mix the bits: each bit of the input changes every bit of the output (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def minhash(hashes: UInt64[np.ndarray, " n"]) -> UInt32[np.ndarray, " p"]:
    r"""The MinHash signature of a set: its smallest hash under each of 128 permutations.

    The share of equal entries of two signatures estimates the Jaccard similarity
    :math:`|A \cap B| / |A \cup B|` with a standard deviation of at most 0.044. Broder (1997), On the
    resemblance and containment of documents.

    Args:
        hashes: The set's members, ``[n]``; the signature of an empty set is the largest value.
    """
    if not len(hashes):
        return np.full(PERMUTATIONS, 2**32 - 1, dtype=np.uint32)
    out = np.full(PERMUTATIONS, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(hashes), 4096):  # the table of a long text would be large
        table = hashes[start : start + 4096, None] * _FACTORS
        table ^= table >> np.uint64(29)
        table *= np.uint64(_POSITION_FACTORS[1])
        out = np.minimum(out, table.min(axis=0))
    return (out >> np.uint64(32)).astype(np.uint32)


def band_width(threshold: float) -> int:
    """Signature entries of an LSH band: the largest width at which 99 % of the pairs at the threshold are
    still equal in some band.
    """
    for width in (16, 8, 4, 2):
        if (1 - threshold**width) ** (PERMUTATIONS // width) < 0.01:
            return width
    return 1


class Clusters:
    """Union-find over row numbers; the root of a cluster is its smallest member."""

    def __init__(self, count: int) -> None:
        self.parent = array("q", range(count))

    def find(self, row: int) -> int:
        """The cluster's root."""
        while self.parent[row] != row:
            self.parent[row] = self.parent[self.parent[row]]
            row = self.parent[row]
        return row

    def union(self, a: int, b: int) -> None:
        """Merge the clusters of two rows."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def roots(self) -> Int64[np.ndarray, " n"]:
        """The root of every row."""
        return np.array([self.find(row) for row in range(len(self.parent))], dtype=np.int64)


def near_duplicates(
    signatures: Signatures, threshold: float, rows: Int64[np.ndarray, " m"] | None = None
) -> Clusters:
    """Clusters of rows whose signatures agree in at least ``threshold`` of their entries, by
    locality-sensitive hashing.

    Rows that are equal in a whole band fall into one bucket and are compared there, each with the bucket's
    first 16 distinct rows: time and memory are linear in the number of rows, even where a thousand of them
    are similar. One band is in memory at a time.

    Args:
        signatures: One a row, ``[n, 128]``, in memory or in a
            :class:`~mlx_distill.data.row_buffer.SignatureFile`.
        threshold: Estimated Jaccard similarity from which two rows are near duplicates; above 0.
        rows: The numbers of the rows to compare; all of them by default. The clusters are numbered like them.
    """
    rows = np.arange(len(signatures)) if rows is None else rows
    clusters = Clusters(len(rows))
    width = band_width(threshold)
    needed = int(np.ceil(threshold * PERMUTATIONS - 1e-9))
    for start in range(0, PERMUTATIONS, width):
        keys = _keys(signatures[:, start : start + width])[rows]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        ends = np.append(np.flatnonzero(keys[1:] != keys[:-1]) + 1, len(keys))
        sizes = np.diff(ends, prepend=0)
        for end, size in zip(ends[sizes > 1], sizes[sizes > 1], strict=True):
            _compare_bucket(clusters, signatures, rows, order[end - size : end], needed)
    return clusters


def _keys(band: UInt32[np.ndarray, "n w"]) -> UInt64[np.ndarray, " n"]:
    """A hash of each row's band. A collision costs a comparison, never a wrong result."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        keys = _mix(keys * _FACTORS[0] + column)
    return keys


def _compare_bucket(
    clusters: Clusters,
    signatures: Signatures,
    rows: Int64[np.ndarray, " m"],
    members: Int64[np.ndarray, " k"],
    needed: int,
) -> None:
    """Merge the clusters of the similar rows of a bucket."""
    representatives: list[int] = []
    table = np.empty((_REPRESENTATIVES, PERMUTATIONS), dtype=np.uint32)
    for row in map(int, members):
        root = clusters.find(row)
        if any(clusters.find(other) == root for other in representatives):
            continue
        own = signatures[int(rows[row])]
        same = (table[: len(representatives)] == own).sum(axis=1)
        for other in np.flatnonzero(same >= needed):
            clusters.union(row, representatives[int(other)])
        if (same >= needed).any():
            continue
        if len(representatives) < _REPRESENTATIVES:
            table[len(representatives)] = own
            representatives.append(row)
