"""One model in memory: loaded in the thread of its engine, with what requests need of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_distill.infer.engine import Engine
from mlx_distill.infer.worker import EngineWorker, Watcher
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.serve.errors import ApiError
from mlx_distill.tasks.task import Task

if TYPE_CHECKING:
    from mlx_distill.serve.external import ExternalAnalyzer


class Resolved(Protocol):
    """What a name means now (:func:`mlx_distill.registry.resolve.resolve_model`)."""

    @property
    def name(self) -> str:
        """The name that was asked for."""

    @property
    def path(self) -> Path | None:
        """The model's folder, or None."""

    @property
    def target(self) -> str | None:
        """An external analyzer instead."""

    @property
    def model(self) -> str | None:
        """The registry's model, or None."""

    @property
    def version(self) -> int | None:
        """Its version."""

    @property
    def alias(self) -> str | None:
        """The alias that was followed."""

    @property
    def sha(self) -> str | None:
        """The hash of the version's manifest."""

    @property
    def deployment(self) -> int | None:
        """The deployment that the alias is at."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of that deployment: ``context_length`` (tokens), ``memory_limit_gb``."""


def key_of(resolved: Resolved) -> str:
    """What tells one model from another: folder and hash."""
    return f"{resolved.path or resolved.target} {resolved.sha or ''}"


def model_facts(resolved: Resolved) -> dict[str, Any]:
    """What ``/ready`` says of what a name means."""
    return {
        "model": resolved.model,
        "version": resolved.version,
        "alias": resolved.alias,
        "sha": resolved.sha,
        "external": resolved.target,
        "settings": dict(resolved.settings),
    }


@dataclass(eq=False)
class LoadedModel:
    """A model in memory.

    Attributes:
        key: Of :func:`key_of`.
        path: Its folder.
        worker: Its engine's thread; model and tokenizer are used there alone, but for tokenizing.
        model: mlx-lm's model.
        tokenizer: mlx-lm's wrapper.
        task: What it was trained on, or None.
        bytes: That it takes in memory.
        resolved: What it was loaded as.
        users: Requests that are at work with it.
        used: When the last one ended, in monotonic seconds.
        since: When it was loaded, in Unix seconds.
        shared: What requests made once for all, by name, under ``lock``.
    """

    key: str
    path: Path
    worker: EngineWorker
    model: Any
    tokenizer: Any
    task: Task | None
    bytes: int
    resolved: Resolved
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.time)
    shared: dict[Any, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class ServedModel:
    """A model as one request uses it: what its name meant, and what answers.

    Attributes:
        resolved: Name, version, alias, hash, and the settings of its deployment.
        source: The model in memory, or an analyzer outside of the registry.
        task: What it answers, or None.
    """

    resolved: Resolved
    source: LoadedModel | ExternalAnalyzer
    task: Task | None

    @property
    def loaded(self) -> LoadedModel:
        """The model in memory.

        Raises:
            ApiError: 400, an analyzer outside of the registry answers.
        """
        if isinstance(self.source, LoadedModel):
            return self.source
        raise ApiError(
            400,
            f"{self.name}: an analyzer outside of the registry, which answers rows alone "
            "(POST /v1/analyze, /v1/analyze/batch or /v1/classify)",
            code="external_analyzer",
            param="model",
        )

    @property
    def external(self) -> ExternalAnalyzer | None:
        """The analyzer outside of the registry, or None."""
        return None if isinstance(self.source, LoadedModel) else self.source

    @property
    def context(self) -> int | None:
        """The tokens of prompt and answer that the deployment allows; None for the model's own."""
        length: int | None = self.resolved.settings.get("context_length")
        return length

    @property
    def worker(self) -> EngineWorker:
        """Takes requests from any thread."""
        return self.loaded.worker

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's wrapper, with the chat template."""
        return self.loaded.tokenizer

    @property
    def model(self) -> Any:
        """mlx-lm's model: computed with by ``worker.call`` alone."""
        return self.loaded.model

    @property
    def name(self) -> str:
        """What messages call it: the registry's or the folder's name, not what a client wrote."""
        return self.resolved.model or (self.resolved.path.name if self.resolved.path else "external")


def load_model(resolved: Resolved, *, batch_size: int, watcher: Watcher | None = None) -> LoadedModel:
    """Load a model in the thread of its own engine.

    Args:
        resolved: Where it lies.
        batch_size: Requests that are decoded together.
        watcher: Is told what the engine does.

    Raises:
        ModelError: it cannot be loaded.
    """
    path = resolved.path
    assert path is not None

    def make() -> Engine:
        from mlx_distill.models.load import load

        return Engine(*load(path), batch_size=batch_size)

    worker = EngineWorker(make, watcher)
    trained_on = read_trained_on(path)
    return LoadedModel(
        key_of(resolved),
        path,
        worker,
        worker.engine.model,
        worker.engine.tokenizer,
        trained_on.task if trained_on is not None else None,
        weight_bytes(path),
        resolved,
    )


def weight_bytes(path: Path) -> int:
    """The bytes of a model's weights on disk, which are those that it takes in memory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def unload(loaded: LoadedModel) -> None:
    """Free a model; requests under way are cancelled."""
    import mlx.core as mx

    loaded.worker.close()
    loaded.shared.clear()
    mx.clear_cache()


Loader = Callable[[Resolved], "LoadedModel | ExternalAnalyzer"]
