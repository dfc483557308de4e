"""Which version serves: promote, roll back, history.

What serves changes in one transaction, and only after everything was checked: a process that is killed before
leaves what served.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mlx_distill.config import to_mapping
from mlx_distill.errors import ConfigError, FileError, ModelError, QualityGateError
from mlx_distill.ledger.database import Ledger, to_json
from mlx_distill.registry.external import check_target, verify_external
from mlx_distill.registry.gates import Gate, GateLimits, judge
from mlx_distill.registry.records import (
    ARCHIVED,
    FAILED,
    PRODUCTION,
    READY,
    Deployment,
    Version,
    check_name,
    deployment_of,
)
from mlx_distill.registry.verify import Verification, require_verified, verify_version
from mlx_distill.registry.versions import get_version
from mlx_distill.tasks.task import Task, parse_task

Verifying = Callable[[Version], AbstractContextManager[object]]
"""Is held while a version is loaded and asked its golden rows: the accelerator's lease, room in memory."""
_ATTEMPTS = 20  # at a deployment, where others come between the check and the move


def promote(
    ledger: Ledger,
    model: str,
    version: int,
    alias: str = PRODUCTION,
    *,
    actor: str,
    reason: str,
    override: str | None = None,
    settings: Mapping[str, Any] | None = None,
    limits: GateLimits | None = None,
    verifying: Verifying = nullcontext,
) -> Deployment:
    """Let an alias serve a version: judge the gates, verify the version, then move the alias.

    Args:
        ledger: The ledger.
        model: The model's name.
        version: The version's number.
        alias: ``production``, ``staging``, or another name.
        actor: Who does it.
        reason: Why.
        override: Why it is done although a gate refuses; kept. It overrides gates alone: damaged files are
            never served.
        settings: How it is served: ``context_length`` (tokens) and ``memory_limit_gb``; those of what served
            before where None.
        limits: What the gates ask for.
        verifying: Is held while the version is loaded.

    Raises:
        QualityGateError: a gate refuses; ``facts["gate"]`` has all checks.
        ModelError: no such version, it is not ready, or it is not what was added.
        ConfigError: no actor, no reason, or wrong settings.
    """
    _check_words(actor, reason, override)
    check_name(alias, "alias")
    chosen, checked = get_version(ledger, model, version), _settings(settings)
    _require_servable(chosen)
    verification: Verification | None = None
    for _ in range(_ATTEMPTS):
        current = current_deployment(ledger, model, alias)
        gate = judge(ledger, chosen, current, limits or GateLimits())
        if not gate.passed and override is None:
            _refuse(chosen, gate)
        if verification is None:
            with verifying(chosen):
                verification = verify_version(ledger, chosen)
            require_verified(chosen, verification)
        facts = {**gate.to_dict(), "override": override if not gate.passed else None}
        facts["verified"] = verification.to_dict()
        values = {"kind": "deploy", "version": version, "actor": actor, "reason": reason}
        kept = dict(current.settings) if checked is None and current is not None else checked or {}
        done = _move(ledger, model, alias, current, {**values, "gate": facts, "settings": kept})
        if done is not None:
            return done
    raise FileError(f"{model}@{alias}: others deploy all the time", fix="try again")


def promote_external(
    ledger: Ledger,
    model: str,
    target: str,
    alias: str = PRODUCTION,
    *,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    actor: str,
    reason: str,
    settings: Mapping[str, Any] | None = None,
) -> Deployment:
    """Let an alias point to an analyzer outside of the registry, such as the system that is to be replaced.

    A rollback reaches it then. It is asked the rows first, now and at each rollback to it. No gate is judged.

    Never call it with a target that came over HTTP: it imports a module or connects to an address.

    Args:
        ledger: The ledger.
        model: The model's name; it need not have a version yet.
        target: ``module:function`` or a URL; see :func:`mlx_distill.registry.external.call_external`.
        alias: As for :func:`promote`.
        task: Its answers have to fit.
        rows: A few, with the fields of the task.
        actor: Who does it.
        reason: Why.
        settings: As for :func:`promote`.

    Raises:
        ModelError: it does not answer, or an answer does not fit.
        ConfigError: the target is none, or no actor, no reason.
    """
    _check_words(actor, reason, None)
    check_name(model)
    check_name(alias, "alias")
    checked = _settings(settings) or {}
    verified = verify_external(check_target(target), rows, task)
    asked = {"task": to_mapping(task), "rows": [dict(row) for row in rows]}
    gate: dict[str, Any] = {"passed": None, "checks": [], "override": None, "verified": verified}
    gate["external"] = asked
    values = {"kind": "deploy", "target": target, "actor": actor, "reason": reason, "gate": gate}
    for _ in range(_ATTEMPTS):
        current = current_deployment(ledger, model, alias)
        done = _move(ledger, model, alias, current, {**values, "settings": checked})
        if done is not None:
            return done
    raise FileError(f"{model}@{alias}: others deploy all the time", fix="try again")


def rollback(
    ledger: Ledger,
    model: str,
    alias: str = PRODUCTION,
    *,
    actor: str,
    reason: str,
    to: int | str | None = None,
    verifying: Verifying = nullcontext,
) -> Deployment:
    """Let an alias serve again what it served before, with the settings of then, after it was verified.

    Rolling back twice goes two deployments back. No gate is judged: what is restored has served.

    Args:
        ledger: The ledger.
        model: The model's name.
        alias: The alias.
        actor: Who does it.
        reason: Why.
        to: The number of a version, or the target of an analyzer, that this alias has served; what served
            before the present one where None.
        verifying: Is held while the version is loaded.

    Raises:
        ModelError: nothing served before, or it is not what was added; the alias stays.
    """
    _check_words(actor, reason, None)
    tried: dict[int, dict[str, Any]] = {}
    for _ in range(_ATTEMPTS):
        chain = _chain(history(ledger, model, alias))
        current = chain[0] if chain else None
        if current is None:
            raise ModelError(
                f"{model}@{alias}: nothing was deployed",
                fix=f"see what was: mlx-distill registry history {model}",
            )
        chosen = _served_before(chain, to)
        if chosen.id not in tried:
            tried[chosen.id] = _verify_again(ledger, chosen, verifying)
        gate: dict[str, Any] = {
            "passed": None,
            "checks": [],
            "override": None,
            "verified": tried[chosen.id],
            "restores": chosen.id,
        }
        if "external" in chosen.gate:
            gate["external"] = chosen.gate["external"]
        values = {"kind": "rollback", "version": chosen.version, "target": chosen.target, "gate": gate}
        words = {"actor": actor, "reason": reason, "settings": dict(chosen.settings)}
        done = _move(ledger, model, alias, current, {**values, **words})
        if done is not None:
            return done
    raise FileError(f"{model}@{alias}: others deploy all the time", fix="try again")


def _chain(deployments: Sequence[Deployment]) -> list[Deployment]:
    """The deployments of an alias, the present one first."""
    return sorted(deployments, key=lambda deployment: -deployment.id)


def _served_before(chain: Sequence[Deployment], to: int | str | None) -> Deployment:
    """The deployment whose version or analyzer a rollback restores."""
    current = chain[0]
    if to is not None:
        for deployment in chain:
            if to in (deployment.version, deployment.target):
                return deployment
        raise ModelError(
            f"{current.model}@{current.alias} has never served {to}",
            fix="deploy it with its gates: mlx-distill registry promote",
        )
    by_id = {deployment.id: deployment for deployment in chain}
    position = current
    while True:
        restored = position.gate.get("restores")
        position = by_id.get(restored, position) if restored is not None else position
        if position.previous is None:
            raise ModelError(
                f"{current.model}@{current.alias}: nothing served before {current.serves}",
                fix="name what it shall serve: mlx-distill registry promote",
            )
        position = by_id[position.previous]
        if position.serves != current.serves:
            restored = position.gate.get("restores")
            return by_id.get(restored, position) if restored is not None else position


def _verify_again(ledger: Ledger, chosen: Deployment, verifying: Verifying) -> dict[str, Any]:
    if chosen.target is not None:
        asked = chosen.gate["external"]
        return verify_external(chosen.target, asked["rows"], parse_task(asked["task"], chosen.target))
    assert chosen.version is not None
    version = get_version(ledger, chosen.model, chosen.version)
    if version.state == ARCHIVED:
        raise ModelError(
            f"{version.name} is archived",
            fix=f"mlx-distill registry archive --restore {version.name}, or name another one: --to",
        )
    with verifying(version):
        verification = verify_version(ledger, version)
    require_verified(version, verification)
    return verification.to_dict()


def history(ledger: Ledger, model: str, alias: str | None = None) -> list[Deployment]:
    """The deployments of a model, the newest first.

    Args:
        ledger: The ledger.
        model: The model's name.
        alias: Of this alias alone.
    """
    with ledger.read() as db:
        rows = db.execute(
            "SELECT * FROM deployments WHERE model = ?1 AND (?2 IS NULL OR alias = ?2) ORDER BY id DESC",
            (model, alias),
        ).fetchall()
    return [deployment_of(row) for row in rows]


def current_deployment(ledger: Ledger, model: str, alias: str = PRODUCTION) -> Deployment | None:
    """What an alias serves now, or None."""
    with ledger.read() as db:
        row = db.execute(
            "SELECT deployments.* FROM aliases JOIN deployments ON deployments.id = aliases.deployment "
            "WHERE aliases.model = ? AND aliases.alias = ?",
            (model, alias),
        ).fetchone()
    return None if row is None else deployment_of(row)


def _move(
    ledger: Ledger, model: str, alias: str, expected: Deployment | None, values: Mapping[str, Any]
) -> Deployment | None:
    """Write a deployment and move the alias to it; None where another one came after ``expected``."""
    now = time.time()
    version, target = values.get("version"), values.get("target")
    with ledger.write() as db:
        row = db.execute(
            "SELECT deployment FROM aliases WHERE model = ? AND alias = ?", (model, alias)
        ).fetchone()
        previous = None if row is None else row["deployment"]
        if previous != (None if expected is None else expected.id):
            return None
        _require_ready(db, model, version)
        db.execute("INSERT INTO models (name, created_at) VALUES (?, ?) ON CONFLICT DO NOTHING", (model, now))
        done = db.execute(
            "INSERT INTO deployments (model, alias, kind, previous, version, target, actor, reason, gate, "
            "settings, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
            (
                *(model, alias, values["kind"], previous, version, target),
                *(
                    values["actor"],
                    values["reason"],
                    to_json(values["gate"]),
                    to_json(values["settings"]),
                    now,
                ),
            ),
        ).fetchone()
        db.execute(
            "INSERT INTO aliases (model, alias, version, target, deployment) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (model, alias) DO UPDATE SET version = excluded.version, target = excluded.target, "
            "deployment = excluded.deployment",
            (model, alias, version, target, done["id"]),
        )
        return deployment_of(done)


def _require_ready(db: sqlite3.Connection, model: str, version: int | None) -> None:
    """Somebody may have archived it while it was verified."""
    if version is None:
        return
    row = db.execute("SELECT state FROM versions WHERE model = ? AND number = ?", (model, version)).fetchone()
    if row is None or row["state"] != READY:
        raise ModelError(
            f"{model}:{version} is {row['state'] if row else 'gone'}", fix="choose another version"
        )


def _require_servable(version: Version) -> None:
    if version.state == ARCHIVED:
        raise ModelError(
            f"{version.name} is archived", fix=f"mlx-distill registry archive --restore {version.name}"
        )
    assert version.state in (READY, FAILED)  # a failed one may be whole again: it is verified


def _refuse(version: Version, gate: Gate) -> None:
    refusing = [check for check in gate.checks if check.refuses]
    raise QualityGateError(
        f"{version.name}: {'; '.join(f'{check.name}: {check.sentence}' for check in refusing)}",
        fix="choose another version, or say why it is deployed all the same: --override REASON",
        facts={"gate": gate.to_dict()},
    )


def _check_words(actor: str, reason: str, override: str | None) -> None:
    for name, text in (("actor", actor), ("reason", reason), ("override", override)):
        if text is not None and not text.strip():
            raise ConfigError(f"no {name}", fix=f"say {'who' if name == 'actor' else 'why'}: it is kept")


def _settings(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if settings is None:
        return None
    for name, value in settings.items():
        if name not in ("context_length", "memory_limit_gb"):
            raise ConfigError(f"setting {name!r}: unknown", fix="one of context_length, memory_limit_gb")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise ConfigError(f"{name}: {value!r}", fix="give a number above 0")
        if name == "context_length" and not isinstance(value, int):
            raise ConfigError(f"{name}: {value!r}", fix="give a whole number of tokens")
    return dict(settings)
