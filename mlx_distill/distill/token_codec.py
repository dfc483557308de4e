"""The teacher's distributions in few bits: one record of a fixed number of bytes a token.

=============  =====================  ================================================================
field          bits                   contents
=============  =====================  ================================================================
low, high      k·l + k + (v-1 >> l)   the k ids in ascending order, in Elias and Fano's code
logprobs       14·k                   minus their log-probabilities, in the order of the ids
tail           16                     minus the logarithm of the mass outside of the k
tempered       16·t                   the same of the distribution at each of t temperatures
id             bits of v - 1          the token itself
logprob        16                     minus its log-probability
length         of the longest token   its bytes
=============  =====================  ================================================================

``l = floor(log2(v / k))`` for k ids below v columns. The code of Elias and Fano (P. Elias 1974,
https://doi.org/10.1145/321812.321820) keeps the lowest l bits of an ascending number as they are, and the
number of id i that is left, ``h_i``, as a one at place ``h_i + i``: within half a bit an id of what a sorted
set can need at all.

A positive number x is kept as a short float (:func:`to_short_float`): 5 bits of exponent and the others of
mantissa, so that 14 bits are within a relative error of 2^-10 and 16 bits of 2^-12, between 2^-25 and 2^7;
below is 0, and from there on (a probability below e^-127) is none at all. A log-probability near 0, which
has nearly all the mass, is so kept far more exactly than one of -20. When it is read, the k probabilities and
the tail are divided by their sum, which is 1 but for rounding. At a temperature T the k have the mass
that is not outside of them, in the proportions of p^(1/T): what the partition of T over all columns would
give, in half its bits and with a sum of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from mlx_distill.losses.numerics import LOWEST

EXPONENT_BITS = 5
LARGEST_EXPONENT = 6  # values are below 2^7
LOGPROB_BITS, TOTAL_BITS = 14, 16
MASS_ERROR = 0.01  # what the sum of the probabilities may differ from 1


@dataclass(frozen=True)
class TokenLayout:
    """What the records of some tokens hold.

    Args:
        columns: Ids are below this number v.
        top_k: Ids a token, k.
        sampled: The k ids are samples of the distribution, repeated where a token was drawn more than once,
            without log-probabilities and tail.
        length_bits: Of the tokens' bytes; 0 where these are not known.
        temperatures: Those at which the mass outside of the k is kept too.

    >>> TokenLayout(columns=151_936, top_k=32, length_bits=7).record_bytes
    120
    >>> TokenLayout(columns=201_088, top_k=32, length_bits=7).record_bytes
    122
    >>> TokenLayout(columns=201_088, top_k=32, length_bits=7, temperatures=(2.0,)).record_bytes
    124
    """

    columns: int
    top_k: int
    sampled: bool = False
    length_bits: int = 0
    temperatures: tuple[float, ...] = ()

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, int(self.columns - 1).bit_length())

    @property
    def low_bits(self) -> int:
        """Bits of an id that are kept as they are, l."""
        return max(0, (self.columns // self.top_k).bit_length() - 1)

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Name, count and bits of each field, in their order."""
        k = self.top_k
        high = k + ((self.columns - 1) >> self.low_bits)
        out = {"low": (k, self.low_bits), "high": (high, 1)}
        if not self.sampled:
            out |= {"logprobs": (k, LOGPROB_BITS), "tail": (1, TOTAL_BITS)}
            out |= {"tempered": (len(self.temperatures), TOTAL_BITS)}
        return out | {"id": (1, self.id_bits), "logprob": (1, TOTAL_BITS), "length": (1, self.length_bits)}

    @property
    def record_bytes(self) -> int:
        """Bytes of a token."""
        return -(-sum(count * bits for count, bits in self.fields.values()) // 8)


@dataclass(frozen=True)
class TokenRecords:
    """The teacher's distributions at n tokens.

    Args:
        ids: The tokens.
        logprobs: Their log-probabilities, nats.
        topk_ids: The ids that are kept of each distribution.
        topk_logprobs: Their log-probabilities, descending; ``LOWEST`` marks an unused slot. Of a sampled
            layout the logarithms of the shares of the samples.
        tail_logprobs: The logarithm of the mass outside of these; ``LOWEST`` where there is none.
        lengths: Bytes of each token; zeros where they are not known.
        tempered_tails: The logarithm of the mass outside of these at each temperature of the layout.
    """

    ids: Int[np.ndarray, " n"]
    logprobs: Float[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]
    tail_logprobs: Float[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    tempered_tails: Float[np.ndarray, "n t"] | None = None


def pack_records(layout: TokenLayout, records: TokenRecords) -> UInt8[np.ndarray, "n b"]:
    """One record a token.

    Args:
        layout: What they hold. The records may have fewer ids a token than it; the other slots are unused.
        records: The distributions.

    Raises:
        ValueError: a number that the layout has no room for, or probabilities that do not sum to 1.

    >>> layout = TokenLayout(columns=100, top_k=2, length_bits=3)
    >>> one = np.log(np.array([[0.5, 0.25]], dtype=np.float32))
    >>> tail = np.log(np.array([0.25], dtype=np.float32))
    >>> records = TokenRecords(np.array([7]), one[:, 0], np.array([[7, 3]]), one, tail, np.array([4]))
    >>> again = unpack_records(layout, pack_records(layout, records))
    >>> again.topk_ids.tolist(), np.exp(again.topk_logprobs).round(3).tolist(), again.lengths.tolist()
    ([[7, 3]], [[0.5, 0.25]], [4])
    """
    n, k = len(records.ids), layout.top_k
    ids, logprobs = _drawn(k, records) if layout.sampled else _padded_to(k, records)
    for what, numbers, limit in (
        ("id", ids, layout.columns),
        ("id", records.ids, layout.columns),
        ("length", records.lengths, 1 << layout.length_bits),
    ):
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
            raise ValueError(f"a token's {what} of {numbers.min()} to {numbers.max()} does not fit {layout}")
    if not layout.sampled:
        mass = np.exp(logprobs).sum(axis=1) + np.exp(records.tail_logprobs)
        if not np.all(np.abs(mass - 1) < MASS_ERROR):  # a NaN fails too
            raise ValueError(f"probabilities that sum to {mass[np.argmax(~(np.abs(mass - 1) < MASS_ERROR))]}")
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    low = layout.low_bits
    high = np.zeros((n, layout.fields["high"][0]), dtype=np.uint8)
    np.put_along_axis(high, (ids >> low) + np.arange(k), 1, axis=1)
    values = {"low": ids & ((1 << low) - 1), "high": high, "id": records.ids[:, None]}
    values["length"] = records.lengths[:, None]
    values["logprob"] = to_short_float(-records.logprobs, TOTAL_BITS)[:, None]
    if not layout.sampled:
        logprobs = np.take_along_axis(logprobs, order, axis=1)
        values["logprobs"] = to_short_float(-logprobs, LOGPROB_BITS)
        values["tail"] = to_short_float(-records.tail_logprobs, TOTAL_BITS)[:, None]
        values["tempered"] = to_short_float(-_tempered_tails(layout, records), TOTAL_BITS)
    parts = [_to_bits(values[name], bits) for name, (_, bits) in layout.fields.items()]
    return np.packbits(np.concatenate(parts, axis=1), axis=1)


def unpack_records(layout: TokenLayout, packed: UInt8[np.ndarray, "n b"]) -> TokenRecords:
    """The inverse of :func:`pack_records`, but for the rounding of log-probabilities.

    Raises:
        ValueError: records that :func:`pack_records` has not written with this layout.
    """
    if packed.shape[1] != layout.record_bytes:
        raise ValueError(f"records of {packed.shape[1]} bytes, not {layout.record_bytes}")
    bits = np.unpackbits(packed, axis=1)
    values, start = {}, 0
    for name, (count, width) in layout.fields.items():
        part = bits[:, start : start + count * width]
        values[name] = part if name == "high" else _from_bits(part, count, width)
        start += count * width
    n, k = len(packed), layout.top_k
    ones = np.nonzero(values["high"])[1]
    if len(ones) != n * k or (n and (values["high"].sum(axis=1) != k).any()):
        raise ValueError(f"records without {k} ids a token")
    ids = ((ones.reshape(n, k) - np.arange(k)) << layout.low_bits) | values["low"]
    own = -from_short_float(values["logprob"][:, 0], TOTAL_BITS)
    ids, logprobs, tail = (
        _sample_shares(ids) if layout.sampled else _normalized(ids, values["logprobs"], values["tail"][:, 0])
    )
    return TokenRecords(
        values["id"][:, 0].astype(np.int32),
        np.where(own < LOWEST, LOWEST, own).astype(np.float32),
        ids.astype(np.int32),
        logprobs,
        tail,
        values["length"][:, 0].astype(np.int32),
        np.maximum(-from_short_float(values.get("tempered", np.zeros((n, 0), int)), TOTAL_BITS), LOWEST),
    )


def to_short_float(x: Float[np.ndarray, "*n"], bits: int) -> Int[np.ndarray, "*n"]:
    """The nearest short float of numbers from 0 on, as its code: 5 bits of exponent, the others of mantissa.

    The largest code is infinity; it also takes what is 2^7 or more.

    >>> from_short_float(to_short_float(np.array([0.0, 0.75, 1e9]), 14), 14).tolist()
    [0.0, 0.75, inf]
    """
    shift = 23 - (bits - EXPONENT_BITS)
    # A float of 32 bits: what is behind the sign is in the order of the numbers, and rounding carries over.
    raw = np.maximum(x, 0).astype(np.float32).view(np.uint32).astype(np.int64)
    code = ((raw + (1 << (shift - 1))) >> shift) - _base(bits)
    return np.clip(code, 0, (1 << bits) - 1)


def from_short_float(code: Int[np.ndarray, "*n"], bits: int) -> Float[np.ndarray, "*n"]:
    """The numbers of :func:`to_short_float`."""
    shift = 23 - (bits - EXPONENT_BITS)
    raw = ((code.astype(np.int64) + _base(bits)) << shift).astype(np.uint32)
    out = np.where(code == 0, np.float32(0), raw.view(np.float32))
    return np.where(code == (1 << bits) - 1, np.float32(np.inf), out).astype(np.float32)


def _base(bits: int) -> int:
    """The first code in the numbering of a 32-bit float's exponent and as many bits of mantissa."""
    smallest = LARGEST_EXPONENT - (1 << EXPONENT_BITS) + 1
    return (127 + smallest) << (bits - EXPONENT_BITS)


def _padded_to(k: int, records: TokenRecords) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities with k slots a token; added ones repeat an id and have no probability."""
    ids, logprobs = records.topk_ids.astype(np.int64), records.topk_logprobs
    missing = k - ids.shape[1]
    if missing < 0:
        raise ValueError(f"{ids.shape[1]} ids a token, not {k}")
    if not missing:
        return ids, logprobs
    return (
        np.concatenate([ids, np.repeat(ids[:, :1], missing, axis=1)], axis=1),
        np.pad(logprobs, ((0, 0), (0, missing)), constant_values=LOWEST),
    )


def _tempered_tails(layout: TokenLayout, records: TokenRecords) -> np.ndarray:
    count = len(layout.temperatures)
    tails = np.zeros((len(records.ids), 0)) if records.tempered_tails is None else records.tempered_tails
    if tails.shape[1] != count:
        raise ValueError(f"the masses of {tails.shape[1]} temperatures, not {count}")
    if not np.all(tails < MASS_ERROR):  # a NaN fails too
        raise ValueError("a mass outside of the top k that is not from 0 to 1")
    return tails


def _drawn(k: int, records: TokenRecords) -> tuple[np.ndarray, np.ndarray]:
    """The k samples of each token from the shares of distinct ids."""
    counts = np.rint(np.exp(records.topk_logprobs) * k).astype(np.int64)
    if (counts.sum(axis=1) != k).any():
        raise ValueError(f"shares that are not of {k} samples a token")
    ids = np.repeat(records.topk_ids.astype(np.int64).ravel(), counts.ravel()).reshape(len(counts), k)
    return ids, np.zeros(ids.shape)


def _normalized(ids: np.ndarray, codes: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ids and log-probabilities in descending order, and the tail, with a sum of 1."""
    logs = -from_short_float(np.concatenate([codes, tail[:, None]], axis=1), LOGPROB_BITS).astype(np.float64)
    logs[:, -1] = -from_short_float(tail, TOTAL_BITS)
    mass = np.exp(logs).sum(axis=1, keepdims=True)
    if not np.all(np.abs(mass - 1) < 2 * MASS_ERROR):
        raise ValueError("records whose probabilities do not sum to 1")
    logs -= np.log(mass)
    order = np.argsort(-logs[:, :-1], axis=1, kind="stable")
    logprobs = np.take_along_axis(logs[:, :-1], order, axis=1)
    ids = np.take_along_axis(ids, order, axis=1)
    unused = np.isinf(logprobs)
    ids = np.where(unused, ids[:, :1], ids)
    logprobs, last = np.where(unused, LOWEST, logprobs), np.maximum(logs[:, -1], LOWEST)
    return ids, logprobs.astype(np.float32), last.astype(np.float32)


def _sample_shares(ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """The distinct ids of ascending samples with the logarithms of their shares, and no tail."""
    n, k = ids.shape
    first = np.ones((n, k), dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    run = np.cumsum(first, axis=1) - 1
    counts = np.zeros((n, k), dtype=np.int64)
    np.add.at(counts, (np.arange(n)[:, None], run), 1)
    distinct = np.repeat(ids[:, :1], k, axis=1)
    np.put_along_axis(distinct, run, ids, axis=1)
    order = np.argsort(-counts, axis=1, kind="stable")
    counts, distinct = (np.take_along_axis(a, order, axis=1) for a in (counts, distinct))
    shares = np.where(counts > 0, np.log(np.maximum(counts, 1) / k), LOWEST).astype(np.float32)
    distinct = np.where(counts > 0, distinct, distinct[:, :1])
    return distinct, shares, np.full(n, LOWEST, dtype=np.float32)


def _to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers ``[n, m]`` as ``[n, m * bits]`` zeros and ones, the highest bit first."""
    if bits == 1:
        return values.astype(np.uint8)
    places = np.arange(bits - 1, -1, -1)
    return ((values[..., None] >> places) & 1).astype(np.uint8).reshape(len(values), values.shape[1] * bits)


def _from_bits(bits: np.ndarray, count: int, width: int) -> np.ndarray:
    places = (1 << np.arange(width - 1, -1, -1)).astype(np.int64)
    return bits.reshape(len(bits), count, width).astype(np.int64) @ places
