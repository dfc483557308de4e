"""Files that are whole or absent: atomic writes, JSONL, stage folders with a manifest, locks.

A stage works in ``.<name>.partial`` beside its folder and renames it when everything is on the disk. A kill leaves either the
old folder or a partial one that the next run goes on with, if its key is still the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.errors import DataError, FileError, from_os_error

MANIFEST = "manifest.json"


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn the operating system's refusals inside the block into a :class:`FileError` with a cure."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error) from error


def fsync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot; the rename stands all the same
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over it, on failure removed."""
    path = Path(path)
    with os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The ending stays: some writers (safetensors in MLX) choose the format by it.
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a damaged one is a :class:`FileError` that names it."""
    with os_errors():
        raw = Path(path).read_bytes()
    try:
        return json.loads(raw)
    except ValueError as error:
        raise FileError(f"{path}: not valid JSON: {error}", fix="delete the file and run the same command again") from error


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, whole or not at all; return how many."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)``; blank lines are passed over.

    Raises:
        DataError: a line is not UTF-8, not JSON, or not an object: with file and line.
        FileError: the file cannot be opened.
    """
    with os_errors():
        file = open(path, "rb")
    with file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start} of the line)",
                    fix="save the file as UTF-8, for example with: iconv -f latin1 -t utf-8",
                ) from error
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}", fix="one JSON object a line is needed") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a {type(row).__name__}, not an object", fix="one JSON object a line is needed")
            yield number, row


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, read in slabs of 1 MiB."""
    digest = hashlib.sha256()
    with os_errors(), open(path, "rb") as file:
        while slab := file.read(1 << 20):
            digest.update(slab)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, SHA-256 and modification time (ns) of one file of a stage."""

    size: int
    sha256: str
    mtime_ns: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a stage's folder is: made from what, by which settings, and the sums of its files.

    ``key`` decides whether the folder is current; everything under ``recorded`` (times, machine, versions) never does.
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
        """Hash of names and contents: what children are keyed by."""
        return digest({name: entry.sha256 for name, entry in self.files.items() if name not in _UNKEYED})


# Written for people, never read by a later stage.
_UNKEYED = frozenset({"metrics.jsonl", "log.txt", "statistics.json", "timing.json", "README.md"})


def stage_key(stage: str, format: int, config: Mapping[str, Any], parents: Mapping[str, str]) -> str:
    """The stage's key: a hash of what can change its result, and nothing else."""
    return digest({"stage": stage, "format": format, "config": config, "parents": parents})


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a finished stage, or None where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    raw = read_json(path)
    try:
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        return Manifest(files=files, **raw)
    except (TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path}: not a manifest of this version: {error}", fix="delete the folder and run the command again") from error


def check_folder(folder: str | Path, manifest: Manifest, *, verify: bool = False) -> str | None:
    """None when the files stand as the manifest says, else what is wrong.

    Sizes and times decide; a changed time or ``verify`` brings the hash in.
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


def partial_folder(folder: str | Path) -> Path:
    """Where the stage that makes ``folder`` works until it is done."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.partial")


def open_partial(folder: str | Path, key: str) -> Path:
    """The partial folder for ``folder``, empty or as a killed run with the same key left it."""
    recover(folder)
    partial = partial_folder(folder)
    with os_errors():
        note = partial / "key"
        if partial.exists() and not (note.is_file() and note.read_text() == key):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if not note.is_file():
            write_text(note, key)
    return partial


def scratch(partial: Path) -> Path:
    """A folder for checkpoints inside a partial stage; it is not part of the result."""
    path = partial / "scratch"
    with os_errors():
        path.mkdir(exist_ok=True)
    return path


def publish(
    folder: str | Path, stage: str, format: int, config: Mapping[str, Any], parents: Mapping[str, str], recorded: Mapping[str, Any]
) -> Manifest:
    """Hash the partial folder's files, write the manifest, sync, and rename it into place."""
    folder, partial = Path(folder), partial_folder(folder)
    with os_errors():
        shutil.rmtree(partial / "scratch", ignore_errors=True)
        (partial / "key").unlink(missing_ok=True)
        files = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            stat = path.stat()
            files[path.relative_to(partial).as_posix()] = FileEntry(stat.st_size, sha256(path), stat.st_mtime_ns)
        key = stage_key(stage, format, config, parents)
        manifest = Manifest(stage, format, key, config, parents, files, {**recorded, "finished": time.time()})
        write_json(partial / MANIFEST, asdict(manifest))
        _swap(partial, folder)
    return manifest


def _swap(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Finish or undo a rename that a kill cut in two."""
    folder = Path(folder)
    partial, old = partial_folder(folder), folder.with_name(f".{folder.name}.old")
    with os_errors():
        if folder.exists() or not folder.parent.exists():
            if folder.exists() and old.exists():
                shutil.rmtree(old, ignore_errors=True)
        elif (partial / MANIFEST).is_file():
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, folder)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """One run on a folder at a time; the lock goes with the process, so a kill leaves none behind."""
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
                f"{folder}: another run is using this folder (process {owner})", fix="wait for it, or choose another --out"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
