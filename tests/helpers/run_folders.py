"""Folders that look like those of runs, made without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_distill.storage import open_partial, publish, stage_key, write_json


def make_stage(run: Path, name: str, *, started: float = 1000.0, **recorded: Any) -> None:
    """A finished stage of a run, with one file."""
    config = {"name": name}
    partial = open_partial(run / name, stage_key(name, 1, config, {}))
    (partial / "file.txt").write_text("content")
    publish(
        run / name, name, 1, config, {}, {"started": started, "seconds": 7.5, "recipe": "tiny", **recorded}
    )


def make_run(run: Path, **report: Any) -> None:
    """A run with a data stage and a student, and with a report where something of it is given."""
    make_stage(run, "data")
    make_stage(run, "student", started=2000.0)
    if report:
        write_json(run / "report.json", {"task": "music", "metrics": {}, **report})
