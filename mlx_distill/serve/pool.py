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
from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError, ModelError
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.loading import (
    LoadedModel,
    Loader,
    Resolved,
    ServedModel,
    key_of,
    load_model,
    model_facts,
    unload,
    weight_bytes,
)
from mlx_distill.serve.memory import memory_limit, needed
from mlx_distill.serve.residents import Residents, Source, free, size_of, too_large
from mlx_distill.serve.settings import ServerSettings
from mlx_distill.serve.swap import FailedChanges, change_facts, reason_of, serves
from mlx_distill.tasks.task import load_task

log = logging.getLogger("mlx_distill.serve")

_BUSY_WAIT = 150  # seconds until a client may ask again while another program has the accelerator
_PASSING = ("accelerator_busy", "stopping")  # codes that say nothing about a model


class Pool:
    """Models by name: loaded when they are first asked for, several where memory allows.

    Args:
        settings: Limits, and the model that is served where a request names none.
        resolve: What a name means now; raises ``ModelError`` where there is no such model.
        load: Loads a model and checks it; :func:`~mlx_distill.serve.loading.load_model` where None.
        may_load: Whether the accelerator is free for a model, or is held already.
        user: Who uses the accelerator where it is not, for people.
        may_resume: Whether no job has or wants the accelerator any more: asked when a request comes while
            the pool is paused, so that the first one behind the end of a job is answered.
        check_files: Raises ``ModelError`` where a model's files are damaged, without loading it.
        on_change: Is told of each change of what answers a name, and of each that failed.
        clock: Unix seconds, by which changes that failed are tried again.
    """

    def __init__(
        self,
        settings: ServerSettings,
        resolve: Callable[[str], Resolved],
        load: Loader | None = None,
        may_load: Callable[[], bool] = lambda: True,
        user: Callable[[], str] = lambda: "a job",
        may_resume: Callable[[], bool] = lambda: False,
        check_files: Callable[[Resolved], None] = lambda resolved: None,
        on_change: Callable[[dict[str, Any]], None] = lambda facts: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self._resolve = settings, resolve
        self._may_load, self._may_resume, self._user = may_load, may_resume, user
        self._check_files, self._on_change = check_files, on_change
        self._load = load or partial(load_model, batch_size=settings.batch_size)
        self._task = load_task(settings.task) if settings.task else None
        self._changed = threading.Condition()
        self._residents = Residents()
        self._names: dict[str, Resolved] = {}
        self._waiting: set[str] = set()  # names whose model is being loaded
        self._loading = threading.Lock()  # one at a time
        self._requests = 0
        self._closed = False
        self._paused = False  # for a job
        self._failed = FailedChanges(clock)
        self._change: dict[str, Any] | None = None  # that is under way
        self._drained: str | None = None  # the key of a model that makes room for its successor
        self._problems: dict[str, str] = {}  # by name

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
                if isinstance(served.source, LoadedModel):
                    served.source.users -= 1
                    served.source.used = time.monotonic()
                self._requests -= 1
                self._changed.notify_all()

    def _busy(self) -> ApiError:
        return ApiError(
            503,
            f"{self._user()} uses the accelerator: models answer again when that has ended",
            code="accelerator_busy",
            retry_after=_BUSY_WAIT,
        )

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
            known = self._names.get(name)
            if self._paused and (known is None or known.target is None):
                raise self._busy()
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
        if resolved is None:
            return None
        if key_of(resolved) == self._drained:
            raise ApiError(
                503,
                f"{name} makes room for another model, and memory has none for both",
                code="model_changing",
                retry_after=5,
            )
        source = self._residents.source(resolved)
        if source is None or name in self._waiting:
            return None
        if isinstance(source, LoadedModel):
            source.users += 1
        task = self._task if self._task is not None and name == self.settings.model else source.task
        return ServedModel(resolved, source, task)

    def _bring(self, name: str) -> None:
        """Load what a name means now; what answered it before where that cannot be had."""
        try:
            wanted = self._resolve(name)
        except ModelError as error:
            raise ApiError(404, str(error), code="model_not_found", param="model") from error
        with self._loading:
            known = self._names.get(name)
            if known is None or key_of(known) == key_of(wanted):
                self._load_for(name, wanted)
                return
            if self._failed.is_due(name, wanted):
                try:
                    self._load_for(name, wanted)
                    return
                except ApiError as error:
                    if error.code in _PASSING:
                        raise
                    self._note_failure(name, known, wanted, error)
            self._load_for(name, known)

    def _load_for(self, name: str, resolved: Resolved, keep: str | None = None) -> None:
        """Let a name be answered by a model, which is loaded if it is not in memory.

        Args:
            name: The name.
            resolved: The model.
            keep: The key of a model that must not be unloaded for it.
        """
        with self._changed:
            source = self._residents.source(resolved)
        if source is None:
            if resolved.target is None:
                if not self._may_load():
                    raise self._busy()
                self._make_room(resolved, keep)
            try:
                source = self._load(resolved)
            except DistillError as error:
                raise ApiError(503, str(error), code="model_not_loaded", retry=False) from error
        with self._changed:
            if self._closed:
                free(source)
                raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
            self._residents.add(source)
            self._names[name] = resolved

    def _limit(self, *joining: Resolved) -> int:
        """Bytes that all models may take: the server's limit, and those of deployments; also of models that
        are about to be loaded.
        """
        named = [one for one in self._names.values() if key_of(one) in self._residents.models]
        limits = [
            int(one.settings["memory_limit_gb"] * 1e9)
            for one in (*joining, *named)
            if "memory_limit_gb" in one.settings
        ]
        return min([memory_limit(self.settings.memory_limit), *limits])

    def _make_room(self, resolved: Resolved, keep: str | None = None) -> None:
        """Unload models without users, the longest unused first, until another one fits."""
        while True:
            with self._changed:
                if self._fits(resolved):
                    return
                oldest = self._residents.take_idle(keep)
            if oldest is None:
                break
            unload(oldest)
        size, limit = size_of(resolved), self._limit(resolved)
        if size > limit:
            raise too_large(resolved.name, size, limit)
        raise ApiError(
            503, f"no room for {resolved.name} beside the models in use", code="no_memory", retry_after=10
        )

    def _fits(self, resolved: Resolved, without: str | None = None) -> bool:
        return self._residents.fits(resolved, self._limit(resolved), self.settings.max_models, without)

    @contextmanager
    def room_for(self, path: Path) -> Iterator[None]:
        """Keep room for a model that is loaded outside of the pool while the block runs. Models without users
        are unloaded for it, the longest unused first, then others when their requests have ended; what
        is asked for meanwhile waits, unless its model is in memory.

        Args:
            path: Its folder.

        Raises:
            ApiError: 503, it needs more than all models may take, or requests under way did not end.
        """
        size, limit = needed(weight_bytes(path)), memory_limit(self.settings.memory_limit)
        if size > limit:
            raise too_large(path.name, size, limit)
        with self._loading:
            while True:
                with self._changed:
                    loaded = list(self._residents.models.values())
                    if not loaded or sum(needed(one.bytes) for one in loaded) + size <= self._limit():
                        break
                    first = min(loaded, key=lambda one: (one.users > 0, one.used))
                try:
                    self._drain(first.resolved)
                finally:
                    with self._changed:
                        self._drained = None
                        self._changed.notify_all()
            yield

    def tick(self) -> None:
        """What is done every second: names follow their aliases, and the served model is loaded before it is
        asked for.
        """
        if self._paused:
            return
        for name in list(self._names):
            self._follow(name)
        served = self.settings.model
        with self._changed:
            known = None if served is None else self._names.get(served)
            is_there = known is not None and self._residents.source(known) is not None
        if self._closed or served is None or is_there:
            return
        try:
            with self.get(served):
                if not self._failed.has(served):
                    self._problems.pop(served, None)
        except ApiError as error:
            self._note_problem(served, f"{served}: {error.message}")

    def pause(self) -> bool:
        """Take no requests until :meth:`resume`. Those under way are finished; models without any are
        unloaded.

        Returns:
            Whether no model is in memory any more, or comes into it.
        """
        with self._changed:
            self._paused = True
        while True:
            with self._changed:
                idle = self._residents.take_idle()
            if idle is None:
                break
            unload(idle)
        if not self._loading.acquire(blocking=False):  # a model is being loaded
            return False
        try:
            with self._changed:
                return not self._residents.models
        finally:
            self._loading.release()

    def resume(self) -> None:
        """Take requests again; models are loaded when they are asked for."""
        with self._changed:
            self._paused = False

    def _follow(self, name: str) -> None:
        """Let a name be answered by another model where it means another one now. The new one is loaded
        beside the old one, which finishes its requests; where memory has no room for both, the old one is
        unloaded first. It serves after it was checked; else the old one goes on.
        """
        with self._changed:
            old = self._names.get(name)
            is_there = old is not None and self._residents.source(old) is not None
        try:
            new = self._resolve(name)
        except DistillError as error:
            self._note_problem(name, f"{name}: {error}")
            return
        if old is None or not is_there:  # the next request brings it
            return
        if key_of(new) == key_of(old):
            with self._changed:
                self._names[name] = new  # with the settings of now
            self._failed.forget(name)
            self._problems.pop(name, None)
        elif self._failed.is_due(name, new):
            with self._loading:
                self._swap(name, old, new)

    def _swap(self, name: str, old: Resolved, new: Resolved) -> None:
        began = time.monotonic()
        self._change = {"name": name, "from": serves(old), "to": serves(new), "since": time.time()}
        try:
            self._replace(name, old, new)
        except Exception as error:
            if isinstance(error, ApiError) and error.code in _PASSING:
                return
            drained = self._drained is not None
            self._note_failure(name, old, new, error, drained=drained)
            if drained:
                self._return_to(name, old)
        else:
            self._failed.forget(name)
            self._problems.pop(name, None)
            log.warning("%s: now %s", name, serves(new))
            seconds = round(time.monotonic() - began, 3)
            self._on_change(change_facts("model_changed", name, old, new) | {"seconds": seconds})
        finally:
            with self._changed:
                self._change = self._drained = None
                self._changed.notify_all()
        self._unload_unused(key_of(old))

    def _replace(self, name: str, old: Resolved, new: Resolved) -> None:
        try:
            self._load_for(name, new, keep=key_of(old))
        except ApiError as error:
            with self._changed:
                if error.code != "no_memory" or not self._fits(new, without=key_of(old)):
                    raise
            self._check_files(new)  # what is damaged is no reason to interrupt the service
            self._drain(old)
            self._load_for(name, new)

    def _drain(self, old: Resolved) -> None:
        """Take no requests for a model, wait for those under way, and unload it."""
        key, deadline = key_of(old), time.monotonic() + self.settings.load_seconds
        with self._changed:
            self._drained = key
            while (loaded := self._residents.models.get(key)) is not None and loaded.users:
                if self._closed or not self._changed.wait(deadline - time.monotonic()):
                    most = f"{self.settings.load_seconds:g} seconds"
                    raise ApiError(
                        503, f"requests to {serves(old)} did not end within {most}", code="not_drained"
                    )
            self._residents.models.pop(key, None)
        if loaded is not None:
            unload(loaded)

    def _return_to(self, name: str, old: Resolved) -> None:
        """Load the old model again, if it was unloaded."""
        try:
            self._load_for(name, old)
        except Exception as error:
            why = f"{serves(old)} could not be loaded again: {reason_of(error)}"
            self._note_problem(name, f"{self._problems.get(name, name)}; {why}")

    def _note_failure(
        self, name: str, old: Resolved, new: Resolved, error: Exception, *, drained: bool = False
    ) -> None:
        failed = self._failed.add(name, new, reason_of(error), drained=drained)
        facts = {"attempts": failed.attempts, "error": failed.error}
        self._on_change(change_facts("model_change_failed", name, old, new) | facts)
        self._note_problem(name, f"{name} stays with {serves(old)}, not {serves(new)}: {failed.error}")

    def _note_problem(self, name: str, problem: str) -> None:
        if problem != self._problems.get(name):
            log.error(problem)
        self._problems[name] = problem

    def _unload_unused(self, key: str) -> None:
        """Free a model that no name means any more, if it has no users; else it goes when room is needed."""
        with self._changed:
            meant = any(key_of(one) == key for one in self._names.values())
            unused = None if meant else self._residents.take(key)
        if unused is not None:
            free(unused)

    def state(self) -> dict[str, Any]:
        """What ``/ready`` says."""
        with self._changed:
            models = [
                {"name": name, **model_facts(resolved), "since": source.since}
                for name, resolved in self._names.items()
                if (source := self._residents.source(resolved)) is not None
            ]
            served = self.settings.model
            ready = served is None or any(model["name"] == served for model in models)
            status = "ready" if ready else "loading"
            if self._change is not None and self._drained is not None and self._change["name"] == served:
                status = "changing"
            if self._closed or self._paused:
                status = "stopping" if self._closed else "paused for a job"
            return {
                "status": status,
                "served": served,
                "models": models,
                "requests": self._requests,
                "problem": next(iter(self._problems.values()), None),
                "change": self._change,
                "failed_changes": self._failed.to_json(),
            }

    def contents(self) -> tuple[int, list[LoadedModel]]:
        """How many requests are at work or wait, and the models in memory."""
        with self._changed:
            return self._requests, list(self._residents.models.values())

    def close(self) -> None:
        """Free the models; requests under way get an error."""
        with self._changed:
            self._closed = True
            sources: list[Source] = [*self._residents.models.values(), *self._residents.external.values()]
            self._residents = Residents()
            self._changed.notify_all()
        for source in sources:
            free(source)
