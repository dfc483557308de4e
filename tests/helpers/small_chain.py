"""A small run of all stages: two packaged tiny models, a few steps of each training, and several resumable
parts in every stage.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.small_run import rows, write_recipe
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.context import Context
from mlx_distill.stages.distill import distill
from mlx_distill.stages.teach import teach
from mlx_distill.storage import Manifest, check_folder, read_manifest

# The functions of the commands that train.
TRAININGS = {"teach": teach, "distill": distill}
STAGES = (
    "data",
    "teacher_base",
    "student_base",
    "teacher",
    "targets",
    "student",
    "quantized",
    "evaluations/teacher",
    "evaluations/student",
)
_TRAINING = {
    "steps": 5,
    "accumulate": 1,
    "batch_size": 4,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "evaluate_every": 3,
    "checkpoint_every": 2,
}


def write_chain(folder: Path, **blocks: Any) -> Path:
    """Write ``recipe.yaml`` and enough rows for two shards of targets and two chunks of an evaluation."""
    settings = {
        "student": "asset:models/tiny-gpt-oss",
        "teach": _TRAINING,
        "distill": _TRAINING,
        "targets": {"top_k": 8, "batch_size": 8, "min_valid": 0},
        "quantize": {"refine_rows": 8},
        "evaluate": {"models": ["student"], "batch_size": 4},
        **blocks,
    }
    recipe = write_recipe(folder, **settings)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(110)), encoding="utf-8")
    return recipe


@functools.cache
def finished() -> Path:
    """A folder with ``recipe.yaml`` and its finished run ``out``, made once a session by whoever needs it
    first; never change it.
    """
    from mlx_distill.pipeline import run

    folder = session_folder("PYTEST_XDIST_WORKER" in os.environ)
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            run(write_chain(folder), folder / "out")
            (folder / "whole").touch()
    return folder


def session_folder(worker: bool) -> Path:
    """Where a session of pytest keeps what its processes share; conftest.py removes it.

    Args:
        worker: Whether this process is a worker of pytest-xdist, whose parent is the session's.
    """
    return Path(tempfile.gettempdir()) / f"mlx-distill-tests-{os.getppid() if worker else os.getpid()}"


class RecordedProgress(NullProgress):
    """Records the notes, the tasks, and the updates of each."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, float | None, list[float]]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Any]:
        seen: list[float] = []
        self.tasks.append((name, total, seen))
        yield type("Bar", (), {"update": lambda self, done, **info: seen.append(done)})()


def make_context(*overrides: str, run: Path | None = None, **more: Any) -> Context:
    """The context of a stage of the finished run, or of a copy of its folder."""
    recipe = load_recipe(finished() / "recipe.yaml", overrides)
    return Context(
        recipe, recipe.load_task(), run or finished() / "out", RecordedProgress(), StopFlag(), **more
    )


def manifests(out: Path) -> dict[str, Manifest]:
    """The manifests of all stages that have one."""
    read = {name: read_manifest(out / name) for name in STAGES}
    return {name: manifest for name, manifest in read.items() if manifest is not None}


def whole_stages(out: Path) -> list[str]:
    """The visible stages of a run. Asserts that each is whole and that nothing but the report is beside."""
    visible = [p for p in out.iterdir() if not p.name.startswith(".")]
    folders = [p for p in visible if p.is_dir() and p.name != "evaluations"]
    folders += [p for p in (out / "evaluations").glob("*") if not p.name.startswith(".")]
    for path in folders:
        manifest = read_manifest(path)
        assert manifest is not None, f"{path} is visible without a manifest"
        assert check_folder(path, manifest, verify=True) is None
        written = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert written == {*manifest.files, "manifest.json"}
    assert {p.name for p in visible if p.is_file()} <= {"report.json", "report.html"}
    return sorted(p.relative_to(out).as_posix() for p in folders)
