"""Numbered SQL files that bring a ledger to the newest version of its tables, one transaction for all."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.errors import FileError
from mlx_distill.storage import os_errors

APPLICATION_ID = 0x4D4C5844
"""Marks a SQLite file as a ledger ("MLXD")."""
MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True)
class Migration:
    """One numbered file: its number is the version that the ledger has afterwards."""

    number: int
    name: str
    sql: str


def read_migrations(folder: Path = MIGRATIONS) -> list[Migration]:
    """The migrations of a folder, ``NNNN_name.sql``, numbered 1, 2, ... without a gap."""
    found = [
        Migration(int(path.stem[:4]), path.stem[5:], path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    ]
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise FileError(
            f"{folder}: the migrations are not numbered 1, 2, ...", fix="install the package again"
        )
    return found


def version(connection: sqlite3.Connection) -> int:
    """The version of a ledger's tables: the number of its last migration, 0 of an empty file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def check_version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    """The version of a ledger that this program can use, or migrate.

    Raises:
        FileError: another kind of database, or a version that is newer than this program.
    """
    present = version(connection)
    kind = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if kind != APPLICATION_ID and (kind or present or tables):
        raise FileError(f"{path}: a database, but no ledger", fix="move it away, or choose another --root")
    if present > newest:
        raise FileError(
            f"{path}: version {present} of the ledger, and this program knows versions up to {newest}",
            fix="upgrade the program: pip install --upgrade mlx-distill",
        )
    return present


def apply(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration]) -> tuple[int, int]:
    """Apply the migrations that a ledger lacks, all or none; return the versions before and after.

    The version is read again inside the transaction: another process may have migrated in the meantime.
    """
    newest = len(migrations)
    connection.execute("PRAGMA foreign_keys = OFF")  # tables may be made anew; checked below
    connection.execute("BEGIN IMMEDIATE")
    try:
        present = check_version(connection, path, newest)
        for migration in migrations[present:]:
            for statement in _statements(migration.sql):
                connection.execute(statement)
        if present < newest:
            wrong = connection.execute("PRAGMA foreign_key_check").fetchone()
            if wrong is not None:
                raise sqlite3.IntegrityError(f"row {wrong[1]} of {wrong[0]} refers to no row of {wrong[2]}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {newest}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return present, newest


def _statements(sql: str) -> Iterator[str]:
    # executescript() would commit the transaction that all migrations share.
    statement = ""
    for line in sql.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if any(line.strip() and not line.lstrip().startswith("--") for line in statement.splitlines()):
        raise sqlite3.OperationalError(f"incomplete statement at the end of a migration: {statement[:80]!r}")


@contextmanager
def one_at_a_time(state: Path) -> Iterator[None]:
    """Let one process migrate at a time, so that one of them makes the backup.

    Where the file system has no locks, all do, which costs time and nothing else.
    """
    with os_errors(state):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open(state / ".migrate.lock", "a", encoding="utf-8")
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
