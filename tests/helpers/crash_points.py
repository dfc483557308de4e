"""Kills the publishing of a stage before each of its file operations, and then its recovery likewise.

crash_points.py FOLDER prints one JSON line a scenario: the number of kills, and what was wrong after any of
them. Each attempt is a forked child; nothing here imports mlx, so a fork is safe and takes milliseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_distill.storage import (
    check_folder,
    open_partial,
    publish,
    read_manifest,
    recover,
    scratch,
    stage_key,
    write_text,
)

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}


def killed_before(number: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a child process that is killed before its ``number``-th change of the disk; False if it
    ended earlier.
    """
    pid = os.fork()
    if pid == 0:
        left = [number]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in _CHANGES or (
                event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            ):
                return
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def make(folder: Path, text: str) -> None:
    """A stage that resumes from checkpoints and writes two files."""
    config = {"text": text}
    partial = open_partial(folder, stage_key("stage", 1, config, {}))
    for number in range(2):
        weights, state = (scratch(partial) / f"{name}-{number}" for name in ("weights", "state"))
        if not state.is_file():
            write_text(weights, text)
            write_text(state, text)
        assert weights.read_text() == state.read_text() == text, "a checkpoint is damaged, or another stage's"
    write_text(partial / "sub" / "one.txt", text)
    write_text(partial / "two.txt", text * 2)
    publish(folder, "stage", 1, config, {}, {})


def wrong(folder: Path, allowed: set[str | None]) -> str | None:
    """What is wrong with the folder; None if it holds one of the ``allowed`` texts (None: is absent)."""
    if not folder.exists():
        return None if None in allowed else "absent"
    manifest = read_manifest(folder)
    if manifest is None:
        return "seen without a manifest"
    if damage := check_folder(folder, manifest, verify=True):
        return damage
    if hidden := [name for name in manifest.files if any(part.startswith(".") for part in Path(name).parts)]:
        return f"counts {hidden} as its own"
    extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {
        *manifest.files,
        "manifest.json",
    }
    if extra:
        return f"extra files {sorted(extra)}"
    text = (folder / "two.txt").read_text()
    return None if text[: len(text) // 2] in allowed else f"holds {text!r}"


def attempt(base: Path, before: str | None, kill: int, second: int) -> tuple[bool, bool, str | None]:
    """Kill the stage and then the recovery: whether each was killed, and what was wrong after either."""
    shutil.rmtree(base, ignore_errors=True)
    folder = base / "stage"
    base.mkdir(parents=True)
    if before is not None:
        make(folder, before)
    hit = killed_before(kill, lambda: make(folder, "new"))
    problem = wrong(folder, {None, before, "new"})
    hit_again = killed_before(second, lambda: recover(folder))
    problem = problem or wrong(folder, {None, before, "new"})
    recover(folder)
    problem = problem or wrong(folder, {before, "new"})
    recover(folder)
    make(folder, "new")
    problem = problem or wrong(folder, {"new"})
    left = sorted(p.name for p in base.iterdir() if p.name != "stage")
    return hit, hit_again, problem or (f"leaves {left}" if left else None)


def main(folder: Path) -> None:
    os.fsync = lambda handle: None  # a kill, not a power cut: what was written stays written
    for name, before in (("fresh", None), ("again", "old")):
        problems, kills, kill, hit = [], 0, 0, True
        while hit:
            kill, second, hit_again = kill + 1, 0, True
            while hit_again:
                second += 1
                hit, hit_again, problem = attempt(folder / "base", before, kill, second)
                kills += hit + hit_again
                if problem:
                    problems.append(f"kill before change {kill}, then {second}: {problem}")
        print(
            json.dumps({"scenario": name, "points": kill - 1, "kills": kills, "problems": problems}),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
