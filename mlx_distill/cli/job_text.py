"""Jobs, their progress and their events in lines for a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mlx_distill.cli.output import plain
from mlx_distill.text import counted, duration

if TYPE_CHECKING:
    from mlx_distill.jobs import Event, Job, JobProgress
    from mlx_distill.ledger.root import Root


def job_line(job: Job) -> str:
    """A job in one line."""
    end = job.finished_at if job.state not in ("queued", "running") else None
    took = f"  {duration(end - job.started_at)}" if end and job.started_at and end >= job.started_at else ""
    return f"{job.id}  {job.state_text():<10}  {job.title}{took}"


def job_lines(job: Job, root: Root) -> list[str]:
    """A job in some lines: how it ended and where its files are."""
    lines = [job_line(job), f"  log: {job.log(root)}"]
    if job.run_path:
        lines.append(f"  run: {job.run_path}")
    if job.error:
        lines += [
            f"  error: {job.error['message']}",
            *([f"  fix: {job.error['fix']}"] * bool(job.error["fix"])),
        ]
    lines += [f"  {name}: {value}" for name, value in (job.result or {}).items()]
    return lines


def job_facts(job: Job) -> dict[str, Any]:
    """A job as values for ``--json``."""
    facts = plain(job)
    hidden = ("request", "request_hash", "environment", "pid_space", "asked_from")
    return {name: value for name, value in facts.items() if name not in hidden}


def progress_lines(done: JobProgress) -> list[str]:
    """How far a job has come, in one line; none where nothing is known yet."""
    if done.stage is None and done.task is None:
        return []
    parts = [done.stage or done.task or ""]
    if done.step is not None:
        total = f"of {counted(round(done.steps), done.unit or 'part')}" if done.steps else done.unit or ""
        parts.append(f"{done.step:,.0f} {total}")
    if done.tokens_per_second:
        parts.append(f"{done.tokens_per_second:,.0f} tokens/s")
    if done.eta_s is not None:
        parts.append(f"{duration(done.eta_s)} left")
    return ["  " + ", ".join(part.strip() for part in parts)]


def event_line(event: Event) -> str:
    """An event in one line, with its time on this machine's clock."""
    return f"{time.strftime('%H:%M:%S', time.localtime(event.created_at))}  {event.type:<14} {event.message}"
