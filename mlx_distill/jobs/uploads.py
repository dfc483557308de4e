"""Uploaded files: their bytes under random names in the root's uploads, their facts in the ledger."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlx_distill.errors import DataError
from mlx_distill.ledger.database import Ledger, new_id
from mlx_distill.storage import os_errors
from mlx_distill.text import visible

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data")
"""What a file can be uploaded for; only ``fine-tune`` is used by anything here."""
_CHUNK = 1 << 20
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        id: Its identifier, ``file-`` and 12 hexadecimal digits.
        filename: What its sender called it: shown, and never a path.
        purpose: One of :data:`PURPOSES`.
        bytes: Its size.
        sha256: The hash of its content.
        path: Where it is, relative to the root.
        created_at: When it was uploaded, in Unix seconds.
        expires_at: When it is deleted, or None.
        status: ``uploaded``, ``processed`` or ``error``.
        deleted_at: When it was deleted, or None.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    path: str
    created_at: float
    expires_at: float | None
    status: str
    deleted_at: float | None


def add_upload(
    ledger: Ledger, file: BinaryIO, filename: str, purpose: str, expires_seconds: int | None = None
) -> Upload:
    """Copy a stream into the root's uploads, whole or not at all, and write it down.

    Args:
        ledger: The ledger.
        file: The stream.
        filename: What its sender calls it.
        purpose: One of :data:`PURPOSES`.
        expires_seconds: Seconds after which it is deleted.

    Raises:
        DataError: it is empty.
    """
    root = ledger.root
    with os_errors(root.uploads):
        root.uploads.mkdir(parents=True, exist_ok=True)
        target = root.uploads / secrets.token_hex(16)
        partial = target.with_suffix(".partial")
        digest, size = hashlib.sha256(), 0
        try:
            with open(partial, "xb") as out:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    size += out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            if not size:
                raise DataError("the file is empty", fix="upload a file with rows")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    now = time.time()
    upload = Upload(
        new_id("file"),
        _shown_name(filename),
        purpose,
        size,
        digest.hexdigest(),
        root.relative(target),
        now,
        None if expires_seconds is None else now + expires_seconds,
        "processed",
        None,
    )
    try:
        with ledger.write() as db:
            row = vars(upload)
            names = ", ".join(row)
            db.execute(f"INSERT INTO files ({names}) VALUES ({', '.join(f':{name}' for name in row)})", row)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return upload


def _shown_name(filename: str) -> str:
    """The last part of a name, without control characters.

    >>> _shown_name("../../etc/passwd"), _shown_name("..")
    ('passwd', 'file')
    """
    name = visible(filename.encode(errors="backslashreplace").decode()).replace("\\", "/")
    name = name.rpartition("/")[2].strip()[-_LONGEST_NAME:]
    return name if name.strip(".") else "file"


def get_upload(ledger: Ledger, id: str) -> Upload | None:
    """The file of this identifier; None where there is none, or it was deleted or has expired."""
    remove_expired(ledger)
    with ledger.read() as db:
        row = db.execute("SELECT * FROM files WHERE id = ? AND deleted_at IS NULL", (id,)).fetchone()
    return None if row is None else _upload(row)


def list_uploads(
    ledger: Ledger,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 10_000,
    *,
    newest_first: bool = True,
) -> list[Upload]:
    """The files that are there.

    Args:
        ledger: The ledger.
        purpose: Only those with this purpose.
        after: Only those behind the file of this identifier in the order.
        limit: So many at most.
        newest_first: The order.
    """
    remove_expired(ledger)
    conditions, values = ["deleted_at IS NULL"], list[object]()
    if purpose is not None:
        conditions.append("purpose = ?")
        values.append(purpose)
    sign, order = ("<", "DESC") if newest_first else (">", "ASC")
    if after is not None:
        conditions.append(f"rowid {sign} (SELECT rowid FROM files WHERE id = ?)")
        values.append(after)
    query = f"SELECT * FROM files WHERE {' AND '.join(conditions)} ORDER BY rowid {order} LIMIT ?"
    with ledger.read() as db:
        return [_upload(row) for row in db.execute(query, [*values, limit])]


def delete_upload(ledger: Ledger, id: str) -> bool:
    """Delete a file. Jobs that were started with it keep their own copy.

    Returns:
        Whether there was such a file.
    """
    upload = get_upload(ledger, id)
    if upload is None:
        return False
    _delete(ledger, [upload])
    return True


def remove_expired(ledger: Ledger) -> None:
    """Delete the files whose time is over."""
    with ledger.read() as db:
        rows = db.execute(
            "SELECT * FROM files WHERE deleted_at IS NULL AND expires_at <= ?", (time.time(),)
        ).fetchall()
    if rows:
        _delete(ledger, [_upload(row) for row in rows])


def _delete(ledger: Ledger, uploads: Sequence[Upload]) -> None:
    with ledger.write() as db:
        for upload in uploads:
            db.execute("UPDATE files SET deleted_at = ? WHERE id = ?", (time.time(), upload.id))
    for upload in uploads:
        with suppress(OSError):
            upload_path(ledger, upload).unlink(missing_ok=True)


def upload_path(ledger: Ledger, upload: Upload) -> Path:
    """Where the bytes of a file are."""
    return ledger.root.inside(upload.path)


def _upload(row: sqlite3.Row) -> Upload:
    return Upload(**dict(row))
