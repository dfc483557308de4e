"""Conversions that are killed at moments drawn by a seed.

    killed_conversion.py SOURCE FOLDER SEED...        prints a JSON line for each scenario

A moment is an event (a block of a shard was computed, a file is about to be renamed), not a time, so that a
seed means the same on every machine. The shard that is being written is cut to half its size. Each attempt is
a forked child process; nothing here computes with MLX before a fork.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.models.convert import convert

KILLS = 10
_ENDING = 8  # the last moments: index, config, table, manifest, and the renaming of folders


def partial_folder(out: Path) -> Path:
    """Where a conversion to ``out`` writes before it is complete."""
    return out.with_name(f".{out.name}.partial")


class Events:
    """The progress of a conversion and its renames, counted; the process dies at event ``moment``."""

    def __init__(self, out: Path, moment: int) -> None:
        self.partial, self.moment, self.count = partial_folder(out), moment, 0
        sys.addaudithook(lambda event, _: self.add() if event == "os.rename" else None)

    @contextmanager
    def task(
        self, name: str, total: float | None = None, unit: str = "", start: float = 0
    ) -> Iterator[Events]:
        yield self

    def update(self, done: float, **info: Any) -> None:
        if any(self.partial.glob(".model-*.tmp")):  # not for shards that an earlier attempt finished
            self.add()

    def note(self, text: str) -> None:
        pass

    def add(self) -> None:
        self.count += 1
        if self.count == self.moment:
            for path in self.partial.glob(".model-*.tmp"):
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(source: Path, out: Path, moment: int) -> tuple[bool, int]:
    """Convert in a child process that dies at event ``moment`` (0: never).

    Returns:
        Whether it died, and the number of events.
    """
    reader, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        events = Events(out, moment)
        try:
            convert(source, out, "affine4", max_shard_bytes=500, memory_bytes=64_000, progress=events)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os.write(sender, str(events.count).encode())
        os._exit(0)
    os.close(sender)
    _, status = os.waitpid(pid, 0)
    with open(reader) as file:
        count = int(file.read() or 0)
    if os.WIFSIGNALED(status):
        return True, moment
    assert os.WEXITSTATUS(status) == 0, "see above"
    return False, count


def finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """The finished shards, each with what changes if it is written again."""
    partial = partial_folder(out)
    return {
        p.name: (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in partial.glob("model-*.safetensors")
        if (partial / "scratch" / f"{p.name}.json").is_file()
    }


def contents(folder: Path) -> dict[str, Any]:
    """The bytes of every file, and the manifest without its times."""
    files: dict[str, Any] = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    manifest = json.loads(files["manifest.json"])
    for entry in manifest["files"].values():
        del entry["mtime_ns"]
    del manifest["recorded"]["seconds"], manifest["recorded"]["finished"]
    return {**files, "manifest.json": manifest}


def scenario(source: Path, base: Path, whole: dict[str, Any], moments: list[int]) -> dict[str, Any]:
    """Kill a conversion at each moment, counted from its latest start, then let it finish."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    out, problems, kills = base / "out", [], 0
    shards: dict[str, tuple[int, int]] = {}
    most_finished = 0
    for moment in [*moments, 0]:
        died, _ = attempt(source, out, moment)
        kills += died
        if out.exists() and contents(out) != whole:
            problems.append(f"after moment {moment} the folder is neither absent nor complete")
        now = finished_shards(out)
        problems += [
            f"{name} was written again" for name in shards if name in now and now[name] != shards[name]
        ]
        if died and not out.exists() and not (partial_folder(out) / "manifest.json").exists():
            problems += [f"{name} is lost" for name in shards.keys() - now.keys()]
        shards, most_finished = now, max(most_finished, len(now))
    if contents(out) != whole:
        problems.append("the result differs from an uninterrupted conversion's")
    problems += [f"leaves {p.name}" for p in base.iterdir() if p.name != "out"]
    return {"kills": kills, "moments": moments, "finished": most_finished, "problems": problems}


def main(source: Path, folder: Path, *seeds: str) -> None:
    os.fsync = lambda handle: None  # a killed process loses no written data, unlike a power cut
    _, total = attempt(source, folder / "whole" / "out", 0)
    whole = contents(folder / "whole" / "out")
    for seed in seeds:
        # At most a tenth of the events between two kills, so that all ten kills come before the end.
        rng = random.Random(int(seed))
        moments = [rng.randint(1, total // KILLS) for _ in range(KILLS)]
        print(
            json.dumps({"scenario": f"seed {seed}", **scenario(source, folder / "random", whole, moments)}),
            flush=True,
        )
    for moment in range(total - _ENDING + 1, total + 1):
        print(
            json.dumps({"scenario": f"moment {moment}", **scenario(source, folder / "end", whole, [moment])}),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
