"""Files that are whole or absent: atomic writes, JSON and JSONL, hashes."""

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


@contextmanager
def os_errors(where: str | Path | None = None) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into a :class:`FileError` with a cure.

    ``where`` is named if the system names no file: it does when one cannot be opened, and not when a write
    fails.
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
    except OSError as error:  # some network file systems cannot; the rename stands all the same
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over it, on failure
    removed.
    """
    path = Path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The ending stays: some writers (safetensors in MLX) choose the format by it.
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
    # What mlx and safetensors raise where the disk refuses: neither is an OSError, and neither has a number
    # that says why.
    return isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"


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
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: not valid JSON: {error}", fix="delete the file and run the same command again"
        ) from error


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
            # Windows puts a mark before the first line, of an empty file too.
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode())
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start} of the line)",
                    fix="save the file as UTF-8, for example with: iconv -f latin1 -t utf-8",
                ) from error
            except (ValueError, RecursionError) as error:
                reason = (
                    f"{error.msg.removesuffix(' at')} at column {error.pos + 1}"
                    if isinstance(error, json.JSONDecodeError)
                    else error
                )
                raise DataError(
                    f"{path}:{number}: not JSON: {reason}", fix="one JSON object a line is needed"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{number}: a {type(row).__name__}, not an object",
                    fix="one JSON object a line is needed",
                )
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


def remove_leftovers(folder: str | Path, *, below: bool = False) -> None:
    """Remove the temporary files of writers that were killed from ``folder``, with ``below`` from all that is
    under it.

    Only for who alone writes there: the temporary files of a living writer look the same.
    """
    with os_errors():
        for path in list(Path(folder).rglob(".*") if below else Path(folder).glob(".*")):
            if _TEMPORARY.match(path.name) and path.is_file():
                path.unlink(missing_ok=True)


# What atomic_path and the shard writer call a file until it is whole.
_TEMPORARY = re.compile(r"\..+\.tmp(\.[^.]*)?$")


_SMALL = 64 << 20


def fingerprint(source: str) -> str:
    """What an input from outside is, without its path: of a file its bytes; of a folder its files' names,
    sizes and the bytes of small ones (large ones give their first MiB, where a checkpoint's shards have their
    table); of a Hub id its name.
    """
    path = Path(source)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return digest([[p.relative_to(path).as_posix(), p.stat().st_size, _content(p)] for p in files])
    return digest(source)


def _content(path: Path) -> str:
    if path.stat().st_size <= _SMALL:
        return sha256(path)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(1 << 20)).hexdigest()
