"""mlx-lm's caches of several rows, as this package uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.infer.kv_cache import (
    continue_from,
    fork,
    forward,
    has_plain_caches,
    merge,
    pad_right,
    read,
    row_cache,
    select,
    split,
)
from mlx_distill.models.forward import hidden_states


def make_rows(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 300, length).tolist() for length in lengths]


def last_hidden(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """The reference: one row, no cache."""
    return np.array(hidden_states(model, mx.array([list(tokens)]))[0, -1])


def check(model: Any, got: mx.array, rows: Sequence[Sequence[int]]) -> None:
    for line, row in zip(np.array(got), rows, strict=True):
        np.testing.assert_allclose(line, last_hidden(model, row), atol=3e-5)


@pytest.mark.parametrize("step_size", [3, 7, 1024])
def test_rows_of_any_length_are_read_as_each_alone(any_model: Any, step_size: int) -> None:
    rows = make_rows(5, 1, 30, 12, 2)
    caches = merge([row_cache(any_model)] * len(rows))
    check(any_model, read(any_model, caches, rows, step_size=step_size), rows)
    more = make_rows(1, 9, 2, 4, 20)  # behind what they hold
    both = [[*row, *behind] for row, behind in zip(rows, more, strict=True)]
    check(any_model, read(any_model, caches, more, step_size=step_size), both)


def test_a_shared_prefix_is_read_once(any_model: Any) -> None:
    prefix, *rests = make_rows(21, 3, 8, 1)
    shared = row_cache(any_model)
    mx.eval(hidden_states(any_model, mx.array([prefix]), shared))
    for _ in range(2):  # what is read behind it does not change it
        caches = merge([shared] * len(rests))
        check(any_model, read(any_model, caches, rests), [[*prefix, *rest] for rest in rests])


def test_continuations_do_not_see_each_other(any_model: Any) -> None:
    """Also past the sliding window, and behind tokens that were decoded one by one."""
    rows = make_rows(5, 1, 9, 2)
    caches = merge([row_cache(any_model)] * len(rows))
    mx.eval(read(any_model, caches, rows))
    for step, count in enumerate([1, 2, 3, 2, 3, 2]):
        tokens = mx.array(make_rows(count, count, count, count)) + step
        hidden, behind = continue_from(any_model, caches, tokens)
        longer = [[*row, *more] for row, more in zip(rows, tokens.tolist(), strict=True)]
        check(any_model, hidden, longer)
        again, _ = continue_from(any_model, behind, tokens[:, :1])
        check(any_model, again, [[*row, row[-count]] for row in longer])
        decoded = make_rows(1, 1, 1, 1)
        rows = [[*row, *token] for row, token in zip(rows, decoded, strict=True)]
        check(any_model, hidden_states(any_model, mx.array(decoded), caches)[:, -1], rows)


def test_selected_and_split_rows_go_on_as_before(any_model: Any) -> None:
    rows = make_rows(5, 1, 19, 2)
    caches = merge([row_cache(any_model)] * len(rows))
    mx.eval(read(any_model, caches, rows))
    more = mx.array(make_rows(3, 3, 3, 3))
    longer = [[*row, *behind] for row, behind in zip(rows, more.tolist(), strict=True)]
    keep = [2, 0]
    check(
        any_model,
        continue_from(any_model, select(caches, keep), more[mx.array(keep)])[0],
        [longer[i] for i in keep],
    )
    again = merge([split(caches, [i])[0] for i in (3, 1, 2)])
    order = [3, 1, 2]
    check(any_model, continue_from(any_model, again, more[mx.array(order)])[0], [longer[i] for i in order])
    check(any_model, continue_from(any_model, caches, more)[0], longer)


def test_a_row_keeps_no_more_than_it_is_told(model: Any) -> None:
    """What is not kept is read all the same, where a cache can be cut behind any token."""
    assert has_plain_caches(model)
    rows, kept = make_rows(12, 9, 15), [4, 9, 1]
    caches = merge([row_cache(model)] * 3)
    hidden = forward(lambda x, cache: hidden_states(model, x, cache), caches, pad_right(rows), kept)
    check(model, mx.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)]), rows)
    more = mx.array(make_rows(2, 2, 2))
    behind = [[*row[:n], *x] for row, n, x in zip(rows, kept, more.tolist(), strict=True)]
    check(model, continue_from(model, caches, more)[0], behind)


def test_a_cache_that_cannot_be_batched_is_named() -> None:
    from mlx_lm.models.cache import ChunkedKVCache

    with pytest.raises(ModelError, match="a ChunkedKVCache cannot"):
        merge([[ChunkedKVCache(8)]])


def test_mlx_lm_still_masks_one_token_too_many_behind_a_rotated_cache() -> None:
    """Once this fails, ``kv_cache._before_several_tokens`` can go."""
    from mlx_lm.models.cache import BatchRotatingKVCache

    cache = BatchRotatingKVCache(4, [0, 3])
    for _ in range(5):
        cache.update_and_fetch(mx.ones((2, 1, 1, 1)), mx.ones((2, 1, 1, 1)))
    assert cache.rotated and cache.left_padding.tolist() == [-1, 2]
    ordered = fork([cache])[0]
    ordered._temporal_order()
    wanted = np.array(ordered.make_mask(2))
    assert (np.array(cache.make_mask(2)) != wanted).any()
