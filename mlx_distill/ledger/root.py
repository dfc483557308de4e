"""The folder that a ledger, its runs and its models are kept under."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_distill.errors import ConfigError
from mlx_distill.text import visible

STATE = ".mlx-distill"


@dataclass(frozen=True)
class Root:
    """The folder in which somebody works: runs and models lie anywhere under it, our own files under
    ``.mlx-distill``.

    Attributes:
        path: The folder, absolute and without links.
    """

    path: Path

    @classmethod
    def at(cls, path: str | Path = ".") -> Root:
        """The root at a path, which need not exist yet."""
        return cls(Path(path).expanduser().resolve())

    @property
    def state(self) -> Path:
        """The folder of our own files."""
        return self.path / STATE

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.state / "ledger.db"

    @property
    def token(self) -> Path:
        """The file of the server's token."""
        return self.state / "token"

    @property
    def request_log(self) -> Path:
        """The newest file of the server's log of requests."""
        return self.state / "requests.jsonl"

    @property
    def uploads(self) -> Path:
        """The folder of uploaded files."""
        return self.state / "uploads"

    @property
    def backups(self) -> Path:
        """The folder of the ledger's backups."""
        return self.state / "backups"

    @property
    def jobs(self) -> Path:
        """The folder that has one folder a job: its recipe and what it printed."""
        return self.state / "jobs"

    @property
    def runs(self) -> Path:
        """The folder of the runs that jobs make."""
        return self.path / "runs"

    def inside(self, path: str | Path) -> Path:
        """The absolute form of a path under the root, which links do not leave either.

        Raises:
            ConfigError: it is not under the root, or is no path.
        """
        try:
            resolved = (self.path / path).resolve()
            resolved.exists()  # a name that is too long, or a character that no path has
        except (ValueError, OSError, RuntimeError) as error:
            shown = visible(str(path))
            raise ConfigError(f"{shown[:100]}: no path: {error}", fix="name a path under the root") from error
        if not resolved.is_relative_to(self.path):
            raise ConfigError(f"{path}: not under the root {self.path}", fix="name a path under the root")
        return resolved

    def relative(self, path: str | Path) -> str:
        """A path under the root as it is kept in the ledger: relative to the root, with slashes.

        Raises:
            ConfigError: it is not under the root.
        """
        return self.inside(path).relative_to(self.path).as_posix()
