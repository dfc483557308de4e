"""Changes of what answers a name: which one is under way, which has failed, and when it is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlx_distill.errors import DistillError
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.loading import Resolved, key_of

FIRST_RETRY_S, LAST_RETRY_S = 10.0, 600.0
FIRST_DRAIN_S, LAST_DRAIN_S = 60.0, 3600.0  # of a change whose attempts interrupt the service


@dataclass(frozen=True)
class FailedChange:
    """A change that has failed: the name is answered by what answered it before.

    Attributes:
        wanted: What the name means.
        error: Why it does not answer.
        attempts: How often that was tried.
        retry_at: When it is tried again, in Unix seconds.
    """

    wanted: Resolved
    error: str
    attempts: int
    retry_at: float


class FailedChanges:
    """The changes that have failed, by name. Each is tried again after 10, 20, 40 ... seconds, at most ten
    minutes; one that had to unload what serves after 1, 2, 4 ... minutes, at most an hour. All are tried at
    once where the name comes to mean something else, or the same is deployed again.

    Args:
        clock: Unix seconds.

    >>> from mlx_distill.registry.resolve import ResolvedModel
    >>> now, wanted = [0.0], ResolvedModel("music", None, version=2, deployment=7)
    >>> failed = FailedChanges(lambda: now[0])
    >>> failed.add("music", wanted, "damaged").retry_at, failed.add("music", wanted, "damaged").retry_at
    (10.0, 20.0)
    >>> failed.is_due("music", wanted), failed.is_due("music", ResolvedModel("music", None, deployment=8))
    (False, True)
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._failed: dict[str, FailedChange] = {}

    def is_due(self, name: str, wanted: Resolved) -> bool:
        """Whether a change to ``wanted`` is to be tried now."""
        failed = self._failed.get(name)
        return failed is None or not _is_same(failed.wanted, wanted) or self._clock() >= failed.retry_at

    def add(self, name: str, wanted: Resolved, error: str, *, drained: bool = False) -> FailedChange:
        """Note that a change has failed.

        Args:
            name: What changes.
            wanted: To what.
            error: Why not.
            drained: Whether what serves was unloaded for it.
        """
        before = self._failed.get(name)
        attempts = before.attempts + 1 if before is not None and _is_same(before.wanted, wanted) else 1
        first, last = (FIRST_DRAIN_S, LAST_DRAIN_S) if drained else (FIRST_RETRY_S, LAST_RETRY_S)
        wait = min(last, first * 2.0 ** min(attempts - 1, 30))
        failed = FailedChange(wanted, error, attempts, self._clock() + wait)
        self._failed[name] = failed
        return failed

    def has(self, name: str) -> bool:
        """Whether a name is not answered by what it means."""
        return name in self._failed

    def forget(self, name: str) -> None:
        """The name is answered by what it means."""
        self._failed.pop(name, None)

    def to_json(self) -> list[dict[str, Any]]:
        """What ``/ready`` says."""
        return [
            {
                "name": name,
                "wanted": serves(one.wanted),
                "error": one.error,
                "attempts": one.attempts,
                "retry_at": one.retry_at,
            }
            for name, one in list(self._failed.items())
        ]


def _is_same(one: Resolved, other: Resolved) -> bool:
    return key_of(one) == key_of(other) and one.deployment == other.deployment


def serves(resolved: Resolved) -> str:
    """What people call what a name means: ``music:3``, a folder, or an analyzer's target."""
    if resolved.version is not None:
        return f"{resolved.model}:{resolved.version}"
    return str(resolved.target or resolved.path)


def reason_of(error: Exception) -> str:
    """Why a model could not be loaded."""
    if isinstance(error, ApiError):
        return error.message
    return str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"


def change_facts(event: str, name: str, old: Resolved, new: Resolved) -> dict[str, Any]:
    """A change as a line of the log."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "name": name,
        "from": serves(old),
        "to": serves(new),
        "deployment": new.deployment,
    }
