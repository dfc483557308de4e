"""Names of models: what a request or a command means by ``music``, ``music@staging``, ``runs/x:student``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import packaged
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.ledger.database import Ledger, from_json
from mlx_distill.models.trained_on import is_model, is_run, newest_model, read_trained_on
from mlx_distill.registry.records import PRODUCTION, READY, Model, Version
from mlx_distill.registry.versions import get_version, list_models
from mlx_distill.run_models import RUN_MODELS, run_model
from mlx_distill.storage import read_manifest
from mlx_distill.tasks.task import Task
from mlx_distill.text import did_you_mean, known_names

_NUMBER = re.compile(r"[0-9]{1,18}")

__all__ = ["ResolvedModel", "list_models", "resolve_model"]


@dataclass(frozen=True)
class ResolvedModel:
    """What a name means.

    Attributes:
        name: As it was given.
        path: The model's folder; None of an analyzer outside of the registry.
        target: ``module:function`` or a URL of such an analyzer, or None.
        model: The model of the registry, or None of a run, a folder or an asset.
        version: The version's number, or None.
        alias: The alias by which it was found, or None.
        sha: The hash of the version, or of the folder that a stage wrote; None of another folder.
        task: The task that it was trained on, or None.
        deployment: The number of the deployment that the alias is at, or None.
        settings: How that deployment is served: ``context_length``, ``memory_limit_gb``.
    """

    name: str
    path: Path | None
    target: str | None = None
    model: str | None = None
    version: int | None = None
    alias: str | None = None
    sha: str | None = None
    task: Task | None = None
    deployment: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def resolve_model(ledger: Ledger, name: str) -> ResolvedModel:
    """Find the model that a name means.

    ``NAME`` (what its alias ``production`` serves, else its newest version that is ready), ``NAME@alias``,
    ``NAME:3``; a run (its last trained model), ``RUN:model`` or the folder of a model under the root;
    ``asset:models/NAME``; the id of a job, or ``ft:BASE:local:SUFFIX:ID``. A name of the registry comes
    before a folder of that name, which is written ``./NAME``.

    Raises:
        ModelError: there is no such model; with the nearest names. Never a model of the Hub, and never a path
            that leaves the root.
    """
    if name.startswith("asset:"):
        path = packaged(name.removeprefix("asset:"))
        if path is None or not is_model(path):
            raise _unknown(ledger, name)
        return _folder(name, path)
    models = {model.name: model for model in list_models(ledger)}
    registered = _registered(ledger, models, name)
    if registered is not None:
        return registered
    job = name.rpartition(":")[2] if name.startswith("ft:") else name
    if job.startswith("job-"):
        return _of_job(ledger, name, job)
    try:
        path = ledger.root.inside(name)
    except (ConfigError, ValueError):
        raise _unknown(ledger, name) from None
    run, _, part = name.rpartition(":")
    if run and not path.exists() and part in RUN_MODELS:
        path = ledger.root.inside(run) / run_model(part).folder
    if name and is_run(path):
        path = newest_model(path, lambda note: None)
    if not name or not is_model(path):
        raise _unknown(ledger, name)
    return _folder(name, path)


def _registered(ledger: Ledger, models: dict[str, Model], name: str) -> ResolvedModel | None:
    """A version or an analyzer that the registry knows by this name; None where the model is not in it."""
    base, mark, number = name.rpartition(":")
    if mark and base in models and _NUMBER.fullmatch(number):
        return _version(ledger, name, get_version(ledger, base, int(number)))
    base, _, alias = name.partition("@")
    if base not in models:
        return None
    model = models[base]
    if alias and alias not in model.aliases:
        raise ModelError(f"{base} has no alias {alias!r}", fix=known_names(alias, model.aliases, "aliases"))
    alias = alias or PRODUCTION
    serves = model.aliases.get(alias)
    if serves is not None:
        return _deployed(ledger, name, base, alias)
    newest = next((version for version in model.versions if version.state == READY), None)
    if newest is None:
        raise ModelError(f"{base} has no version that is ready", fix="see: mlx-distill registry list")
    return _version(ledger, name, newest)


def _deployed(ledger: Ledger, name: str, model: str, alias: str) -> ResolvedModel:
    """What an alias serves, with the settings of its deployment: one row, so they belong together."""
    with ledger.read() as db:
        row = db.execute(
            "SELECT d.id, d.version, d.target, d.settings FROM aliases a JOIN deployments d "
            "ON d.id = a.deployment WHERE a.model = ? AND a.alias = ?",
            (model, alias),
        ).fetchone()
    if row["target"] is not None:
        found = ResolvedModel(name, None, row["target"], model, alias=alias)
    else:
        found = _version(ledger, name, get_version(ledger, model, row["version"]), alias)
    return replace(found, deployment=row["id"], settings=from_json(row["settings"]))


def _version(ledger: Ledger, name: str, version: Version, alias: str | None = None) -> ResolvedModel:
    path = ledger.root.inside(version.path)
    if not is_model(path):
        gone = "its files were deleted" if version.files_deleted else f"its files are gone: {path}"
        source = version.info.get("source") or "RUN"
        raise ModelError(
            f"{version.name}: {gone}",
            fix=f"add them again: mlx-distill registry add {source} --name {version.model}",
        )
    trained_on = read_trained_on(path)
    return ResolvedModel(
        name,
        path,
        model=version.model,
        version=version.number,
        alias=alias,
        sha=version.sha,
        task=trained_on.task if trained_on else None,
    )


def _folder(name: str, path: Path) -> ResolvedModel:
    manifest, trained_on = read_manifest(path), read_trained_on(path)
    return ResolvedModel(
        name,
        path,
        sha=manifest.content if manifest else None,
        task=trained_on.task if trained_on else None,
    )


def _of_job(ledger: Ledger, name: str, job: str) -> ResolvedModel:
    """The model that a job made: the version that was added at its end, else the last model of its run."""
    with ledger.read() as db:
        row = db.execute("SELECT run_path, state FROM jobs WHERE id = ?", (job,)).fetchone()
        added = None
        if row is not None and row["run_path"] is not None:
            added = db.execute(
                "SELECT model, number FROM versions WHERE source_run = ? AND state = ? "
                "ORDER BY created_at DESC LIMIT 1",
                (row["run_path"], READY),
            ).fetchone()
    if row is None or row["run_path"] is None:
        raise _unknown(ledger, name)
    if added is not None:
        return _version(ledger, name, get_version(ledger, added["model"], added["number"]))
    run = ledger.root.inside(row["run_path"])
    if not is_run(run):
        raise ModelError(f"{name}: the job has no model yet: it is {row['state']}", fix="wait for its end")
    return _folder(name, newest_model(run, lambda note: None))


def _unknown(ledger: Ledger, name: str) -> ModelError:
    root = ledger.root.path
    folders = [path.name for path in _folders(root)] + [
        f"runs/{path.name}" for path in _folders(root / "runs")
    ]
    names = [model.name for model in list_models(ledger)]
    nearest = did_you_mean(name, [*names, *folders])
    known = f"models: {', '.join(names)}" if names else "add one: mlx-distill registry add RUN"
    return ModelError(
        f"no model {name!r} in the registry or under the root", fix=f"{nearest} {known}".strip()
    )


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return [folder for folder in sorted(path.iterdir())[:200] if is_run(folder) or is_model(folder)]
