"""Rows of a SQLite database: those of one query, read without changing the file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_distill.data.json_values import typed_number, typed_text
from mlx_distill.data.layouts import listed
from mlx_distill.data.tables import Fields, check_names
from mlx_distill.errors import DataError

_NAMES = (
    "SELECT name FROM sqlite_master "
    "WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER BY name"
)
_COPY = "read a copy: sqlite3 FILE '.backup copy.db'"
_CHANGES = (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH)


def query_rows(path: Path, spec: str, query: str, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` of the rows that a query selects, one at a time.

    The database is opened read-only. SQLite has neither truth values nor lists: a column that the answer has
    as one of these is read from 0 and 1 or from JSON text.

    Args:
        path: The database, which may be in use by other programs.
        spec: What messages call it.
        query: A SELECT over its tables.
        fields: The schema of the field that each column is for.

    Raises:
        DataError: no database, one that is locked or damaged, or a query that is wrong or selects nothing.
    """
    number = 0
    try:
        with closing(_connect(path)) as database:
            cursor = database.execute(query)
            if cursor.description is None:
                raise DataError(f"{spec}: the query selects no rows", fix="write query: SELECT ... FROM ...")
            names = [column[0] for column in cursor.description]
            check_names(names, f"{spec}: the query", fix="give one of them another name: SELECT a.id AS a_id")
            for number, values in enumerate(cursor, 1):
                row = dict(zip(names, values, strict=True))
                yield f"{spec}:{number}", {name: _typed(name, value, fields) for name, value in row.items()}
    except (sqlite3.Error, UnicodeDecodeError) as error:  # of a damaged name of a column
        raise _error(error, path, spec, number) from error


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=10)
    # Another database would not be part of the stage's key.
    database.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_DENY if action in _CHANGES else sqlite3.SQLITE_OK
    )
    return database


def _typed(name: str, value: Any, fields: Fields) -> Any:
    if name not in fields or value is None:
        return value
    schema, required = fields[name]
    if isinstance(value, str):
        return typed_text(value, schema, required=required)
    return typed_number(value, schema)


def _error(error: Exception, path: Path, spec: str, number: int) -> DataError:
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, sqlite3.OperationalError) and ("locked" in reason or "busy" in reason):
        return DataError(
            f"{spec}: {reason}: another program is writing to it",
            fix=f"close that program, or {_COPY}",
        )
    if "not a database" in reason or "malformed" in reason or "encrypted" in reason:
        fix = "name a SQLite file; this one may be damaged, encrypted or of another kind"
        return DataError(f"{spec}: {reason}", fix=fix)
    if "unable to open" in reason or "readonly" in reason:
        return DataError(
            f"{spec}: {reason}",
            fix="a program may have left changes in a -journal or -wal file beside it: open and close it "
            f"with that program, or {_COPY}",
        )
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{spec}: the name of a column is not UTF-8", fix="name a SQLite file that is whole")
    if "decode" in reason:
        return DataError(f"{spec}:{number + 1}: {reason}", fix="mend it, or leave the column out of query")
    if "not authorized" in reason:
        return DataError(f"{spec}: the query attaches another database", fix="make one database of both")
    return DataError(f"{spec}: the query fails: {reason}", fix=f"correct query; {_tables(path)}")


def _tables(path: Path) -> str:
    """The tables of a database with their columns."""
    described = []
    with suppress(sqlite3.Error, UnicodeDecodeError), closing(_connect(path)) as database:
        names = [name for (name,) in database.execute(_NAMES)]
        for name in names:
            columns = database.execute("SELECT name FROM pragma_table_info(?)", (name,))
            described.append(f"{name} ({listed((column for (column,) in columns), 8)})")
    return f"its tables: {listed(described, 6) or 'none'}"


def check_query(path: Path, spec: str, query: str | None) -> str:
    """The query of a source, which must have one, and a file for it."""
    if path.is_dir():
        raise DataError(f"{spec}: a folder, not a database", fix="name the SQLite file")
    if not query or not query.strip():
        raise DataError(
            f"{spec}: a database without query",
            fix=f"write query: SELECT ... FROM ... in the source; {_tables(path)}",
        )
    return query


def write_ahead_log(path: Path) -> Path | None:
    """The file beside a database that holds changes which are not in the database's own file yet."""
    log = path.with_name(path.name + "-wal")
    return log if log.exists() and log.stat().st_size else None
