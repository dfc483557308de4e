"""Errors for users: what is wrong, where, and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from mlx_distill.text import visible


class DistillError(Exception):
    """Base of the errors that this package raises for users.

    Args:
        message: What is wrong and where, in one line (``"chats.jsonl:17: no assistant turn"``).
        fix: How to fix it, in one line. Shown after the message.

    >>> str(DistillError("x.jsonl: empty", fix="add rows"))
    'x.jsonl: empty (add rows)'
    >>> str(DistillError("x.jsonl:3: not UTF-8 (byte 7)", fix="save it as UTF-8"))
    'x.jsonl:3: not UTF-8 (byte 7): save it as UTF-8'
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        # Half surrogate pairs of a row or a file name can be neither printed nor written, and control
        # characters change what a terminal shows.
        self.message = visible(message.encode(errors="backslashreplace").decode())
        self.fix = fix and visible(fix.encode(errors="backslashreplace").decode())
        if not self.fix:
            text = self.message
        elif self.message.endswith(")"):
            text = f"{self.message}: {self.fix}"
        else:
            text = f"{self.message} ({self.fix})"
        super().__init__(text)


class DataError(DistillError):
    """A row, a file of rows or a split that cannot be used."""


class NotFiniteError(DataError):
    """A training whose loss, gradient or weights became NaN or infinite.

    Args:
        message: What is wrong and where.
        reason: The same without the paths of files.
        fix: How to fix it.
    """

    def __init__(self, message: str, *, reason: str, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.reason = reason


class ModelError(DistillError):
    """A checkpoint, a tokenizer or an adapter that cannot be used."""


class ConfigError(DistillError):
    """A recipe, a task or an option that is wrong: the user's input, so exit code 2."""

    exit_code = 2


class FileError(DistillError):
    """A file or folder that cannot be used: the disk is full, or it is not writable, in use or damaged."""


class QualityGateError(DistillError):
    """A result that is too bad to go on with. The stage that made it is finished and kept.

    Args:
        message: What is wrong and where.
        fix: How to fix it.
        facts: What was measured.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, fix: str | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, fix=fix)
        self.facts = dict(facts or {})


class Interrupted(DistillError):  # noqa: N818 - a user's request, not an error
    """The run was stopped by the user; the work so far is saved, and the same command continues it."""

    exit_code = 130


FULL_DISK = "free some space, then run the same command again: it continues where it stopped"
_FIXES = {
    errno.ENOSPC: FULL_DISK,
    errno.EDQUOT: FULL_DISK,
    errno.EFBIG: "choose a disk that can hold files of this size, or raise the limit (ulimit -f)",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENOENT: "check the path",
    errno.EEXIST: "there is a file where a folder is needed; choose another path",
    errno.ENOTDIR: "there is a file where a folder is needed; choose another path",
    errno.EISDIR: "there is a folder where a file is needed; choose another path",
}


def from_os_error(error: OSError, where: object = None) -> FileError:
    """An error of the operating system as a :class:`FileError` with a fix.

    Args:
        error: The error.
        where: The file, for errors without a file name, such as that of a failed write.
    """
    path = error.filename2 or error.filename or where  # of a rename, the new name
    fix = _FIXES.get(error.errno or 0, "see the message of the operating system")
    return FileError(f"{f'{path}: ' if path else ''}{(error.strerror or str(error)).lower()}", fix=fix)
