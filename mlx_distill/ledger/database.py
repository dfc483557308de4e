"""The ledger: one SQLite file under the root, read and written by several processes at once.

Every write is one ``BEGIN IMMEDIATE`` transaction. A transaction that reads first and asks for the lock with
its first write fails at once where another process has written in between, however long it would wait;
one that asks first waits for its turn.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_distill.errors import FULL_DISK, FileError
from mlx_distill.ledger.backups import backup, newest_backup
from mlx_distill.ledger.migrate import (
    MIGRATIONS,
    Migration,
    apply,
    check_version,
    one_at_a_time,
    read_migrations,
)
from mlx_distill.ledger.places import refuse_cloud
from mlx_distill.ledger.root import Root
from mlx_distill.storage import os_errors, write_text

WAIT_S = 30.0
"""How long an operation waits for other writers."""
_OLDEST_SQLITE = (3, 37, 0)  # STRICT tables
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Ledger:
    """The ledger of a root. It holds no connection: each operation opens its own, which costs about as much
    as a write to the disk, so it can be shared by threads and survives a fork.

    Args:
        root: The root; its ``.mlx-distill`` folder is made where it is missing.
        create: Make the file where there is none; else that is an error.
        migrations: The folder of the migrations.

    Raises:
        FileError: the file is damaged, newer than this program, or no ledger; the folder cannot be written
            or is synchronized by a cloud service; the disk is full.

    >>> import tempfile
    >>> ledger = Ledger(Root.at(tempfile.mkdtemp()))
    >>> with ledger.write() as db:
    ...     _ = db.execute("INSERT INTO models (name, created_at) VALUES ('music', 0.0)")
    >>> with ledger.read() as db:
    ...     db.execute("SELECT name, description FROM models").fetchone()["name"]
    'music'
    """

    def __init__(self, root: Root, *, create: bool = True, migrations: Path = MIGRATIONS) -> None:
        self.root = root
        self.path = root.ledger
        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            raise FileError(
                f"SQLite {sqlite3.sqlite_version}: the ledger needs 3.37 or newer",
                fix="use a Python that is built with it, such as that of python.org or uv",
            )
        refuse_cloud(root.state)
        steps = read_migrations(migrations)
        if not self.path.is_file() or not self.path.stat().st_size:
            self._check_absent(create)
        elif self._present(len(steps)) == len(steps):
            return
        self._migrate(steps)

    def _check_absent(self, create: bool) -> None:
        if not create:
            raise FileError(
                f"{self.root.path}: no ledger here ({self.path.relative_to(self.root.path)})",
                fix="name the folder that you work in with --root; jobs submit, registry add and data add "
                "make one",
            )
        kept = newest_backup(self.root)
        if kept is not None:  # an empty ledger in place of a lost one would look as if nothing had happened
            raise FileError(
                f"{self.path}: missing or empty, but there are backups of it",
                fix=f"restore it: mlx-distill ledger restore {kept}; or move the backups away",
            )

    def _present(self, newest: int) -> int:
        with self.connection() as connection:
            return check_version(connection, self.path, newest)

    def _migrate(self, steps: list[Migration]) -> None:
        with one_at_a_time(self.root.state), sqlite_errors(self.path, self.root):
            _ignore_in_git(self.root.state)
            with self.connection(create=True) as connection:
                present = check_version(connection, self.path, len(steps))
                if 0 < present < len(steps):
                    backup(self, note=f"before-version-{len(steps)}")
                _use_wal(connection)
                apply(connection, self.path, steps)

    @contextmanager
    def connection(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection outside of any transaction, for backups and checks."""
        with sqlite_errors(self.path, self.root):
            uri = f"file:{quote(str(self.path))}?mode={'rwc' if create else 'rw'}"
            connection = sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA foreign_keys = ON")
                # In WAL mode NORMAL would lose the last commits in a power cut. What is written here is rare
                # and cannot be made again, such as a deployment.
                connection.execute("PRAGMA synchronous = FULL")
                if sys.platform == "darwin":  # where fsync leaves the data in the disk's own cache
                    connection.execute("PRAGMA fullfsync = ON")
                yield connection
            finally:
                connection.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot write and sees one state of the ledger, whatever others write meanwhile;
        rows are :class:`sqlite3.Row`.
        """
        with self.connection() as connection:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction of its own, which is committed at the end of the block, or rolled
        back on any exception. It waits up to :data:`WAIT_S` for other writers, and they wait for it: keep it
        short.

        Raises:
            FileError: others write all the time, or the disk is full or refuses; nothing was changed.
            sqlite3.IntegrityError: a row that the tables do not allow.
        """
        with self.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


@contextmanager
def sqlite_errors(path: Path, root: Root) -> Iterator[None]:
    """Turn the errors of SQLite that a user can mend into a :class:`FileError` with a fix."""
    try:
        with os_errors(path):
            yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        message, fix = _explain(error, root)
        raise FileError(f"{path}: {message}", fix=fix) from error


def _explain(error: sqlite3.DatabaseError, root: Root) -> tuple[str, str]:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # a mistake in the program, such as a cursor of a closed connection
        raise error
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return "the disk is full; nothing that was committed is lost", FULL_DISK
    if primary == sqlite3.SQLITE_IOERR:
        return f"{error}; nothing that was committed is lost", "free some space, and check the disk"
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return "cannot be written", "change the permissions of its folder, or choose another --root"
    if primary == sqlite3.SQLITE_CANTOPEN:
        return "cannot be opened", "check the permissions of its folder, or choose another --root"
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"locked by another program for {WAIT_S:g} s", "close the program that has it open"
    if primary in _DAMAGED:
        kept = newest_backup(root)
        restore = f"mlx-distill ledger restore {kept}" if kept else "sqlite3 FILE .recover > ledger.sql"
        return f"damaged ({error})", f"keep a copy of the file, then restore a backup: {restore}"
    raise error


def _use_wal(connection: sqlite3.Connection) -> None:
    """Let readers and a writer work at once. The mode stays with the file."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The change needs the file for itself, and does not wait for it as other statements do.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)


def _ignore_in_git(state: Path) -> None:
    # The folder lies among somebody's own files and has a token in it.
    if not (state / ".gitignore").exists():
        write_text(state / ".gitignore", "*\n")


def new_id(kind: str) -> str:
    """A new identifier: the kind and 12 random hexadecimal digits.

    >>> len(new_id("job"))
    16
    """
    return f"{kind}-{secrets.token_hex(6)}"


def to_json(value: Any) -> str:
    """A value as compact JSON text for a column.

    >>> to_json({"b": [1, None], "a": "é"})
    '{"b":[1,null],"a":"é"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which SQLite cannot hold
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def from_json(text: str | None) -> Any:
    """The value of a column of JSON, None of an empty one."""
    return None if text is None else json.loads(text)
