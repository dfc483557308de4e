"""The targets in the middle of tokens of the aligned rows: on disk, and in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from mlx_distill.losses.mid_token import MidTokenTargets

_NAMES = tuple(field.name for field in fields(MidTokenTargets))


def mid_token_arrays(targets: MidTokenTargets | None) -> dict[str, np.ndarray]:
    """The arrays of one row, by name; none without targets. :func:`mid_token_targets` is the inverse."""
    return {} if targets is None else {name: getattr(targets, name) for name in _NAMES}


def mid_token_targets(arrays: Mapping[str, np.ndarray]) -> MidTokenTargets | None:
    """The targets among the arrays of a row; None where it has none."""
    if not all(name in arrays for name in _NAMES):
        return None
    return MidTokenTargets(**{name: arrays[name] for name in _NAMES})


def without_mid_tokens(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The other arrays of a row."""
    return {name: array for name, array in arrays.items() if name not in _NAMES}


def collate_mid_tokens(
    rows: Sequence[MidTokenTargets | None], offsets: Sequence[int]
) -> dict[str, np.ndarray]:
    """The arrays of a batch; none where no row has targets.

    ``inside_index [a]`` and ``across_index [b]`` are indices into the trained positions, and the others are
    those of :class:`~mlx_distill.losses.mid_token.MidTokenTargets`, row by row.

    Args:
        rows: Of the batch's rows, which have all targets of one ``k`` or none.
        offsets: From the number of a row's token in its answer to its index among the trained positions.
    """
    members = [(row, offset) for row, offset in zip(rows, offsets, strict=True) if row is not None]
    if not members:
        return {}
    joined = {
        name: np.concatenate([getattr(row, name) for row, _ in members])
        for name in _NAMES
        if not name.endswith("_starts")
    }
    places = {
        f"{kind}_index": np.concatenate(
            [getattr(row, f"{kind}_starts") + offset for row, offset in members]
        ).astype(np.int32)
        for kind in ("inside", "across")
    }
    return {**joined, **places}
