"""The records of the registry: versions and deployments, as the ledger keeps them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.ledger.database import from_json
from mlx_distill.registry.contents import KEPT
from mlx_distill.text import listed

READY, ARCHIVED, FAILED = "READY", "ARCHIVED", "FAILED"
PRODUCTION = "production"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Version:
    """One version of a model.

    Attributes:
        model: The model's name.
        number: From 1; a number is never given twice.
        sha: The hash of all that decides what the model answers.
        path: The model's folder, relative to the root.
        source_run: The run that it comes from, relative to the root, or None.
        state: ``READY``, ``ARCHIVED``, or ``FAILED``: its files are not those that were added.
        created_at: When it was added, in Unix seconds.
        info: What is known of it; see ``version_info.json``.
        aliases: The aliases that name it.
    """

    model: str
    number: int
    sha: str
    path: str
    source_run: str | None
    state: str
    created_at: float
    info: Mapping[str, Any] = field(repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How commands call it: ``music:3``."""
        return f"{self.model}:{self.number}"

    @property
    def files_deleted(self) -> float | None:
        """When its files were deleted, in Unix seconds; None of one that has them."""
        return self.info.get("files_deleted")

    @property
    def kept(self) -> str:
        """The folder of its files, which is laid out like a run; relative to the root."""
        return str(Path(self.path).parent)


@dataclass(frozen=True)
class Deployment:
    """One move of an alias. They are never changed.

    Attributes:
        id: Increasing.
        model, alias: The alias that moved.
        kind: ``deploy`` or ``rollback``.
        previous: The deployment that this one replaced; None of the first one.
        version: The version's number, or None.
        target: An analyzer outside of the registry, ``module:function`` or a URL, or None.
        actor, reason: Who did it and why.
        gate: What was checked: ``passed``, ``checks``, ``override``, ``verified``.
        settings: How it is served: ``context_length`` (tokens), ``memory_limit_gb``.
        created_at: In Unix seconds.
    """

    id: int
    model: str
    alias: str
    kind: str
    previous: int | None
    version: int | None
    target: str | None
    actor: str
    reason: str
    gate: Mapping[str, Any]
    settings: Mapping[str, Any]
    created_at: float

    @property
    def serves(self) -> str:
        """What it put in place: ``music:3``, or the analyzer's target."""
        return f"{self.model}:{self.version}" if self.target is None else self.target

    @property
    def gate_held(self) -> bool:
        """Whether something was asked for and shown to hold, and nothing refused."""
        return bool(self.gate.get("passed") and _passed(self.gate, asked=True))

    @property
    def gate_text(self) -> str:
        """What the gate found. That nobody set a condition is not told as a gate that passed."""
        if self.gate.get("override"):
            return f"the gate was overridden: {self.gate['override']}"
        if not self.gate.get("passed"):
            verified = (self.gate.get("verified") or {}).get("sentence")
            return f"verified: {verified}" if verified else "no gate result"
        if asked := _passed(self.gate, asked=True):
            return f"the gate passed: {listed(asked)}"
        without_effect = [check["name"] for check in self.gate["checks"] if check.get("asked")]
        start = f"{listed(without_effect)} did not apply" if without_effect else "no condition was set"
        if checked := _passed(self.gate, asked=False):
            return f"{start}; passed by default: {listed(checked)}"
        open_states = ("not_measured", "not_applicable")
        measured = any(check["state"] not in open_states for check in self.gate["checks"])
        return f"{start}; nothing was {'decided' if measured else 'checked'}"


def _passed(gate: Mapping[str, Any], *, asked: bool) -> list[str]:
    """The names of the checks that passed and were asked for, or were not."""
    return [
        check["name"]
        for check in gate["checks"]
        if check["state"] == "passed" and bool(check.get("asked")) == asked
    ]


@dataclass(frozen=True)
class Model:
    """A model of the registry.

    Attributes:
        name: Its name.
        description: One line.
        created_at: In Unix seconds.
        versions: Its versions, the newest first.
        aliases: Alias: the version's number, or the target of an analyzer outside of the registry.
    """

    name: str
    description: str
    created_at: float
    versions: tuple[Version, ...]
    aliases: Mapping[str, int | str]


def version_of(row: sqlite3.Row, aliases: tuple[str, ...] = ()) -> Version:
    """A row of the table ``versions``."""
    values = {name: row[name] for name in row.keys() if name != "info"}  # noqa: SIM118 - no mapping
    return Version(**values, info=from_json(row["info"]), aliases=aliases)


def deployment_of(row: sqlite3.Row) -> Deployment:
    """A row of the table ``deployments``."""
    values = {name: row[name] for name in row.keys() if name not in ("gate", "settings")}  # noqa: SIM118
    return Deployment(**values, gate=from_json(row["gate"]), settings=from_json(row["settings"]))


def check_name(name: str, what: str = "model") -> str:
    """A name of a model or an alias.

    Raises:
        ConfigError: it has other characters than letters, digits, ``.``, ``_`` and ``-``.

    >>> check_name("music-v2")
    'music-v2'
    """
    if not _NAME.fullmatch(name) or (what == "alias" and name.isdigit()):
        raise ConfigError(
            f"{what} {name!r}: no name",
            fix="begin with a letter or a digit, and use letters, digits, '.', '_' and '-', at most 64"
            + ("; an alias is not a number" if what == "alias" else ""),
        )
    return name


__all__ = ["KEPT", "Deployment", "Model", "Version", "check_name", "deployment_of", "version_of"]
