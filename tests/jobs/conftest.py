"""A ledger of its own for each test, and no process left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mlx_distill.jobs.store import list_jobs
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(Root.at(tmp_path))
    yield made
    for job in list_jobs(made, limit=1000):
        if job.process is not None and job.process.is_alive and job.pid != os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
