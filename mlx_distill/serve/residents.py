"""What is in memory: models, and the analyzers outside of the registry that were checked."""

from __future__ import annotations

from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.external import ExternalAnalyzer
from mlx_distill.serve.loading import LoadedModel, Resolved, key_of, unload, weight_bytes
from mlx_distill.serve.memory import needed

Source = LoadedModel | ExternalAnalyzer


class Residents:
    """Models and analyzers by :func:`~mlx_distill.serve.loading.key_of`. It has no lock: the pool holds its
    own around each call.
    """

    def __init__(self) -> None:
        self.models: dict[str, LoadedModel] = {}
        self.external: dict[str, ExternalAnalyzer] = {}

    def source(self, resolved: Resolved) -> Source | None:
        """What answers for a model, where that is in memory."""
        key = key_of(resolved)
        if resolved.target is not None:
            return self.external.get(key)
        loaded = self.models.get(key)
        if loaded is not None and loaded.worker.closed:  # its model failed
            del self.models[key]
            return None
        return loaded

    def add(self, source: Source) -> None:
        """Keep what was loaded."""
        if isinstance(source, LoadedModel):
            self.models[source.key] = source
        else:
            self.external[source.key] = source

    def fits(self, resolved: Resolved, limit: int, most: int, without: str | None = None) -> bool:
        """Whether a model fits beside those in memory.

        Args:
            resolved: The model.
            limit: Bytes that all may take.
            most: Models that there may be.
            without: A key: beside those in use but this one.
        """
        others = [
            one for one in self.models.values() if without is None or (one.users and one.key != without)
        ]
        return sum(needed(one.bytes) for one in others) + size_of(resolved) <= limit and len(others) < most

    def take_idle(self, keep: str | None = None) -> LoadedModel | None:
        """Take out the model without users that was unused for longest, but the one with the key ``keep``."""
        idle = [one for one in self.models.values() if not one.users and one.key != keep]
        return self.models.pop(min(idle, key=lambda one: one.used).key) if idle else None

    def take(self, key: str) -> Source | None:
        """Take out what has a key; None where that is in use."""
        loaded = self.models.get(key)
        if loaded is None:
            return self.external.pop(key, None)
        return None if loaded.users else self.models.pop(key)


def size_of(resolved: Resolved) -> int:
    """Bytes that a model needs at work; an analyzer outside of the registry needs none of ours."""
    return needed(weight_bytes(resolved.path)) if resolved.path else 0


def free(source: Source) -> None:
    """Free a model or an analyzer."""
    if isinstance(source, LoadedModel):
        unload(source)
    else:
        source.close()


def too_large(name: str, size: int, limit: int) -> ApiError:
    """The error of a model that cannot be loaded however many others are unloaded."""
    return ApiError(
        503,
        f"{name} needs {size:,} bytes, and models may take {limit:,} (--memory-limit, or that of the "
        "deployment)",
        code="no_memory",
        retry=False,
    )
