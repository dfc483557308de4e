"""The server's token, and the cookie of a browser that has shown it once."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from mlx_distill.errors import ConfigError
from mlx_distill.ledger.root import Root
from mlx_distill.storage.atomic import os_errors

ENVIRONMENT = "MLX_DISTILL_TOKEN"
_SHORTEST = 16
_SECONDS = 1.0  # between two looks at the token's file


class Tokens:
    """The token of a server: fixed, or that of the root's file, which may be replaced while the server runs.

    Args:
        root: Whose file it is; its path names the cookie, since browsers do not tell ports apart.
        token: A fixed token; None reads the file.
    """

    def __init__(self, root: Root, token: str | None = None) -> None:
        self._path = None if token is not None else root.token
        self._token = token if token is not None else read_token(root.token)
        self._looked = time.monotonic()
        self.cookie = f"mlx-distill-{hashlib.sha256(str(root.path).encode()).hexdigest()[:8]}"

    @property
    def value(self) -> str:
        """The token that is valid now."""
        if self._path is not None and time.monotonic() - self._looked > _SECONDS:
            self._looked = time.monotonic()
            self._token = read_token(self._path)
        return self._token

    @property
    def session(self) -> str:
        """The value of the cookie: it follows from the token and does not give it away."""
        return hmac.new(self.value.encode(), b"mlx-distill session", hashlib.sha256).hexdigest()

    def is_token(self, value: str) -> bool:
        """Whether a value is the token, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(value.encode(), self.value.encode())

    def is_session(self, value: str) -> bool:
        """Whether a value is that of the cookie."""
        return hmac.compare_digest(value.encode(), self.session.encode())


def find_token(root: Root, token: str | None = None) -> tuple[str | None, bool]:
    """The token that was given, else that of the environment; None where the file has it.

    Args:
        root: Whose file is made where there is no other token.
        token: Given by the caller.

    Returns:
        The token or None, and whether the file was made now.

    Raises:
        ConfigError: a token that is too short or has characters that a header cannot hold.
    """
    if token is None:
        token = os.environ.get(ENVIRONMENT, "").strip() or None
    if token is not None:
        return check_token(token), False
    if root.token.exists():
        read_token(root.token)
        return None, False
    new_token(root)
    return None, True


def check_token(token: str) -> str:
    """A token that can be used, unchanged."""
    if len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the token has {len(token)} characters, or some that a header cannot hold",
            fix=f"give {_SHORTEST} or more letters and digits, or leave {ENVIRONMENT} out: one is made",
        )
    return token


def new_token(root: Root) -> str:
    """Make a token, which replaces the one in the root's file at once."""
    token = secrets.token_urlsafe(32)
    with os_errors(root.token):
        root.state.mkdir(parents=True, exist_ok=True)
        temporary = root.token.with_name(f".token.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, root.token)
    return token


def read_token(path: Path) -> str:
    """The token in a file that nobody else may read.

    Raises:
        ConfigError: others may read it, or it holds no token.
    """
    with os_errors(path):
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(
                f"{path}: other users may read it",
                fix="make another token: mlx-distill serve --new-token",
            )
        return check_token(path.read_text(encoding="utf-8").strip())
