"""A command in a terminal beside jobs and a server: it takes the accelerator's lease where it is free, and
says who has it where not.

It waits only where it is asked to, and nothing is made where no ledger is: who uses neither jobs nor a server
notices nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.jobs import lease
from mlx_distill.jobs.process import this_process
from mlx_distill.jobs.queue import dispatch
from mlx_distill.jobs.store import queue
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root

_LOOK_S = 1.0  # between two looks whether the jobs have ended


@contextmanager
def accelerator(purpose: str, root: Path | None = None) -> Iterator[None]:
    """Hold the lease during a block, so that jobs wait for its end; where another has it, or a job waits for
    it, say so on standard error and go on beside it.

    Args:
        purpose: What the command does, such as ``mlx-distill run recipe.yaml``.
        root: The root; ``MLX_DISTILL_ROOT`` or the working directory by default.
    """
    ledger = _ledger(root)
    name = f"terminal-{os.getpid()}"
    held = False
    if ledger is not None:
        with suppress(DistillError):  # the command does not need the ledger
            held = lease.acquire(ledger, name, purpose)
            if not held:
                _say(ledger)
    if ledger is None or not held:
        yield
        return
    with _until_the_end(ledger, name):
        yield


@contextmanager
def verifying(ledger: Ledger, purpose: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lease while a version is loaded and asked its golden rows.

    Beside a server or another command, which do not end for it, it goes on and says so. Where this process
    has the lease already, it goes on with it.

    Args:
        ledger: The ledger.
        purpose: What the command does, such as ``mlx-distill registry promote music:3``.
        wait: Wait for the end of the jobs; else they are a reason not to begin.

    Raises:
        ConfigError: a job runs or waits.
    """
    name, told = f"terminal-{os.getpid()}", False
    holder = lease.holder(ledger)
    if holder is not None and holder.process == this_process():
        yield
        return
    while not lease.acquire(ledger, name, purpose):
        holder = lease.holder(ledger)
        if not lease.wanted(ledger):
            if holder is None:  # it has ended meanwhile
                continue
            _say(ledger)
            yield
            return
        why = lease.waits_for(ledger) or f"waits for {queue(ledger)[0].id}"
        if not wait:
            raise ConfigError(
                f"the version has to be loaded to be verified, and a job needs the accelerator: {why}",
                fix="wait for it: --wait; or stop it: mlx-distill jobs pause ID",
            )
        if not told:
            print(f"note: {purpose} {why}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_LOOK_S)
    with _until_the_end(ledger, name):
        yield


@contextmanager
def _until_the_end(ledger: Ledger, name: str) -> Iterator[None]:
    """Keep the lease that this process has taken during a block, then free it and start the next job."""
    try:
        with lease.kept(ledger, name):
            yield
    finally:
        with suppress(DistillError):
            lease.release(ledger, name)
            dispatch(ledger)


def _ledger(root: Path | None) -> Ledger | None:
    """The ledger of the root, if there is one that this command is to look at."""
    if os.environ.get("MLX_RANK", "0") != "0":  # the first rank of mlx.launch does
        return None
    found = Root.at(root or os.environ.get("MLX_DISTILL_ROOT") or ".")
    if not found.ledger.is_file():
        return None
    with suppress(DistillError):
        return Ledger(found, create=False)
    return None


def _say(ledger: Ledger) -> None:
    holder = lease.holder(ledger)
    if holder is not None:
        if holder.process == this_process():  # a job's own command
            return
        who = f"{holder.holder} ({holder.purpose}, {holder.process}) uses the accelerator"
    else:
        waiting = queue(ledger)
        if not waiting:
            return
        who = f"{waiting[0].id} ({waiting[0].title}) waits for the accelerator"
    print(
        f"note: {who}; this command does not wait: both share its memory and its speed.\n"
        "      To take turns: mlx-distill jobs submit COMMAND ...",
        file=sys.stderr,
        flush=True,
    )
