"""Atomic writes of files, JSON and JSONL, hashes."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.errors import FULL_DISK, DataError, FileError, from_os_error
from mlx_distill.text import not_an_object


@contextmanager
def os_errors(where: str | Path | None = None) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a :class:`FileError` with a fix.

    ``where`` is named in the message where the error names no file: that of a failed write does not, that of
    a failed open does.
    """
    try:
        yield
    except OSError as error:
        raise from_os_error(error, where) from error


def fsync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot; the rename is done all the same
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over it, on failure
    removed.

    A link is followed: the file that it names is replaced. What is not a regular file (a FIFO, a device) is
    never replaced: it is written to directly, so ``path`` itself is yielded.
    """
    path = Path(path)
    with os_errors(path):
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file() and not path.is_dir():
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept: some writers (safetensors in MLX) choose the format by it.
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except Exception as error:
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename = str(path)
            if _from_array_writer(error):
                raise FileError(f"{path}: cannot be written: {error}", fix=FULL_DISK) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _from_array_writer(error: Exception) -> bool:
    # The errors of mlx and safetensors for a failed write: neither is an OSError, and neither has an errno.
    return isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, fix: str = "delete the file and run the same command again") -> Any:
    """Read a JSON file; invalid JSON is a :class:`FileError` that names the file and has this fix."""
    with os_errors():
        raw = Path(path).read_bytes()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not valid JSON: {error}", fix=fix) from error


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, atomically; return how many."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)``; blank lines are skipped.

    Raises:
        DataError: a line is not UTF-8, not JSON, or not an object: with file and line.
        FileError: the file cannot be opened.
    """
    with os_errors():
        file = open(path, "rb")
    with file:
        yield from parse_jsonl(file, path)


def parse_jsonl(lines: Iterable[bytes], name: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Like :func:`read_jsonl` for lines that are read already; ``name`` is what messages call their file."""
    for number, raw in enumerate(lines, 1):
        row = parse_line(raw, name, number)
        if row is not None:
            yield number, row


class RepeatedKeyError(ValueError):
    """A JSON object in which a key occurs twice: readers differ in which value they take."""

    fix = "keep one of the two"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` of a strict JSON reader.

    Raises:
        RepeatedKeyError: a key occurs twice.
    """
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {repeated!r} occurs twice")
    return out


def parse_line(raw: bytes, name: str | Path, number: int) -> dict[str, Any] | None:
    """The object in one line of JSONL, or None of a blank line.

    Args:
        raw: The line.
        name: What messages call its file.
        number: Of the line, from 1.

    Raises:
        DataError: the line is not UTF-8, not JSON, or not an object, or a key occurs in it twice.
    """
    # Editors on Windows write a byte-order mark before the first line, of an empty file too.
    raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
    if not raw.strip():
        return None
    try:
        row = json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}:{number}: not UTF-8 (byte {error.start} of the line)",
            fix="save the file as UTF-8, for example with: iconv -f latin1 -t utf-8",
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            error_text = f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}"
        elif isinstance(error, RepeatedKeyError):
            raise DataError(f"{name}:{number}: {error}", fix=error.fix) from error
        else:
            error_text = f"not JSON: {error}"
        raise DataError(f"{name}:{number}: {error_text}", fix="one JSON object a line is needed") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{name}:{number}: {not_an_object(row)}",
            fix="one JSON object a line is needed",
        )
    return row


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes as hex, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with os_errors(), open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value as hex, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def remove_leftovers(folder: str | Path, *, below: bool = False) -> None:
    """Remove the temporary files of killed writers from ``folder``, with ``below`` from its subfolders too.

    Nothing else may be writing there: the temporary files of a running writer have the same names.
    """
    with os_errors():
        for path in list(Path(folder).rglob(".*") if below else Path(folder).glob(".*")):
            if _TEMPORARY.match(path.name) and path.is_file():
                path.unlink(missing_ok=True)


# The names that atomic_path and the shard writer give to unfinished files.
_TEMPORARY = re.compile(r"\..+\.tmp(\.[^.]*)?$")


def fingerprint(source: str, hashed_whole: int = 64 << 20) -> str:
    """A hash of an input from outside the run, independent of its path: of a file's bytes; of a folder's file
    names, sizes and contents; of the name of a Hub id.

    Args:
        source: A file, a folder or a Hub id.
        hashed_whole: Weights in a folder with more bytes than this give only their first MiB, where the
            shards of a checkpoint have their header. All other files, such as rows, are hashed whole.
    """
    path = Path(source)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return digest(
            [[p.relative_to(path).as_posix(), p.stat().st_size, _content(p, hashed_whole)] for p in files]
        )
    return digest(source)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack", ".onnx")


def _content(path: Path, hashed_whole: int) -> str:
    if path.stat().st_size <= hashed_whole or path.suffix not in _WEIGHTS:
        return sha256(path)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(1 << 20)).hexdigest()
