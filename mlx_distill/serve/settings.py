"""What a server is told: where it listens, what it serves, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_distill.ledger.root import Root

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class ServerSettings:
    """Settings of ``mlx-distill serve``.

    Attributes:
        root: The folder whose models, runs and jobs it knows.
        host: The address that it listens on.
        port: Its port; 0 takes a free one.
        token: The token of its clients; None reads ``MLX_DISTILL_TOKEN``, else the root's token file.
        model: The model that is served where a request names none, such as ``music@production``.
        task: The task of that model where it does not say itself: a packaged one, or a YAML file.
        allowed_hosts: Further values of the ``Host`` header, without port.
        share_accelerator: Keep answering while jobs run.
        start_jobs: Look every second whether a job of the queue can start.
        batch_size: Requests that a model decodes together.
        max_queue: Requests for models that are at work or wait; a further one is answered with 503.
        max_batch: Rows of one request to ``/v1/analyze/batch``.
        max_models: Models in memory at once.
        memory_limit: Bytes that models may take; a part of the machine's memory where None.
        max_body: Bytes of a request's body.
        max_upload: Bytes of an uploaded file's request.
        load_seconds: The longest wait for a model that is being loaded or swapped.
        external_seconds: The longest wait for an analyzer outside of the registry, for sixteen rows.
        stop_seconds: The longest wait for requests under way after SIGTERM.
    """

    root: Root
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    model: str | None = None
    task: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    share_accelerator: bool = False
    start_jobs: bool = True
    batch_size: int = 16
    max_queue: int = 128
    max_batch: int = 1000
    max_models: int = 4
    memory_limit: int | None = None
    max_body: int = 8 * MIB
    max_upload: int = 512 * MIB
    load_seconds: float = 120.0
    external_seconds: float = 30.0
    stop_seconds: float = 30.0
