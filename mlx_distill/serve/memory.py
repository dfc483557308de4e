"""How much memory models may take, and that what they free goes back to the system."""

from __future__ import annotations

import os
import time

from mlx_distill.runtime import trim_heap

_SHARE = 0.6  # of a machine's memory, where MLX does not say more
_BESIDE = 1.15  # caches and activations, as a factor of the weights
_TRIM_SECONDS = 5.0


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


class HeapTrimmer:
    """Keeps a server's memory flat: what its models have freed goes back to the system every few seconds.

    Args:
        seconds: At least between two times.
    """

    def __init__(self, seconds: float = _TRIM_SECONDS) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._works = True

    def tick(self) -> None:
        """Do it, where it is time."""
        if self._works and time.monotonic() - self._last >= self._seconds:
            self._works = trim_heap()
            self._last = time.monotonic()
