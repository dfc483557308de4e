"""MXFP4: against the specification in exact arithmetic, and against MLX."""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.errors import ModelError
from mlx_distill.models.mxfp4 import VALUES, decode, encode, to_blocks, to_words


def plain(weights: list[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of 32 weights, in fractions, from the words of the specification."""
    largest = max(abs(Fraction(w)) for w in weights)
    exponent = -127
    if largest:
        exponent = 0
        while Fraction(2) ** (exponent + 1) <= largest:
            exponent += 1
        while Fraction(2) ** exponent > largest:
            exponent -= 1
        exponent = max(exponent - 2, -127)
    codes = []
    for w in weights:
        x = abs(Fraction(w)) / Fraction(2) ** exponent
        near = min(range(8), key=lambda c: (abs(Fraction(float(VALUES[c])) - x), c % 2))
        codes.append(near | (8 if np.signbit(np.float32(w)) else 0))
    return exponent + 127, codes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_encoding_equals_the_specification_in_fractions(weights: list[float]) -> None:
    blocks, scales = encode(np.array(weights, np.float32))
    scale, codes = plain(weights)
    assert scales.tolist() == [scale]
    assert np.stack([blocks & 15, blocks >> 4], -1).reshape(-1).tolist() == codes


def test_ties_go_to_the_even_code_and_large_weights_saturate() -> None:
    row = np.zeros(32, np.float32)
    row[:9] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, -0.25]
    assert decode(*encode(row))[:9].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0]


def test_mlx_reads_the_same_weights_from_the_words() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 5, 128)).astype(np.float32) * 10.0 ** np.arange(-2, 3)[:, None]
    blocks, scales = encode(weights)
    ours = decode(blocks, scales)
    theirs = mx.dequantize(mx.array(to_words(blocks)), mx.array(scales), group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    assert np.array_equal(ours, np.array(theirs))
    # Weights over 6 scales saturate: at most a quarter of a weight, as of the largest of its group.
    assert np.all(
        np.abs(ours - weights) <= np.abs(weights).reshape(3, 5, 4, 32).max(-1, keepdims=True).repeat(32, -1).reshape(weights.shape) / 4
    )


def test_encoding_what_was_decoded_changes_nothing() -> None:
    blocks, scales = encode(np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32))
    again, same = encode(decode(blocks, scales))
    assert np.array_equal(blocks, again)
    assert np.array_equal(scales, same)


def test_words_and_blocks_are_the_same_bytes() -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (2, 3, 4, 16), np.uint8)
    assert to_words(blocks).tobytes() == blocks.tobytes()
    assert np.array_equal(to_blocks(to_words(blocks)), blocks)


@pytest.mark.parametrize("bad", [np.zeros(33, np.float32), np.full(32, np.nan, np.float32), np.full(32, np.inf, np.float32)])
def test_what_cannot_be_encoded_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ModelError):
        encode(bad)
