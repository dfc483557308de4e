"""A run that kills itself: killed_run.py RECIPE OUT [PATTERN [STAGE]].

Just before a file or folder whose path matches the pattern is renamed into place, a file is cut in half, as
if it had been killed while writing, and the process gets SIGKILL.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from mlx_distill.runtime import load_blas

load_blas()


def kill_at(pattern: str) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and re.search(pattern, os.fsdecode(arguments[1])):
            written = Path(os.fsdecode(arguments[0]))
            if written.is_file():
                os.truncate(written, written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(recipe: str, out: str, pattern: str = "", only: str | None = None) -> None:
    if pattern:
        kill_at(pattern)
    from mlx_distill.pipeline import run

    run(recipe, out, only=only)


if __name__ == "__main__":
    main(*sys.argv[1:])
