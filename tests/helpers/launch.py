"""Trainings on two ranks: by ``mlx.launch``, or as processes whose exit codes are known."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

RUNNER = Path(__file__).with_name("training_process.py")
# With more threads the processes would slow each other down.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


def launched(folder: Path, *arguments: str) -> str:
    """The output of two ranks of ``mlx.launch``, whose own exit code does not depend on theirs."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [launcher, "-n", "2", "--backend", "ring", "--", sys.executable, RUNNER, folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    return done.stdout + done.stderr


def two_ranks(folder: Path, *arguments: str) -> list[tuple[int, str]]:
    """Exit code and stderr of the process on each of two ranks."""
    return ends_of(folder, [[sys.executable, RUNNER, folder, *arguments]] * 2)


def ends_of(
    folder: Path, commands: Sequence[Sequence[str | Path]], folders: Sequence[Path | None] = (None, None)
) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank's command, run in its folder; they have two minutes."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in commands]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{bound.getsockname()[1]}"] for bound in sockets]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    with ExitStack() as stack:
        ranks = []
        for rank, (command, path) in enumerate(zip(commands, folders, strict=True)):
            environment = {**ENVIRONMENT, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
            stderr = stack.enter_context(open(folder / f"stderr-{rank}.txt", "w+"))
            ranks.append(subprocess.Popen(command, env=environment, stderr=stderr, cwd=path))
            stack.callback(ranks[-1].kill)
        codes = [rank.wait(120) for rank in ranks]
    return [(code, (folder / f"stderr-{rank}.txt").read_text()) for rank, code in enumerate(codes)]
