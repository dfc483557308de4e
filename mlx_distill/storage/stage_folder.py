"""Stage folders, which are complete or absent, each with a manifest of its inputs and its files.

A stage works in ``.<name>.partial`` beside its folder and renames it when everything is on the disk. A killed
stage leaves the old folder, or a partial one that the next run resumes if its key is still the same.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.storage.atomic import (
    digest,
    fsync_folder,
    os_errors,
    read_json,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, SHA-256 and modification time (ns) of one file of a stage."""

    size: int
    sha256: str
    mtime_ns: int = 0


@dataclass(frozen=True)
class Manifest:
    """The manifest of a stage's folder: its inputs, its settings, and the checksums of its files.

    The folder is current if ``key`` is; ``recorded`` (times, machine, versions) never matters for it.
    """

    stage: str
    format: int
    key: str
    config: Mapping[str, Any]
    parents: Mapping[str, str]
    files: Mapping[str, FileEntry]
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """Hash of the files' names and contents, part of the keys of the stages that read them."""
        return digest({name: entry.sha256 for name, entry in self.files.items() if name not in _UNKEYED})


# Files for people and for the use of a model, from which no later stage computes anything.
_UNKEYED = frozenset(
    {
        "metrics.jsonl",
        "log.txt",
        "statistics.json",
        "timing.json",
        "preflight.json",
        "README.md",
        "trained_on.json",
        "artifact.json",
    }
)


def stage_key(stage: str, format: int, config: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """The stage's key: a hash of everything that can change its result."""
    return digest({"stage": stage, "format": format, "config": config, "parents": parents})


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a finished stage, or None where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    fix = f"delete {folder} if a run has written it, and run the same command again"
    raw = read_json(path, fix)
    try:
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        return Manifest(files=files, **raw)
    except (TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path}: not a manifest of this version: {error}", fix=fix) from error


def check_folder(folder: str | Path, manifest: Manifest, *, verify: bool = False) -> str | None:
    """None where the files are those of the manifest, else what is wrong.

    Sizes and modification times are compared; contents are hashed where a time differs, or with ``verify``.
    """
    for name, entry in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"{path} is missing"
        stat = path.stat()
        if stat.st_size != entry.size:
            return f"{path} has {stat.st_size} bytes, not {entry.size}"
        if (verify or stat.st_mtime_ns != entry.mtime_ns) and sha256(path) != entry.sha256:
            return f"{path} has changed since it was written"
    return None


def check_replaceable(folder: str | Path) -> None:
    """Raise unless a stage's folder may take this place: nothing is there, an empty folder, or one with a
    manifest.

    Raises:
        FileError: a file, a pipe, a device or a broken link, or a folder that no stage has written.
    """
    folder = Path(folder)
    with os_errors():
        if not folder.is_dir():
            wrong = "a file, not a folder" if folder.is_file() else "not a folder"
            if not os.path.lexists(folder):
                return
        elif read_manifest(folder) is not None or not any(folder.iterdir()):
            return
        else:
            wrong = "not empty and not written by this package"
    raise FileError(f"{folder}: {wrong}", fix="choose another folder for the result")


def partial_folder(folder: str | Path) -> Path:
    """The folder in which the stage that makes ``folder`` works until it is done."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.partial")


def finished_name(partial: Path) -> str:
    """The name of the folder that a partial folder becomes.

    >>> finished_name(partial_folder("run/teacher"))
    'teacher'
    """
    return partial.name.removeprefix(".").removesuffix(".partial")


def open_partial(folder: str | Path, key: str) -> Path:
    """The partial folder for ``folder``: empty, or as a killed run with the same key left it."""
    recover(folder)
    partial = partial_folder(folder)
    with os_errors():
        key_file = partial / "key"
        if partial.exists() and not (key_file.is_file() and key_file.read_text() == key):
            key_file.unlink(missing_ok=True)  # first: a half removed folder must not be resumed
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if not key_file.is_file():
            write_text(key_file, key)
    return partial


def scratch(partial: Path) -> Path:
    """A folder for checkpoints inside a partial stage; it is not part of the result."""
    path = partial / "scratch"
    with os_errors():
        path.mkdir(exist_ok=True)
    return path


def publish(
    folder: str | Path,
    stage: str,
    format: int,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    recorded: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash the partial folder's files (except those whose hash is in ``hashes``), write the manifest, sync,
    and rename the folder into place.
    """
    folder, partial = Path(folder), partial_folder(folder)
    remove_leftovers(partial, below=True)
    with os_errors():
        files = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST):
            name = path.relative_to(partial).as_posix()
            if name == "key" or name.startswith("scratch/"):
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            stat = path.stat()
            files[name] = FileEntry(stat.st_size, (hashes or {}).get(name) or sha256(path), stat.st_mtime_ns)
        key = stage_key(stage, format, config, parents)
        manifest = Manifest(stage, format, key, config, parents, files, {**recorded, "finished": time.time()})
        # From here on the folder is complete, and after a kill recover() renames it; before, its scratch
        # folder is still needed.
        write_json(partial / MANIFEST, asdict(manifest))
        _swap(partial, folder)
    return manifest


def record_files(folder: str | Path, names: Iterable[str]) -> None:
    """Take files into a finished folder's manifest that were written or replaced after it was published.

    Args:
        folder: It has a manifest.
        names: The files, relative to it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return
    files = dict(manifest.files)
    with os_errors():
        for name in names:
            stat = (folder / name).stat()
            files[name] = FileEntry(stat.st_size, sha256(folder / name), stat.st_mtime_ns)
        write_json(folder / MANIFEST, asdict(replace(manifest, files=dict(sorted(files.items())))))


def _swap(partial: Path, folder: Path) -> None:
    check_replaceable(folder)
    shutil.rmtree(partial / "scratch", ignore_errors=True)
    (partial / "key").unlink(missing_ok=True)
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Finish the renames that a kill interrupted: a partial folder with a manifest is complete, and takes the
    place of ``folder``.
    """
    folder = Path(folder)
    partial, old = partial_folder(folder), folder.with_name(f".{folder.name}.old")
    with os_errors():
        if (partial / MANIFEST).is_file():
            _swap(partial, folder)
        elif folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, folder)


def link_stage(source: str | Path, folder: str | Path) -> None:
    """Make a finished stage a stage of another run too: its files are linked where the file system can, so
    they take their place on the disk once, and copied elsewhere. No stage changes a published file, so the
    two folders stay equal until one of them is made again.

    Args:
        source: The folder of a finished stage.
        folder: The same stage of the other run; replaced if it is there.
    """
    source, partial = Path(source), partial_folder(folder)
    with os_errors():
        shutil.rmtree(partial, ignore_errors=True)
        files = sorted(path for path in source.rglob("*") if path.is_file())
        for path in sorted(
            files, key=lambda path: path.name == MANIFEST
        ):  # it says that all others are there
            target = partial / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copy2(path, target)
        fsync_folder(partial)
    recover(folder)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Allow one run on a folder at a time; the lock ends with the process, also with a killed one."""
    import fcntl

    folder = Path(folder)
    with os_errors():
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise FileError(
                f"{folder}: another run is using this folder (process {owner})",
                fix="wait for it, or choose another --out",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
