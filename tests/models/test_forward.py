"""Rows that share a line: what each sees, and that it gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.models.forward import SegmentCache, Segments, hidden_states, segment_caches
from mlx_distill.models.load import load_model

WINDOW = 8  # of the golden gpt-oss
KINDS = ["qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4"]
LENGTHS = [11, 1, 29, 5, 17]


def make_line(lengths: Sequence[int], padding: int = 0, seed: int = 0) -> tuple[mx.array, mx.array]:
    tokens = np.random.default_rng(seed).integers(0, 64, sum(lengths) + padding)
    ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(padding, int)])
    return mx.array(tokens[None].astype(np.int32)), mx.array(ids[None].astype(np.int32))


def read(model: Any, tokens: mx.array, ids: mx.array) -> np.ndarray:
    return np.array(hidden_states(model, tokens, segment_caches(model, ids)))[0]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_a_token_sees_its_own_row_up_to_itself_through_the_window(window: int | None) -> None:
    ids = np.array([[1, 1, 1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)
    mask = np.array(SegmentCache(Segments(mx.array(ids)), window).make_mask(10))
    assert mask.shape == (2, 1, 10, 10)
    for (i, _, q, k), seen in np.ndenumerate(mask):
        assert seen == (ids[i, q] == ids[i, k] and k <= q and (window is None or q - k < window))
    assert mask.any(axis=-1).all()  # no softmax over nothing, the padding's included


def test_of_two_windows_the_smaller_counts_and_each_mask_is_made_once() -> None:
    segments = Segments(mx.ones((1, 9), mx.int32))
    cache = SegmentCache(segments, 4)
    assert cache.make_mask(9, window_size=2) is segments.mask(2) and cache.make_mask(
        9, window_size=6
    ) is segments.mask(4)
    assert SegmentCache(segments).make_mask(9, return_array=True) is segments.mask(None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_a_line_gets_what_it_gets_alone(golden: Callable[[str], Path], kind: str) -> None:
    model, _ = load_model(golden(kind), dtype="float32")
    tokens, ids = make_line(LENGTHS, padding=6)
    packed, start = read(model, tokens, ids), 0
    for length in LENGTHS:
        alone = np.array(hidden_states(model, tokens[:, start : start + length]))[0]
        np.testing.assert_allclose(packed[start : start + length], alone, atol=5e-6 * np.abs(alone).max())
        start += length
    plain = np.array(hidden_states(model, tokens))[0]
    assert np.abs(plain - packed)[LENGTHS[0] :].max() > 1e-2  # the mask is not idle
    assert np.isfinite(packed).all()


@pytest.mark.parametrize("kind", ["qwen3_yarn", "gpt_oss"])
def test_running_positions_are_restarted_ones_far_into_a_line(
    golden: Callable[[str], Path], kind: str
) -> None:
    """Rope knows differences alone; what is left is the rounding of the angle, which grows with the place."""
    model, _ = load_model(golden(kind), dtype="float32")
    tokens, ids = make_line([480, 30])
    alone = np.array(hidden_states(model, tokens[:, 480:]))[0]
    np.testing.assert_allclose(read(model, tokens, ids)[480:], alone, atol=5e-5 * np.abs(alone).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4"])
@pytest.mark.parametrize("changed", [0, 2, 4])
def test_no_row_sees_another(golden: Callable[[str], Path], kind: str, changed: int) -> None:
    model, _ = load_model(golden(kind), dtype="float32")
    tokens, ids = make_line(LENGTHS, padding=6)
    mine = np.array(ids)[0] == changed + 1
    other = np.where(mine, (np.array(tokens)[0] + 7) % 64, np.array(tokens)[0]).astype(np.int32)
    before, after = read(model, tokens, ids), read(model, mx.array(other[None]), ids)
    assert np.abs(before - after)[mine].max() > 1e-2
    # Not bitwise where experts are gathered: rows of a product are grouped by expert, over all tokens.
    np.testing.assert_allclose(before[~mine], after[~mine], atol=1e-6 * np.abs(before).max())
    if kind == "qwen3":
        assert (before[~mine] == after[~mine]).all()


def test_a_recurrent_model_is_refused() -> None:
    from mlx_lm.models.cache import ArraysCache, KVCache

    class Recurrent:
        def make_cache(self) -> list[Any]:
            return [KVCache(), ArraysCache(2)]

    with pytest.raises(ModelError, match="ArraysCache cannot compute packed sequences") as caught:
        segment_caches(Recurrent(), mx.ones((1, 4), mx.int32))
    assert caught.value.fix == "packing: false"
