"""What somebody should look at: failed jobs, a model that does not serve, changed data, backups, the disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_distill.data_sets import changed_data_sets
from mlx_distill.jobs import Job, list_jobs
from mlx_distill.ledger.backups import newest_backup
from mlx_distill.ledger.database import Ledger
from mlx_distill.text import counted, duration, size

_LOW_DISK = 2_000_000_000
_DAY_S = 86_400.0
_OLD_DAYS = 7
_LOOKED_AT = 200


@dataclass(frozen=True)
class Alarm:
    """Something that somebody should look at.

    Attributes:
        text: What happened.
        note: What to do.
        command: The command that does it, without the program's name; empty: none.
        link: The page of what it is about.
        level: ``bad``, or ``open`` for what can wait.
    """

    text: str
    note: str
    command: tuple[str, ...] = ()
    link: str | None = None
    level: str = "bad"


def alarms(ledger: Ledger, state: Mapping[str, Any]) -> list[Alarm]:
    """All alarms, those that keep a model from serving first.

    Args:
        ledger: The ledger.
        state: Of the models in memory, as ``/ready`` has it.
    """
    found = [_not_served(state)] if state["problem"] else []
    free = shutil.disk_usage(ledger.root.path).free
    if free < _LOW_DISK:
        note = "A training saves checkpoints: free some space before the next one."
        found.append(Alarm(f"The disk has {size(free)} left", note))
    found += _failed_jobs(ledger)
    for data in changed_data_sets(ledger):
        command = (
            "data",
            "add",
            data.path,
            "--name",
            data.name,
            *(("--task", data.task) if data.task else ()),
        )
        text = f"{data.path} is gone, or has changed since its rows were described"
        found.append(Alarm(text, "Describe its rows again:", command, f"/data/{data.name}", "open"))
    return found + _old_backup(ledger)


def _not_served(state: Mapping[str, Any]) -> Alarm:
    text = "What serves is not what is deployed" if state["models"] else "The served model is not in memory"
    again = [max(0.0, failed["retry_at"] - time.time()) for failed in state.get("failed_changes", ())]
    later = f" (tried again in {duration(min(again))})" if again else ""
    return Alarm(text, f"{state['problem']}{later}")


def _failed_jobs(ledger: Ledger) -> list[Alarm]:
    """The newest jobs that failed, but those whose folder a later job writes, and old ones: an orphaned job
    is shown until somebody resumes or discards it.
    """
    newest = list_jobs(ledger, limit=_LOOKED_AT)
    found = []
    for place, job in enumerate(newest):
        later = job.run_path is not None and any(one.run_path == job.run_path for one in newest[:place])
        if job.state != "failed" or later:
            continue
        if (job.error or {}).get("code") == "orphaned":
            text = f"The process of “{job.title}” ended without a word"
            note = "It was killed, or the machine was switched off. It goes on from its last checkpoint:"
            found.append(Alarm(text, note, ("jobs", "resume", job.id), f"/jobs/{job.id}"))
        elif time.time() - (job.finished_at or job.created_at) < _OLD_DAYS * _DAY_S:
            found.append(_failed(job))
    return found


def _failed(job: Job) -> Alarm:
    error = job.error or {}
    fix = str(error.get("fix") or "")
    note = f"{error.get('message') or 'It said no reason.'}{f' ({fix})' if fix else ''}"
    command = "resume" if error.get("code") == "gpu_watchdog" else "show"
    return Alarm(f"“{job.title}” failed", note, ("jobs", command, job.id), f"/jobs/{job.id}")


def _old_backup(ledger: Ledger) -> list[Alarm]:
    """An alarm where the ledger has known a deployment for a week, and has no backup of the last week."""
    kept = newest_backup(ledger.root)
    with ledger.read() as db:
        first = db.execute("SELECT min(created_at) FROM deployments").fetchone()[0]
    since = kept.stat().st_mtime if kept else first
    if first is None or since is None:
        return []
    days = int((time.time() - max(since, first)) // _DAY_S)
    if days < _OLD_DAYS:
        return []
    age = f"The newest backup of the ledger is {counted(days, 'day')} old"
    text = age if kept else "The ledger has no backup"
    note = "It is the record of what was deployed, when and why. A backup is one file; keep it elsewhere too:"
    return [Alarm(text, note, ("ledger", "backup"), None, "open")]
