"""Removing what a job has not finished."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_distill.jobs.store import Job
from mlx_distill.ledger.root import Root
from mlx_distill.storage import lock_folder, os_errors, partial_folder
from mlx_distill.storage.stage_folder import MANIFEST


def remove_unfinished(job: Job, root: Root) -> list[Path]:
    """Remove the partial stages of a job that has been started, with their checkpoints. Finished stages stay.

    Returns:
        The folders that were removed.

    Raises:
        FileError: another run uses the job's folder, or a file cannot be removed.
    """
    if job.run_path is None or not job.attempt:
        return []
    out = root.inside(job.run_path)
    beside = partial_folder(out)
    unfinished = [beside] if job.kind == "convert" and beside.is_dir() else []
    if out.is_dir():
        with lock_folder(out):
            unfinished += _partial_folders(out)
            return _remove(unfinished)
    return _remove(unfinished)


def _partial_folders(out: Path) -> list[Path]:
    """The partial folders in a run or a cross-validation; one with a manifest is finished."""
    found = [path for path in sorted(out.rglob(".*.partial")) if path.is_dir() and not path.is_symlink()]
    return [path for path in found if not (path / MANIFEST).is_file()]


def _remove(folders: list[Path]) -> list[Path]:
    with os_errors():
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
    return folders
