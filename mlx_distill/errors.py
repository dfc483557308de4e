"""Errors that a person can act on: what is wrong, where, and the cure."""

from __future__ import annotations

import errno


class DistillError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: What is wrong and where, in one line (``"chats.jsonl:17: no assistant turn"``).
        fix: The cure, in one line. Shown after the message.

    >>> str(DistillError("x.jsonl: empty", fix="add rows"))
    'x.jsonl: empty (add rows)'
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message} ({fix})" if fix else message)


class DataError(DistillError):
    """A row, a file of rows or a split that cannot be used."""


class ModelError(DistillError):
    """A checkpoint, a tokenizer or an adapter that cannot be used."""


class ConfigError(DistillError):
    """A recipe, a task or an option that makes no sense. The user's input, so exit code 2."""

    exit_code = 2


class FileError(DistillError):
    """The disk said no: full, not writable, in use, damaged."""


class Interrupted(DistillError):  # noqa: N818 - not an error, a wish
    """The user pressed Ctrl-C; the work so far is saved and the same command goes on."""

    exit_code = 130


FULL_DISK = "free some space, then run the same command again: it goes on where it stopped"
_CURES = {
    errno.ENOSPC: FULL_DISK,
    errno.EDQUOT: FULL_DISK,
    errno.EFBIG: "choose a disk that takes files of this size, or raise the limit (ulimit -f)",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENOENT: "check the path",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
}


def from_os_error(error: OSError, where: object = None) -> FileError:
    """The same failure with the file's name (``where``, if the system gives none, as after a failed write)
    and a cure.
    """
    place = error.filename2 or error.filename or where  # of a rename, the name that it should get
    fix = _CURES.get(error.errno or 0, "see the message of the operating system")
    return FileError(f"{f'{place}: ' if place else ''}{(error.strerror or str(error)).lower()}", fix=fix)
