"""Jobs and their events in the ledger."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_distill.errors import ConfigError
from mlx_distill.jobs.process import Process
from mlx_distill.ledger.database import Ledger, from_json, new_id, to_json
from mlx_distill.ledger.root import Root
from mlx_distill.storage import digest
from mlx_distill.text import known_names, words

KINDS = (
    "run",
    "prepare",
    "teach",
    "targets",
    "distill",
    "quantize",
    "evaluate",
    "validate",
    "compare",
    "convert",
    "export",
)
"""The commands that can be jobs."""
RECIPE = "recipe.yaml"
"""The file of a job's recipe in the job's folder."""
STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RELAXED = {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1"}
_MAX_ID = (1 << 63) - 1
_SILENT_S = 30.0


@dataclass(frozen=True)
class Job:
    """A command that runs in the background.

    Attributes:
        id: Its identifier, ``job-`` and 12 hexadecimal digits.
        kind: Its command, one of :data:`KINDS`.
        title: What it is, for people.
        arguments: The arguments of its command; paths are relative to the root, in which it runs.
        run_path: The folder that it writes, relative to the root.
        state: ``queued``, ``running``, ``paused``, ``succeeded``, ``failed`` or ``cancelled``.
        requested: What a running one was asked for: ``pause``, ``cancel`` or ``discard`` (cancel, and remove
            what is not finished).
        requested_at: When, in Unix seconds.
        position: Its place in the queue; the lowest is next.
        pid: Its process.
        pid_started: When that process started, see :class:`~mlx_distill.jobs.process.Process`.
        heartbeat: When it last wrote that it is alive, in Unix seconds. Information only.
        created_at: When it was submitted, in Unix seconds.
        started_at: When it was started last.
        finished_at: When it ended last.
        attempt: How often it was started.
        exit_code: That of its command.
        error: ``code``, ``message`` and ``fix`` of a failed one.
        request: What was asked for over HTTP; of a command with a recipe what it was started ``from``
            (``recipe:NAME``, ``file:PATH``, ``job:ID``), the keys that were ``set``, and the whole
            ``recipe``.
        request_hash: A hash of the request, or of kind and arguments.
        result: What a succeeded one has made: the model's ``version``, the ``comparison``.
        environment: Variables that its process gets besides those of the process that starts it.
        host: The machine or container of its process, for people.
        pid_space: Where the number of its process was given, see :class:`~mlx_distill.jobs.process.Process`.
        asked_from: The ``pid_space`` of who asked it to stop.
    """

    id: str
    kind: str
    title: str
    arguments: tuple[str, ...]
    run_path: str | None
    state: State
    requested: Literal["pause", "cancel", "discard"] | None
    requested_at: float | None
    position: int | None
    pid: int | None
    pid_started: float | None
    heartbeat: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    exit_code: int | None
    error: Mapping[str, Any] | None
    request: Any
    request_hash: str | None
    result: Mapping[str, Any] | None
    environment: Mapping[str, str]
    host: str | None = None
    pid_space: str | None = None
    asked_from: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it does not go on by itself and is not paused."""
        return self.state in ("succeeded", "failed", "cancelled")

    @property
    def process(self) -> Process | None:
        """The process that was started for it last."""
        if self.pid is None or self.pid_started is None:
            return None
        return Process(self.pid, self.pid_started, self.host, self.pid_space)

    @property
    def lives(self) -> bool:
        """Whether the process of a running one has not ended, as far as that is known from here."""
        process = self.process
        return process is not None and process.lives(self.heartbeat or self.started_at)

    @property
    def command(self) -> list[str]:
        """Its command and arguments."""
        return [self.kind, *self.arguments]

    def state_text(self, now: float | None = None) -> str:
        """The state for people; of a running job also what it was asked for, and whether it is silent."""
        if self.state == "cancelled" and self.requested:
            return "cancelled, what is not finished is being removed"
        if self.state != "running":
            code = (self.error or {}).get("code")
            return f"{self.state} ({words(code)})" if self.state == "failed" and code else self.state
        notes = []
        if self.requested:
            notes.append(
                {"pause": "asked to pause", "cancel": "being cancelled", "discard": "being cancelled"}[
                    self.requested
                ]
            )
        silent = (time.time() if now is None else now) - (self.heartbeat or self.started_at or 0)
        if silent > _SILENT_S:
            notes.append(f"no heartbeat for {silent:.0f} s")
        elif silent < -_SILENT_S:
            notes.append(f"its heartbeat lies {-silent:.0f} s in the future: check the clocks")
        if self.process is not None and not self.process.is_local:
            notes.append(str(self.process))
        return ", ".join([self.state, *notes])

    def folder(self, root: Root) -> Path:
        """The folder of its own files: its recipe, its log."""
        return root.jobs / self.id

    def recipe(self, root: Root) -> Path:
        """The file of its recipe, which a job that was asked for over HTTP has."""
        return self.folder(root) / RECIPE

    def log(self, root: Root) -> Path:
        """The file of what it prints."""
        return self.folder(root) / "log.txt"


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. ``id`` grows over all jobs.

    ``type`` is ``submitted``, ``started``, ``stage_started``, ``stage_made``, ``stage_current``,
    ``checkpoint``, ``note``, ``metrics``, ``comparison``, ``warning``, ``requested``, ``paused``,
    ``resumed``, ``succeeded``, ``failed``, ``cancelled`` or ``moved``.
    """

    id: int
    job_id: str
    created_at: float
    level: Literal["info", "warn", "error"]
    type: str
    message: str
    data: Any


def to_job(row: sqlite3.Row) -> Job:
    """The job of a row of the table."""
    values = dict(row)
    for name in ("error", "request", "result", "environment"):
        values[name] = from_json(values[name])
    return Job(**values | {"arguments": tuple(from_json(values["arguments"]))})


def submit(
    ledger: Ledger,
    kind: str,
    arguments: Sequence[str],
    *,
    title: str | None = None,
    run_path: str | None = None,
    request: Any = None,
    dedupe_seconds: float = 0,
    job_id: str | None = None,
    relax_gpu_timeout: bool = False,
) -> Job:
    """Put a command at the end of the queue. :func:`~mlx_distill.jobs.queue.dispatch` starts it.

    Args:
        ledger: The ledger.
        kind: The command.
        arguments: Its arguments; relative paths are relative to the root.
        title: What it is, for people; the command by default.
        run_path: The folder that it writes, under the root.
        request: What was asked for, to be kept with the job.
        dedupe_seconds: Return the job that was submitted within so many seconds with the same request (or, of
            none, the same command), unless it has failed or was cancelled.
        job_id: An identifier made by ``new_id("job")``, for callers that write files into ``root.jobs / id``
            before they submit.
        relax_gpu_timeout: Give its process ``AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1``: macOS then waits longer
            before it ends the work of the GPU.

    Raises:
        ConfigError: the command cannot be a job, or the path lies outside of the root.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} cannot be a job", fix=known_names(kind, KINDS, "commands"))
    arguments = [str(argument) for argument in arguments]
    if any("\0" in argument for argument in arguments):
        raise ConfigError("an argument with a zero byte", fix="leave it out")
    if job_id is not None and not _ID.fullmatch(job_id):
        raise ConfigError(f"{job_id!r}: not an identifier of a job", fix='make it with new_id("job")')
    run_path = None if run_path is None else ledger.root.relative(run_path)
    now = time.time()
    asked = digest(request if request is not None else [kind, arguments])
    with ledger.write() as db:
        if dedupe_seconds > 0:
            same = db.execute(
                "SELECT * FROM jobs WHERE request_hash = ? AND created_at > ?"
                " AND state NOT IN ('failed', 'cancelled') ORDER BY rowid DESC LIMIT 1",
                (asked, now - dedupe_seconds),
            ).fetchone()
            if same is not None:
                return to_job(same)
        row = {
            "id": job_id or new_id("job"),
            "kind": kind,
            "title": title or " ".join([kind, *arguments]),
            "arguments": to_json(arguments),
            "run_path": run_path,
            "state": "queued",
            "position": last_position(db) + 1,
            "created_at": now,
            "request": None if request is None else to_json(request),
            "request_hash": asked,
            "environment": to_json(_RELAXED if relax_gpu_timeout else {}),
        }
        places = ", ".join(f":{name}" for name in row)
        db.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({places})", row)
        add_event(db, str(row["id"]), "submitted", "in the queue")
        return find(db, str(row["id"]))


def get(ledger: Ledger, job_id: str) -> Job:
    """The job of this identifier.

    Raises:
        ConfigError: there is none.
    """
    with ledger.read() as db:
        return find(db, job_id)


def find(db: sqlite3.Connection, job_id: str) -> Job:
    """The job of this identifier, on a connection.

    Raises:
        ConfigError: there is none.
    """
    row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise ConfigError(f"no job {job_id!r}", fix="see the jobs: mlx-distill jobs list")
    return to_job(row)


def newest_success(ledger: Ledger, kind: str, arguments: Sequence[str]) -> Job | None:
    """The newest job of a command with just these arguments that has succeeded, if there is one."""
    with ledger.read() as db:
        row = db.execute(
            "SELECT * FROM jobs WHERE kind = ? AND arguments = ? AND state = 'succeeded' "
            "ORDER BY finished_at DESC LIMIT 1",
            (kind, to_json(list(arguments))),
        ).fetchone()
    return None if row is None else to_job(row)


def full_id(ledger: Ledger, text: str) -> str:
    """The identifier of the one job that a text is the beginning of, with or without ``job-``.

    Raises:
        ConfigError: no job begins so, or several do.
    """
    with ledger.read() as db:
        ids = [row["id"] for row in db.execute("SELECT id FROM jobs ORDER BY rowid DESC")]
    if text in ids:
        return text
    found = [one for one in ids if text and one.startswith((text, f"job-{text}"))]
    if len(found) == 1:
        return str(found[0])
    if found:
        shown = ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")
        raise ConfigError(f"{text!r} is the beginning of {len(found)} jobs", fix=f"write more of it: {shown}")
    raise ConfigError(f"no job {text!r}", fix="see the jobs: mlx-distill jobs list")


def list_jobs(
    ledger: Ledger,
    state: str | Sequence[str] | None = None,
    kind: str | None = None,
    after: str | None = None,
    limit: int = 20,
    *,
    api: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Job]:
    """Jobs, the newest first.

    Args:
        ledger: The ledger.
        state: Only those in this state, or in one of these.
        kind: Only those of this command.
        after: Those that were submitted before the job of this identifier.
        limit: So many at most.
        api: Only those that were asked for over this interface: ``request`` has it as ``api``.
        metadata: Only those whose request has these values among its metadata.
    """
    conditions, values = ["1"], list[Any]()
    if state is not None:
        states = [state] if isinstance(state, str) else list(state)
        conditions.append(f"state IN ({', '.join('?' * len(states))})")
        values += states
    if kind is not None:
        conditions.append("kind = ?")
        values.append(kind)
    if api is not None:
        conditions.append("json_extract(request, '$.api') = ?")
        values.append(api)
    for pair in (metadata or {}).items():
        conditions.append(
            "EXISTS (SELECT 1 FROM json_each(request, '$.body.metadata') AS pair"
            " WHERE pair.key = ? AND pair.value = ?)"
        )
        values += pair
    with ledger.read() as db:
        if after is not None:
            find(db, after)
            conditions.append("rowid < (SELECT rowid FROM jobs WHERE id = ?)")
            values.append(after)
        rows = db.execute(
            f"SELECT * FROM jobs WHERE {' AND '.join(conditions)} ORDER BY rowid DESC LIMIT ?",
            [*values, limit],
        ).fetchall()
    return [to_job(row) for row in rows]


def queue(ledger: Ledger) -> list[Job]:
    """The queued jobs, the next one first."""
    with ledger.read() as db:
        rows = db.execute("SELECT * FROM jobs WHERE state = 'queued' ORDER BY position").fetchall()
    return [to_job(row) for row in rows]


def running(db: sqlite3.Connection) -> list[Job]:
    """The jobs that are running, on a connection: one at most, unless the ledger was edited."""
    rows = db.execute("SELECT * FROM jobs WHERE state = 'running' ORDER BY started_at").fetchall()
    return [to_job(row) for row in rows]


def last_position(db: sqlite3.Connection) -> int:
    """The place of the last job in the queue, 0 where it is empty."""
    row = db.execute("SELECT max(position) FROM jobs WHERE state = 'queued'").fetchone()
    return int(row[0] or 0)


def update(db: sqlite3.Connection, job_id: str, **values: Any) -> None:
    """Set columns of a job."""
    columns = ", ".join(f"{name} = :{name}" for name in values)
    db.execute(f"UPDATE jobs SET {columns} WHERE id = :key", {**values, "key": job_id})


def add_event(
    db: sqlite3.Connection,
    job_id: str,
    type: str,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    data: Any = None,
) -> None:
    """Write down what happened to a job."""
    db.execute(
        "INSERT INTO job_events (job_id, created_at, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?)",
        (job_id, time.time(), level, type, message, None if data is None else to_json(data)),
    )


def events(
    ledger: Ledger,
    job_id: str,
    after: int = 0,
    limit: int = 1000,
    *,
    newest: int | None = None,
    before: int | None = None,
) -> list[Event]:
    """The events of a job with identifiers above ``after``, the oldest first.

    Args:
        ledger: The ledger.
        job_id: The job.
        after: The identifier of the last event that is known.
        limit: So many at most.
        newest: Return the last so many instead, the oldest of them first.
        before: Only events with identifiers below this.
    """
    order, count = ("id", limit) if newest is None else ("id DESC", newest)
    with ledger.read() as db:
        find(db, job_id)
        rows = db.execute(
            f"SELECT * FROM job_events WHERE job_id = ? AND id > ? AND id < ? ORDER BY {order} LIMIT ?",
            (job_id, after, _MAX_ID if before is None else before, count),
        ).fetchall()
    made = [Event(**dict(row) | {"data": from_json(row["data"])}) for row in rows]
    return sorted(made, key=lambda event: event.id)
