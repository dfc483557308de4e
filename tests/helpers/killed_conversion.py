"""Conversions that are killed at moments drawn by a seed: killed_conversion.py SOURCE FOLDER SEED... prints a
JSON line a scenario.

A moment is a piece of work (a block about to be written, a file about to be renamed), never a time, so that a
seed means the same on every machine. Where a block is hit, half of it is on the disk. Each attempt is a
forked child: nothing here computes with MLX before a fork.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from mlx_distill.models.checkpoint import writer
from mlx_distill.models.convert import convert

KILLS = 10
_ENDING = 8  # the last moments: index, config, table, manifest, and the change of folders


def attempt(source: Path, out: Path, moment: int) -> tuple[bool, int]:
    """Convert in a child that dies at its ``moment``-th piece of work (0: never): whether it died, and how
    many there were.
    """
    reader, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        done, write = 0, writer._Sink._write

        def tick() -> bool:
            nonlocal done
            done += 1
            return done == moment

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def hit(self: Any, data: Any) -> None:
            if tick():
                write(self, memoryview(data)[: len(data) // 2])
                die()
            write(self, data)

        writer._Sink._write = hit  # type: ignore[method-assign]
        sys.addaudithook(lambda event, _: die() if event == "os.rename" and tick() else None)
        try:
            convert(source, out, "affine4", max_shard_bytes=500, memory_bytes=64_000)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os.write(sender, str(done).encode())
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
    """Shards that are whole, with what would change if one were written again."""
    partial = out.with_name(f".{out.name}.partial")
    return {
        p.name: (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in partial.glob("model-*.safetensors")
        if (partial / "scratch" / f"{p.name}.json").is_file()
    }


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes, and the manifest but for its times."""
    found: dict[str, Any] = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    manifest = json.loads(found["manifest.json"])
    for entry in manifest["files"].values():
        del entry["mtime_ns"]
    del manifest["recorded"]["seconds"], manifest["recorded"]["finished"]
    return {**found, "manifest.json": manifest}


def scenario(source: Path, base: Path, whole: dict[str, Any], moments: list[int]) -> dict[str, Any]:
    """Kill one conversion at each moment (counted from its latest start), then let it end."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    out, problems, kills = base / "out", [], 0
    shards: dict[str, tuple[int, int]] = {}
    most = 0
    for moment in [*moments, 0]:
        died, _ = attempt(source, out, moment)
        kills += died
        if out.exists() and contents(out) != whole:
            problems.append(f"after moment {moment} the folder is neither absent nor whole")
        now = finished_shards(out)
        problems += [
            f"{name} was written again" for name in shards if name in now and now[name] != shards[name]
        ]
        if died and not out.exists() and not (out.with_name(".out.partial") / "manifest.json").exists():
            problems += [f"{name} is lost" for name in shards.keys() - now.keys()]
        shards, most = now, max(most, len(now))
    if contents(out) != whole:
        problems.append("the result differs from an uninterrupted conversion's")
    problems += [f"leaves {p.name}" for p in base.iterdir() if p.name != "out"]
    return {"kills": kills, "moments": moments, "finished": most, "problems": problems}


def main(source: Path, folder: Path, *seeds: str) -> None:
    os.fsync = lambda handle: None  # a kill, not a power cut: what was written stays written
    _, total = attempt(source, folder / "whole" / "out", 0)
    whole = contents(folder / "whole" / "out")
    for seed in seeds:
        # A tenth of the work at most between two kills, so that all ten come before the end.
        draw = random.Random(int(seed))
        moments = [draw.randint(1, total // KILLS) for _ in range(KILLS)]
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
