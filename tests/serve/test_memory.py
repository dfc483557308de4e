"""What the memory of a server does."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from mlx_distill.runtime import trim_heap
from mlx_distill.serve.memory import HeapTrimmer


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator is glibc's")
def test_what_was_freed_between_what_is_kept_goes_back_to_the_system() -> None:
    trim_heap()
    before, size = resident(), 100_000_000
    blocks = [b"x" * 40_000 for _ in range(size // 40_000)]
    full = resident() - before
    assert full > 0.9 * size
    kept = blocks[::50]  # nothing of the heap's end is free
    del blocks
    HeapTrimmer(seconds=3600).tick()  # it is not time yet
    assert resident() - before > 0.9 * full
    HeapTrimmer(seconds=0).tick()
    assert resident() - before < 0.2 * full and len(kept) > 1


def test_another_c_library_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("mlx_distill.serve.memory.trim_heap", lambda: bool(asked.append(1)))
    trimmer = HeapTrimmer(seconds=0)
    trimmer.tick()
    trimmer.tick()
    assert asked == [1]
