"""The models in memory, and which of them answers a name.

A name stays with its model until the swap (:mod:`mlx_distill.serve.swap`) has another one that is loaded and
checked, so a request is finished by the model that it began with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_distill.errors import DistillError, ModelError
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.loading import (
    LoadedModel,
    Loader,
    Resolved,
    ServedModel,
    key_of,
    load_model,
    weight_bytes,
)
from mlx_distill.serve.memory import memory_limit, needed
from mlx_distill.serve.settings import ServerSettings
from mlx_distill.tasks.task import load_task

log = logging.getLogger("mlx_distill.serve")

_JOB_WAIT = 150  # seconds until a client may ask again while a job trains


class Pool:
    """Models by name: loaded when they are first asked for, several where memory allows.

    Args:
        settings: Limits, and the model that is served where a request names none.
        resolve: What a name means now; raises ``ModelError`` where there is no such model.
        load: Loads a model; :func:`~mlx_distill.serve.loading.load_model` where None.
        may_load: Whether the accelerator is free for a model, or is held already.
        may_resume: Whether no job has or wants the accelerator any more: asked when a request comes while
            the pool is paused, so that the first one behind the end of a job is answered.
    """

    def __init__(
        self,
        settings: ServerSettings,
        resolve: Callable[[str], Resolved],
        load: Loader | None = None,
        may_load: Callable[[], bool] = lambda: True,
        may_resume: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self._resolve = settings, resolve
        self._may_load, self._may_resume = may_load, may_resume
        self._load = load or partial(load_model, batch_size=settings.batch_size)
        self._task = load_task(settings.task) if settings.task else None
        self._changed = threading.Condition()
        self._models: dict[str, LoadedModel] = {}
        self._names: dict[str, Resolved] = {}
        self._waiting: set[str] = set()  # names whose model is being loaded
        self._loading = threading.Lock()  # one at a time
        self._requests = 0
        self._closed = False
        self._paused = False  # for a job
        self._failed: dict[str, str] = {}  # of a name, the model that it could not be changed to
        self._problem: str | None = None  # why the served model is not in memory

    @contextmanager
    def get(self, name: str | None = None) -> Iterator[ServedModel]:
        """The model that answers a name, kept in memory until the block ends.

        Args:
            name: As of ``resolve_model``; the served one where None.

        Raises:
            ApiError: 404, no such model; 503, the queue is full, or the model cannot be loaded now.
        """
        served = self._take(self._asked(name))
        try:
            yield served
        finally:
            with self._changed:
                served.loaded.users -= 1
                served.loaded.used = time.monotonic()
                self._requests -= 1
                self._changed.notify_all()

    def _asked(self, name: str | None) -> str:
        asked = name or self.settings.model
        if asked is None:
            raise ApiError(
                400,
                "no model is named (give model, or start the server with --model MODEL)",
                code="model_missing",
                param="model",
            )
        return asked

    def _take(self, name: str) -> ServedModel:
        if self._paused and self._may_resume():
            self.resume()
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
            if self._paused:
                raise _busy()
            if self._requests >= self.settings.max_queue:
                raise ApiError(503, "the queue is full", code="queue_full", retry_after=1)
            self._requests += 1
        try:
            return self._find(name)
        except BaseException:
            with self._changed:
                self._requests -= 1
            raise

    def _find(self, name: str) -> ServedModel:
        deadline = time.monotonic() + self.settings.load_seconds
        while True:
            with self._changed:
                served = self._in_memory(name)
                if served is not None:
                    return served
                if name in self._waiting:
                    if self._closed or not self._changed.wait(deadline - time.monotonic()):
                        raise ApiError(503, f"{name} is being loaded", code="model_loading", retry_after=5)
                    continue
                self._waiting.add(name)
            try:
                self._bring(name)
            finally:
                with self._changed:
                    self._waiting.discard(name)
                    self._changed.notify_all()

    def _in_memory(self, name: str) -> ServedModel | None:
        """The model of a name, with one more user; None where it is not in memory."""
        resolved = self._names.get(name)
        loaded = self._models.get(key_of(resolved)) if resolved is not None else None
        if resolved is None or loaded is None or name in self._waiting:
            return None
        if loaded.worker.closed:  # its model failed
            del self._models[loaded.key]
            return None
        loaded.users += 1
        task = self._task if self._task is not None and name == self.settings.model else loaded.task
        return ServedModel(resolved, loaded, task)

    def _bring(self, name: str) -> None:
        """Load the model of a name."""
        try:
            resolved = self._resolve(name)
        except ModelError as error:
            raise ApiError(404, str(error), code="model_not_found", param="model") from error
        with self._loading:
            with self._changed:
                loaded = self._models.get(key_of(resolved))
            if loaded is None or loaded.worker.closed:
                if not self._may_load():
                    raise _busy()
                self._make_room(resolved)
                try:
                    loaded = self._load(resolved)
                except DistillError as error:
                    raise ApiError(503, str(error), code="model_not_loaded", retry=False) from error
            with self._changed:
                self._models[loaded.key], self._names[name] = loaded, resolved

    def _make_room(self, resolved: Resolved) -> None:
        """Unload models without users, the longest unused first, until another one fits."""
        size = needed(weight_bytes(resolved.path)) if resolved.path else 0
        limit = memory_limit(self.settings.memory_limit)
        while True:
            with self._changed:
                taken = sum(needed(loaded.bytes) for loaded in self._models.values())
                if taken + size <= limit and len(self._models) < self.settings.max_models:
                    return
                idle = [loaded for loaded in self._models.values() if not loaded.users]
                if not idle:
                    break
                oldest = min(idle, key=lambda loaded: loaded.used)
                del self._models[oldest.key]
            _unload(oldest)
        if self._models:
            raise ApiError(
                503,
                f"no room for {resolved.name} beside the models in use",
                code="no_memory",
                retry_after=10,
            )
        raise ApiError(
            503,
            f"{resolved.name} needs {size:,} bytes, and models may take {limit:,} (--memory-limit)",
            code="no_memory",
            retry=False,
        )

    def tick(self) -> None:
        """What is done every second: names follow their aliases, and the served model is loaded before it is
        asked for.
        """
        if self._paused:
            return
        for name in list(self._names):
            self._swap(name)
        served = self.settings.model
        with self._changed:
            if self._closed or served is None or served in self._names:
                return
        try:
            with self.get(served):
                self._problem = None
        except ApiError as error:
            if self._problem != error.message:
                log.error("%s: %s", served, error.message)
            self._problem = error.message

    def pause(self) -> bool:
        """Take no requests until :meth:`resume`. Those under way are finished; models without any are
        unloaded.

        Returns:
            Whether no model is in memory any more.
        """
        with self._changed:
            self._paused = True
            idle = [loaded for loaded in self._models.values() if not loaded.users]
            for loaded in idle:
                del self._models[loaded.key]
        for loaded in idle:
            _unload(loaded)
        with self._loading, self._changed:
            return not self._models

    def resume(self) -> None:
        """Take requests again; models are loaded when they are asked for."""
        with self._changed:
            self._paused = False

    def _swap(self, name: str) -> None:
        """Let a name be answered by another model where it means another one now: the new one is loaded
        beside the old one, which finishes its requests. Where it cannot be loaded the old one goes on.
        """
        with self._changed:
            old = self._names.get(name)
        try:
            new = self._resolve(name)
        except DistillError as error:
            self._note_problem(f"{name}: {error}")
            return
        if old is None or key_of(new) == key_of(old) or self._failed.get(name) == key_of(new):
            return
        try:
            self._bring(name)
        except ApiError as error:
            self._failed[name] = key_of(new)
            self._note_problem(f"{name} stays with {old.version or old.path}: {error.message}")
            return
        self._failed.pop(name, None)
        self._problem = None
        log.warning("%s: now version %s", name, new.version or new.path)
        self._unload_unused(key_of(old))

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            log.error(problem)
        self._problem = problem

    def _unload_unused(self, key: str) -> None:
        """Free a model that no name means any more, if it has no users; else it goes when room is needed."""
        with self._changed:
            loaded = self._models.get(key)
            if loaded is None or loaded.users or any(key_of(one) == key for one in self._names.values()):
                return
            del self._models[key]
        _unload(loaded)

    def state(self) -> dict[str, Any]:
        """What ``/ready`` says."""
        with self._changed:
            models = [
                {
                    "name": name,
                    "model": resolved.model,
                    "version": resolved.version,
                    "alias": resolved.alias,
                    "sha": resolved.sha,
                    "since": self._models[key_of(resolved)].since,
                }
                for name, resolved in self._names.items()
                if key_of(resolved) in self._models
            ]
            served = self.settings.model
            ready = served is None or any(model["name"] == served for model in models)
            status = "ready" if ready else "loading"
            if self._closed or self._paused:
                status = "stopping" if self._closed else "paused for a job"
            return {
                "status": status,
                "served": served,
                "models": models,
                "requests": self._requests,
                "problem": self._problem,
            }

    def contents(self) -> tuple[int, list[LoadedModel]]:
        """How many requests are at work or wait, and the models in memory."""
        with self._changed:
            return self._requests, list(self._models.values())

    def close(self) -> None:
        """Free the models; requests under way get an error."""
        with self._changed:
            self._closed = True
            models = list(self._models.values())
            self._models.clear()
            self._changed.notify_all()
        for loaded in models:
            _unload(loaded)


def _busy() -> ApiError:
    return ApiError(
        503,
        "a job uses the accelerator: models answer again when it has ended",
        code="accelerator_busy",
        retry_after=_JOB_WAIT,
    )


def _unload(loaded: LoadedModel) -> None:
    loaded.worker.close()
    loaded.shared.clear()
    mx.clear_cache()
