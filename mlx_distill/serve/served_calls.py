"""Calls that models answered, added up in memory and recorded as costs once a minute."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from mlx_distill.ledger.database import Ledger
from mlx_distill.running_costs import ServedCalls, record_served
from mlx_distill.serve.usage import Usage

_MINUTE = 60.0


class ServedCallCounts:
    """The calls since they were recorded last.

    Args:
        ledger: Opens the ledger that they are recorded in.
        every: Seconds between two records.
    """

    def __init__(self, ledger: Callable[[], Ledger], every: float = _MINUTE) -> None:
        self._ledger, self._every = ledger, every
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)
        self._recorded = time.monotonic()

    def add(self, usage: Usage) -> None:
        """Add what a request used."""
        if usage.model is None or not usage.calls:
            return
        with self._lock:
            one = self._usage[usage.model]
            one.calls += usage.calls
            one.invalid += usage.invalid
            one.prompt_tokens += usage.prompt_tokens
            one.tokens += usage.tokens

    def worked(self, model: str) -> Callable[[float], None]:
        """What the engine of a model tells its seconds to: those of the machine, so calls that are computed
        together count once.
        """
        return partial(self._add_seconds, model)

    def _add_seconds(self, model: str, seconds: float) -> None:
        with self._lock:
            self._seconds[model] += seconds

    def tick(self) -> None:
        """Record them where it is time."""
        if time.monotonic() - self._recorded >= self._every:
            self.record()

    def record(self) -> None:
        """Record them now. Where the ledger cannot take them they are kept for the next time."""
        self._recorded = time.monotonic()
        with self._lock:
            names = list(self._usage)
        for name in names:
            with self._lock:
                usage, seconds = self._usage.pop(name), self._seconds.pop(name, None)
            calls = ServedCalls(
                usage.calls,
                seconds or 0.0,
                usage.prompt_tokens,
                usage.tokens,
                usage.invalid,
                measured=seconds is not None,  # an external analyzer works elsewhere
            )
            try:
                record_served(self._ledger(), name, calls)
            except BaseException:
                self.add(_named(usage, name))
                if seconds is not None:
                    self._add_seconds(name, seconds)
                raise


def _named(usage: Usage, model: str) -> Usage:
    usage.model = model
    return usage
