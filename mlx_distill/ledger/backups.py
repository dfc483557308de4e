"""Backups of the ledger: whole copies of one state, made while others read and write."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mlx_distill.errors import FileError
from mlx_distill.ledger.migrate import APPLICATION_ID
from mlx_distill.ledger.root import Root
from mlx_distill.storage import atomic_path, os_errors

if TYPE_CHECKING:
    from mlx_distill.ledger.database import Ledger


def backup(ledger: Ledger, path: str | Path | None = None, *, note: str = "") -> Path:
    """Write a copy of the ledger, by ``VACUUM INTO``: one file, of one moment.

    Args:
        ledger: The ledger.
        path: The new file.  [default: by the time, under ``.mlx-distill/backups``]
        note: Part of the default name.

    Returns:
        The file.

    Raises:
        FileError: it exists already, or cannot be written.
    """
    if path is None:
        target = _new_name(ledger.root, f"ledger-{{}}{note and '-'}{note}")
    else:
        target = Path(path).expanduser()
    if target.exists():
        raise FileError(f"{target}: exists already", fix="choose another name")
    with atomic_path(target) as temporary, ledger.connection() as connection:
        connection.execute("VACUUM INTO ?", (str(temporary),))
    return target


def _new_name(root: Root, pattern: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    names = (f"{stamp}{number and f'-{number}' or ''}" for number in itertools.count())
    paths = (root.backups / f"{pattern.format(name)}.db" for name in names)
    return next(path for path in paths if not path.exists())


def newest_backup(root: Root) -> Path | None:
    """The newest backup under a root, or None."""
    with os_errors(root.backups):
        found = [path for path in root.backups.glob("ledger-*.db") if path.is_file()]
        return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)


def restore(root: Root, path: str | Path) -> Path:
    """Put a backup in the place of the ledger, of which a copy is kept.

    No other program may use the ledger meanwhile.

    Args:
        root: The root.
        path: The backup.

    Returns:
        The copy of what was there, or the path that it would have had.

    Raises:
        FileError: it is no ledger, or damaged; the ledger is as it was.
    """
    source = Path(path).expanduser()
    check_file(source)
    replaced = _new_name(root, "replaced-{}")
    with os_errors(root.ledger):
        root.backups.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The log of changes belongs to the old file and would be applied to the new one.
        for suffix in ("-wal", "-shm", ""):
            if (old := Path(f"{root.ledger}{suffix}")).exists():
                os.replace(old, f"{replaced}{suffix}")
        with atomic_path(root.ledger) as temporary:
            shutil.copyfile(source, temporary)
    return replaced


def check_file(path: Path) -> None:
    """Raise unless a file is a whole ledger.

    Raises:
        FileError: it is missing, damaged, or another kind of file.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file", fix="check the path")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as connection:
            kind = connection.execute("PRAGMA application_id").fetchone()[0]
            wrong = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise FileError(f"{path}: damaged ({error})", fix="choose another backup") from error
    if kind != APPLICATION_ID:
        raise FileError(f"{path}: no ledger", fix="choose a backup of a ledger")
    if wrong != "ok":
        raise FileError(f"{path}: damaged ({wrong})", fix="choose another backup")
