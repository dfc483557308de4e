"""Distributions in few bits: what is kept exactly, the stated error of the rest, sizes, damage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_distill.distill.token_codec import (
    TokenLayout,
    TokenRecords,
    from_short_float,
    pack_records,
    to_short_float,
    unpack_records,
)
from mlx_distill.losses.numerics import LOWEST

WIDE = TokenLayout(columns=151_936, top_k=32, length_bits=7)


def records(n: int, k: int, columns: int, sharpness: float = 3.0) -> tuple[TokenRecords, np.ndarray]:
    """Top k of random logits, and all log-probabilities in float64."""
    random = np.random.default_rng(n + k)
    z = random.normal(size=(n, columns)) * random.uniform(0.1, sharpness, (n, 1)) * 2
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    ids = np.argsort(-logs, axis=1)[:, :k]
    kept = np.take_along_axis(logs, ids, axis=1)
    rest = logs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.log(np.exp(rest).sum(axis=1)), LOWEST)
    own = random.integers(0, columns, n)
    return TokenRecords(own, logs[np.arange(n), own], ids, kept, tail, random.integers(0, 100, n)), logs


@pytest.mark.parametrize("columns", [2, 33, 4096, 5000])
@pytest.mark.parametrize("k", [1, 2, 32])
def test_ids_lengths_and_order_are_exact_and_probabilities_within_the_stated_error(
    columns: int, k: int
) -> None:
    k = min(k, columns)
    layout = TokenLayout(columns=columns, top_k=k, length_bits=7)
    given, _ = records(40, k, columns)
    packed = pack_records(layout, given)
    assert packed.shape == (40, layout.record_bytes) and packed.dtype == np.uint8
    out = unpack_records(layout, packed)
    for name in ("ids", "lengths"):
        assert (getattr(out, name) == getattr(given, name)).all(), name
    for row in range(40):  # equal log-probabilities may change places
        assert sorted(out.topk_ids[row]) == sorted(given.topk_ids[row])
        place = {token: i for i, token in enumerate(given.topk_ids[row].tolist())}
        expected = given.topk_logprobs[row][[place[token] for token in out.topk_ids[row].tolist()]]
        # Rounding of one, and of the sum that all are divided by.
        error = np.abs(expected) * 2.0**-10 + 2.0**-10
        assert (np.abs(out.topk_logprobs[row] - expected) <= error).all()
    assert (np.diff(out.topk_logprobs, axis=1) <= 0).all()
    mass = np.exp(out.topk_logprobs.astype(float)).sum(axis=1) + np.exp(out.tail_logprobs.astype(float))
    assert np.abs(mass - 1).max() < 1e-6
    assert (np.abs(out.logprobs - given.logprobs) <= np.abs(given.logprobs) * 2.0**-12).all()


def test_a_short_float_is_within_its_relative_error_in_its_range() -> None:
    x = np.exp(np.random.default_rng(0).uniform(np.log(2.0**-24), np.log(126.0), 20_000))
    for bits, error in ((14, 2.0**-10), (16, 2.0**-12)):
        assert (np.abs(from_short_float(to_short_float(x, bits), bits) - x) <= error * x).all()
    edges = np.array([0.0, 1e-9, 128.0, 1e30, np.inf])
    assert from_short_float(to_short_float(edges, 14), 14).tolist() == [0, 0, np.inf, np.inf, np.inf]
    codes = np.arange(1 << 14)
    assert (to_short_float(from_short_float(codes, 14), 14)[1:] == codes[1:]).all()


def test_the_genuine_vocabularies_take_less_than_130_bytes_a_token() -> None:
    for columns in (151_936, 201_088, 248_320):
        layout = replace(WIDE, columns=columns, length_bits=8)
        assert layout.record_bytes <= 123
        # 5 bytes a token are the text and the index: 130 with one temperature.
        assert replace(layout, temperatures=(2.0,)).record_bytes <= 125
        n, edge = 20, np.arange(columns - 32, columns)
        even = np.full((n, 32), np.log(1 / 64))
        given = TokenRecords(
            np.full(n, columns - 1),
            even[:, 0],
            np.tile(edge, (n, 1)),
            even,
            np.full(n, np.log(0.5)),
            np.full(n, 255),
        )
        out = unpack_records(layout, pack_records(layout, given))
        assert (np.sort(out.topk_ids, axis=1) == edge).all() and (out.ids == columns - 1).all()


def test_unused_slots_stay_unused() -> None:
    given, _ = records(5, 3, 50)
    given.topk_logprobs[:, 2] = LOWEST
    given = replace(given, tail_logprobs=np.log1p(-np.exp(given.topk_logprobs).sum(axis=1)))
    for k in (3, 8):
        out = unpack_records(
            TokenLayout(50, k, length_bits=7), pack_records(TokenLayout(50, k, length_bits=7), given)
        )
        assert (out.topk_logprobs[:, 2:] == np.float32(LOWEST)).all()
        assert (out.topk_ids[:, :2] == given.topk_ids[:, :2]).all()


def test_samples_come_back_as_the_shares_of_distinct_tokens() -> None:
    layout = TokenLayout(columns=300, top_k=8, sampled=True)
    ids, shares = np.array([[299, 5, 0, 7], [1, 1, 1, 1]]), np.array([[1, 4, 2, 1], [8, 0, 0, 0]]) / 8
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(shares), LOWEST)
    given = TokenRecords(np.array([5, 1]), np.zeros(2), ids, logs, np.full(2, LOWEST), np.zeros(2, int))
    out = unpack_records(layout, pack_records(layout, given))
    assert out.topk_ids[0, :4].tolist() == [5, 0, 7, 299]
    assert np.allclose(np.exp(out.topk_logprobs[0]), [0.5, 0.25, 0.125, 0.125, 0, 0, 0, 0])
    assert np.exp(out.topk_logprobs[1]).tolist() == [1] + [0] * 7 and (out.topk_ids[1] == 1).all()
    assert layout.record_bytes < TokenLayout(columns=300, top_k=8).record_bytes
    with pytest.raises(ValueError, match="samples"):
        pack_records(layout, replace(given, topk_logprobs=logs - 1))


def test_what_does_not_fit_or_is_no_distribution_is_refused() -> None:
    layout = TokenLayout(columns=50, top_k=3, length_bits=7)
    given, _ = records(4, 3, 50)
    for changes in (
        {"ids": given.ids + 50},
        {"topk_ids": given.topk_ids - 50},
        {"lengths": given.lengths + 128},
        {"topk_logprobs": given.topk_logprobs * np.nan},
        {"tail_logprobs": given.tail_logprobs + 1},
        {"tempered_tails": np.zeros((4, 1))},
    ):
        with pytest.raises(ValueError, match=r"does not fit|sum to|1 temperatures, not 0"):
            pack_records(layout, replace(given, **changes))
    tempered = replace(layout, temperatures=(2.0,))
    for tail in (np.nan, 0.7):
        with pytest.raises(ValueError, match="not from 0 to 1"):
            pack_records(tempered, replace(given, tempered_tails=np.full((4, 1), tail)))
    with pytest.raises(ValueError, match="0 temperatures, not 1"):
        pack_records(tempered, given)
    with pytest.raises(ValueError, match="3 ids a token, not 2"):
        pack_records(replace(layout, top_k=2), given)
    packed = pack_records(layout, given)
    with pytest.raises(ValueError, match="bytes"):
        unpack_records(layout, packed[:, 1:])
    with pytest.raises(ValueError, match="ids a token"):
        unpack_records(layout, packed * 0)


def test_the_mass_outside_at_a_temperature_is_within_its_error_however_small_it_is() -> None:
    layout = TokenLayout(columns=50, top_k=3, length_bits=7, temperatures=(2.0, 0.5))
    given, _ = records(40, 3, 50)
    tails = -np.exp(np.random.default_rng(1).uniform(np.log(1e-6), np.log(120), (40, 2)))
    tails[0] = LOWEST
    out = unpack_records(layout, pack_records(layout, replace(given, tempered_tails=tails))).tempered_tails
    assert out is not None and (out[0] == np.float32(LOWEST)).all()
    assert (np.abs(out[1:] - tails[1:]) <= np.abs(tails[1:]) * 2.0**-12).all()
