"""One thread that owns an engine, for requests from any thread.

MLX's streams belong to threads, so a model is used by one. Requests of all threads are decoded together.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Protocol, TypeVar

from mlx_distill.errors import DistillError
from mlx_distill.infer.engine import Engine
from mlx_distill.infer.requests import Event, Failed, Finished, Generation, Request, TokenEvent

Listener = Callable[[TokenEvent | None], None]
T = TypeVar("T")


class Watcher(Protocol):
    """Is told by an engine's thread what it does. It must be quick and raise nothing."""

    def worked(self, seconds: float) -> None:
        """The thread computed for so long."""

    def answered(self, generation: Generation, first_token_seconds: float, seconds: float) -> None:
        """A request has its answer: ``seconds`` after it was submitted, its first token as long after that as
        ``first_token_seconds`` says.
        """


class Cancelled(DistillError):  # noqa: N818 - asked for, not an error
    """A request was cancelled, or its worker closed, before it had its answer."""


class Handle:
    """A request that was submitted to a worker.

    Iterating over it, where it has no listener, gives its :class:`~mlx_distill.infer.requests.TokenEvent` (of
    a request that streams) and ends with its answer.
    """

    def __init__(self, worker: EngineWorker, request: Request, listener: Listener | None = None) -> None:
        self.request = request
        self._worker = worker
        self._listener = listener
        self._events: queue.SimpleQueue[TokenEvent | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._outcome: Generation | BaseException | None = None
        self._submitted = time.perf_counter()
        self._waited = 0.0  # until the engine took it

    @property
    def done(self) -> bool:
        """Whether it has its answer, or will not get one."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the answer.

        Args:
            timeout: Seconds, after which ``TimeoutError`` is raised; None waits.

        Raises:
            Cancelled: it was cancelled, or the worker closed.
            Exception: what the request's constraint, its hook or the model raised.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        if isinstance(self._outcome, Generation):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def __iter__(self) -> Iterator[TokenEvent]:
        while (event := self._events.get()) is not None:
            yield event
        if isinstance(self._outcome, BaseException):
            raise self._outcome

    def cancel(self) -> None:
        """Give the request up; nothing happens if it has its answer."""
        self._worker._send(self._worker._cancel, self)

    def _end(self, outcome: Generation | BaseException) -> None:
        if not self._done.is_set():
            self._outcome = outcome
            self._done.set()
            self._put(None)

    def _put(self, event: TokenEvent | None) -> None:
        if self._listener is None:
            self._events.put(event)
        else:
            self._listener(event)


class EngineWorker:
    """Serves requests from any thread with one engine, in a thread of its own.

    Args:
        make_engine: Is called in that thread, so that it may load the model there.
        watcher: Is told what the thread does.

    Raises:
        Exception: what ``make_engine`` raised.

    >>> with EngineWorker(lambda: Engine(*load(folder))) as worker:                      # doctest: +SKIP
    ...     worker.submit(Request([1, 2, 3], max_tokens=9)).result().text
    """

    def __init__(self, make_engine: Callable[[], Engine], watcher: Watcher | None = None) -> None:
        self._watcher = watcher
        self._commands: queue.SimpleQueue[tuple[Callable[[Any], None], Any] | None] = queue.SimpleQueue()
        self._handles: dict[int, Handle] = {}
        self._lock = threading.Lock()  # nothing is sent behind the command that closes
        self._closed = False
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self.engine: Engine
        self._thread = threading.Thread(target=self._run, args=(make_engine,), name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or its model failed."""
        return self._closed

    @property
    def requests(self) -> int:
        """How many requests the engine decodes or keeps waiting."""
        return len(self._handles)

    def submit(self, request: Request, listener: Listener | None = None) -> Handle:
        """Queue a request.

        Args:
            request: What is to be generated.
            listener: Is called in the engine's thread with each token of a request that streams, and with
                None at the end, when :meth:`Handle.result` returns at once. It must be quick and raise
                nothing, for the engine waits for it.

        Raises:
            Cancelled: the worker is closed.
        """
        handle = Handle(self, request, listener)
        if not self._send(self._submit, handle):
            raise _closed()
        return handle

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the thread, between two steps of decoding: what reads with the model besides.

        Raises:
            Cancelled: the worker is closed.
        """
        call: Future[T] = Future()
        if not self._send(self._call, (function, call)):
            raise _closed()
        return call

    def close(self) -> None:
        """End the thread; requests without an answer are cancelled."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, command: Callable[[Any], None], argument: Any) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._commands.put((command, argument))
            return True

    # What follows runs in the worker's thread.

    def _run(self, make_engine: Callable[[], Engine]) -> None:
        try:
            self.engine = make_engine()
        except BaseException as error:
            self._failure, self._closed = error, True
            self._ready.set()
            return
        self._ready.set()
        try:
            while self._take_commands():
                began = time.perf_counter()
                for event in self.engine.step():
                    self._handle(event)
                self._worked_since(began)
        except BaseException as error:  # the model's: no request can go on
            with self._lock:
                self._closed = True
            self._end_all(error)
        else:
            self._end_all(_closed())

    def _take_commands(self) -> bool:
        """Do what was asked for; wait for it where there is nothing else to do. False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command[0](command[1])

    def _worked_since(self, began: float) -> None:
        if self._watcher is not None:
            self._watcher.worked(time.perf_counter() - began)

    def _submit(self, handle: Handle) -> None:
        handle._waited = time.perf_counter() - handle._submitted
        try:
            self._handles[self.engine.submit(handle.request)] = handle
        except Exception as error:
            handle._end(error)

    def _call(self, call: tuple[Callable[[], Any], Future[Any]]) -> None:
        function, future = call
        if not future.set_running_or_notify_cancel():
            return
        began = time.perf_counter()
        try:
            result = function()
        except Exception as error:
            self._worked_since(began)
            future.set_exception(error)
        else:
            self._worked_since(began)
            future.set_result(result)

    def _cancel(self, handle: Handle) -> None:
        for number, other in list(self._handles.items()):
            if other is handle:
                self.engine.cancel(number)
                del self._handles[number]
                handle._end(Cancelled("the request was cancelled", fix="submit it again"))

    def _handle(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self._handles[event.request_id]._put(event)
        elif isinstance(event, Finished):
            handle = self._handles.pop(event.request_id)
            if self._watcher is not None:
                first = handle._waited + event.generation.first_token_seconds
                self._watcher.answered(event.generation, first, time.perf_counter() - handle._submitted)
            handle._end(event.generation)
        elif isinstance(event, Failed):
            self._handles.pop(event.request_id)._end(event.error)

    def _end_all(self, error: BaseException) -> None:
        for handle in self._handles.values():
            handle._end(error)
        self._handles.clear()
        while not self._commands.empty():  # submitted while the thread ended
            command = self._commands.get()
            if command is None:
                continue
            if isinstance(command[1], Handle):
                command[1]._end(error)
            elif command[1][1].set_running_or_notify_cancel():
                command[1][1].set_exception(error)


def _closed() -> Cancelled:
    return Cancelled("the engine is closed", fix="make another one")
