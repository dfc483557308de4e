"""MLX's random state, read and put back."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def random_key() -> list[int]:
    """The two words of MLX's random state on this thread.

    >>> key = random_key(); a = mx.random.normal((2,)); set_random_key(key); mx.array_equal(a, mx.random.normal((2,))).item()
    True
    """
    return [int(word) for word in mx.random.state[0].tolist()]


def set_random_key(key: Sequence[int]) -> None:
    """Put MLX's random state back to what :func:`random_key` gave; the state itself cannot be assigned to."""
    mx.random.seed((int(key[0]) << 32) | int(key[1]))
