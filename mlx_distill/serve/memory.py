"""How much memory models may take."""

from __future__ import annotations

import os

_SHARE = 0.6  # of a machine's memory, where MLX does not say more
_BESIDE = 1.15  # caches and activations, as a factor of the weights


def memory_limit(given: int | None = None) -> int:
    """Bytes that all models may take: what was given; what Metal recommends; else a share of the memory."""
    if given is not None:
        return given
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def needed(weights: int) -> int:
    """Bytes that a model needs at work.

    >>> needed(1000)
    1150
    """
    return round(weights * _BESIDE)
