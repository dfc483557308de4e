"""Versions of models: adding, listing, finding."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.ledger.database import Ledger, to_json
from mlx_distill.ledger.root import Root
from mlx_distill.models.trained_on import is_model, is_run, newest_model, read_trained_on
from mlx_distill.registry.about import describe, evaluation_of
from mlx_distill.registry.contents import KEPT, Contents, keep_folders, read_contents
from mlx_distill.registry.golden import answer_golden, golden_from_run, prompts_for
from mlx_distill.registry.records import READY, Model, Version, check_name, version_of
from mlx_distill.run_models import RUN_MODELS, run_model
from mlx_distill.runtime import machine, versions
from mlx_distill.storage import os_errors, read_json, write_json
from mlx_distill.text import known_names

INFO_FILE = "version_info.json"


def open_ledger(root: str | Path = ".") -> Ledger:
    """The ledger of a folder, made where there is none.

    Args:
        root: The folder that runs and models lie under.
    """
    return Ledger(Root.at(root))


def add_version(
    ledger: Ledger, run_or_model_path: str | Path, *, name: str | None = None, description: str = ""
) -> Version:
    """Add a model as a new version. The same content is the same version, whatever folder it lies in.

    Its files, and of a run the evaluation and the rows, are linked into
    ``.mlx-distill/versions/NAME/NUMBER``, so they stay as they are when the run is made again or deleted.
    Three golden rows are kept with it: rows of the run's evaluation, else answers that the model gives now.

    Args:
        ledger: The ledger.
        run_or_model_path: Under the root, the folder of a run (its last trained model), ``RUN:model``, or the
            folder of a model; or ``asset:NAME``.
        name: The model's name; that of the run's or the model's folder where None.
        description: One line for the list of models; kept from the first version where empty.

    Raises:
        ConfigError: the path is not under the root, or the name is none.
        ModelError: it is no model, has no trained model yet, or cannot be loaded.
        FileError: files of the run have changed since a stage wrote them, or the disk is full.
    """
    folder, run = _source(ledger, str(run_or_model_path))
    model = check_name(name if name is not None else (run or folder).name)
    contents = read_contents(folder)
    if (known := _by_sha(ledger, model, contents.sha)) is not None:
        if not is_model(ledger.root.inside(known.path)):
            _keep_again(ledger, known, contents, run)
            known = get_version(ledger, model, known.number)
        return _described(ledger, known, description)
    place = ledger.root.state / "versions" / model
    kept_before = _kept_before(place, contents.sha)
    if kept_before is not None:
        return _insert(ledger, model, contents, read_json(kept_before / INFO_FILE), None, description)
    info = {**describe(contents, run), **_origin(ledger, folder, run)}
    evaluation = evaluation_of(run, folder.name, contents.content) if run is not None else None
    info["evaluation"] = evaluation.name if evaluation else None
    info["golden"] = _golden(folder, run, evaluation)
    if not info["machine"]:
        info |= {"machine": machine(), "versions": versions()}
    with os_errors():
        place.mkdir(parents=True, exist_ok=True)
    partial = keep_folders(_kept_sources(contents, run, evaluation), place / "version")
    try:
        return _insert(ledger, model, contents, info, partial, description)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _source(ledger: Ledger, spec: str) -> tuple[Path, Path | None]:
    """The folder of a model, and that of its run."""
    if spec.startswith("asset:"):
        return Path(resolve_asset(spec)), None
    path = ledger.root.inside(spec)
    run, _, name = spec.rpartition(":")
    if not path.exists() and run and is_run(ledger.root.inside(run)):
        if name not in RUN_MODELS:
            raise ModelError(
                f"{spec}: no model {name!r}", fix=known_names(name, RUN_MODELS, "models of a run")
            )
        path = ledger.root.inside(run) / run_model(name).folder
    if not path.exists():
        raise ModelError(f"{spec}: no such folder under {ledger.root.path}", fix="check the path")
    if is_run(path):
        return newest_model(path, lambda note: None), path
    if not is_model(path):
        raise ModelError(f"{spec}: neither a run nor a model", fix="give the folder of one of the two")
    return path, path.parent if is_run(path.parent) else None


def _origin(ledger: Ledger, folder: Path, run: Path | None) -> dict[str, str | None]:
    inside = folder.is_relative_to(ledger.root.path)
    source = ledger.root.relative(folder) if inside else f"asset:models/{folder.name}"
    return {"source": source, "source_run": ledger.root.relative(run) if run is not None else None}


def _golden(folder: Path, run: Path | None, evaluation: Path | None) -> list[dict[str, Any]]:
    rows = golden_from_run(run, evaluation) if run is not None and evaluation is not None else []
    if rows:
        return rows
    trained_on = read_trained_on(folder)
    return answer_golden(folder, prompts_for(run, trained_on.task if trained_on else None))


def _kept_sources(contents: Contents, run: Path | None, evaluation: Path | None) -> dict[str, Path]:
    """What is linked into the folder of a version: its name there, and where it is."""
    sources = {contents.folder.name: contents.folder}
    if contents.base is not None:
        sources[contents.base.name] = contents.base
    if run is not None:
        others = {"data": run / "data", "report.json": run / "report.json"}
        if evaluation is not None:
            others[f"evaluations/{evaluation.name}"] = evaluation
        sources |= {name: path for name, path in others.items() if path.exists()}
    return sources


def _kept_before(place: Path, sha: str) -> Path | None:
    """The folder of a version with this content that the ledger does not know, such as after its loss."""
    for file in place.glob(f"[0-9]*/{INFO_FILE}"):
        if read_json(file).get("sha") == sha and (file.parent / KEPT).is_dir():
            return file.parent
    return None


def _insert(
    ledger: Ledger,
    model: str,
    contents: Contents,
    info: Mapping[str, Any],
    partial: Path | None,
    description: str,
) -> Version:
    """Give the version its number, in one transaction with the rename of its folder."""
    place, now = ledger.root.state / "versions" / model, time.time()
    with ledger.write() as db:
        row = db.execute(
            "SELECT * FROM versions WHERE model = ? AND sha = ?", (model, contents.sha)
        ).fetchone()
        if row is not None:  # somebody else was faster
            return version_of(row)
        number = int(info["number"]) if partial is None else _next_number(db, model, place)
        kept = place / str(number)
        info = {**info, "model": model, "number": number, "sha": contents.sha}
        info.setdefault("created", datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"))
        if partial is not None:
            write_json(partial / INFO_FILE, info)
            with os_errors():
                partial.rename(kept)
        db.execute(
            "INSERT INTO models (name, created_at, description) VALUES (?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET description = excluded.description "
            "WHERE excluded.description <> ''",
            (model, now, description),
        )
        db.execute(
            "INSERT INTO versions (model, number, sha, path, source_run, state, created_at, info) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                model,
                number,
                contents.sha,
                ledger.root.relative(kept / KEPT / str(info["folder"])),
                info.get("source_run"),
                READY,
                now,
                to_json(info),
            ),
        )
    return get_version(ledger, model, number)


def _next_number(db: sqlite3.Connection, model: str, place: Path) -> int:
    """One more than any number that the model ever had, also by a ledger that was lost."""
    highest = db.execute("SELECT max(number) FROM versions WHERE model = ?", (model,)).fetchone()[0] or 0
    folders = [int(path.name) for path in place.iterdir() if path.name.isdigit()]
    return max(highest, *folders, 0) + 1


def _keep_again(ledger: Ledger, version: Version, contents: Contents, run: Path | None) -> None:
    """Put the files of a version back that were deleted, or are gone. Its state stays."""
    place = ledger.root.inside(version.kept).parent
    evaluation = evaluation_of(run, contents.folder.name, contents.content) if run is not None else None
    sources = _kept_sources(contents, run, evaluation)
    # Its folders have the names that they were recorded by, whatever those of this copy are.
    names = {contents.folder.name: version.info["folder"]}
    if contents.base is not None:
        names[contents.base.name] = version.info["base"]
    partial = keep_folders({names.get(name, name): path for name, path in sources.items()}, place)
    info = {name: value for name, value in version.info.items() if name != "files_deleted"}
    try:
        with os_errors():
            place.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place / KEPT, ignore_errors=True)
            (partial / KEPT).rename(place / KEPT)
        write_json(place / INFO_FILE, info)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with ledger.write() as db:
        db.execute(
            "UPDATE versions SET info = ? WHERE model = ? AND number = ?",
            (to_json(info), version.model, version.number),
        )


def _described(ledger: Ledger, version: Version, description: str) -> Version:
    if description:
        with ledger.write() as db:
            db.execute("UPDATE models SET description = ? WHERE name = ?", (description, version.model))
    return version


def _by_sha(ledger: Ledger, model: str, sha: str) -> Version | None:
    with ledger.read() as db:
        row = db.execute("SELECT * FROM versions WHERE model = ? AND sha = ?", (model, sha)).fetchone()
        return None if row is None else version_of(row, _aliases(db, model)[row["number"]])


def _aliases(db: sqlite3.Connection, model: str) -> dict[int, tuple[str, ...]]:
    """The aliases of each version of a model."""
    rows = db.execute(
        "SELECT alias, version FROM aliases WHERE model = ? AND version IS NOT NULL ORDER BY alias", (model,)
    )
    names: dict[int, tuple[str, ...]] = defaultdict(tuple)
    for row in rows:
        names[row["version"]] += (row["alias"],)
    return names


def get_version(ledger: Ledger, model: str, number: int) -> Version:
    """A version by its number.

    Raises:
        ModelError: there is no such model or version.
    """
    with ledger.read() as db:
        numbers = [row[0] for row in db.execute("SELECT number FROM versions WHERE model = ?", (model,))]
        if number in numbers:  # SQLite is not asked for a number that it cannot hold
            found = db.execute("SELECT * FROM versions WHERE model = ? AND number = ?", (model, number))
            return version_of(found.fetchone(), _aliases(db, model)[number])
        names = [row["name"] for row in db.execute("SELECT name FROM models ORDER BY name")]
    check_model(model, names)
    have = ", ".join(map(str, numbers)) or "none"
    raise ModelError(f"{model} has no version {number}", fix=f"versions: {have}")


def check_model(name: str, names: Iterable[str]) -> None:
    """Refuse a name that is not among the models of the registry."""
    names = list(names)
    if name not in names:
        fix = known_names(name, names, "models") if names else "add one: mlx-distill registry add RUN"
        raise ModelError(f"no model {name!r} in the registry", fix=fix)


def list_versions(ledger: Ledger, model: str | None = None, *, state: str | None = None) -> list[Version]:
    """Versions by model, the newest first.

    Args:
        ledger: The ledger.
        model: Of this model alone.
        state: In this state alone.
    """
    with ledger.read() as db:
        rows = db.execute(
            "SELECT * FROM versions WHERE (?1 IS NULL OR model = ?1) AND (?2 IS NULL OR state = ?2) "
            "ORDER BY model, number DESC",
            (model, state),
        ).fetchall()
        aliases = {name: _aliases(db, name) for name in {row["model"] for row in rows}}
    return [version_of(row, aliases[row["model"]].get(row["number"], ())) for row in rows]


def list_models(ledger: Ledger) -> list[Model]:
    """All models with their versions and aliases, by name."""
    by_model: dict[str, list[Version]] = defaultdict(list)
    for version in list_versions(ledger):
        by_model[version.model].append(version)
    with ledger.read() as db:
        models = db.execute("SELECT * FROM models ORDER BY name").fetchall()
        rows = db.execute("SELECT * FROM aliases ORDER BY alias").fetchall()
    aliases: dict[str, dict[str, int | str]] = defaultdict(dict)
    for row in rows:
        aliases[row["model"]][row["alias"]] = row["target"] if row["version"] is None else row["version"]
    return [
        Model(
            name := row["name"], row["description"], row["created_at"], tuple(by_model[name]), aliases[name]
        )
        for row in models
    ]


def parse_version(ledger: Ledger, spec: str) -> Version:
    """The version that ``NAME:3``, ``NAME@alias`` or ``NAME`` (the newest one that is ready) means.

    Raises:
        ModelError: there is none.
        ConfigError: the alias names an analyzer outside of the registry.
    """
    name, mark, rest = spec.partition(":")
    if mark:
        if not rest.isdecimal() or len(rest) > 18:
            raise ConfigError(f"{spec}: {rest!r} is no number of a version", fix=f"write {name}:1")
        return get_version(ledger, name, int(rest))
    name, mark, alias = spec.partition("@")
    models = {model.name: model for model in list_models(ledger)}
    check_model(name, models)
    if mark:
        serves = models[name].aliases.get(alias)
        if serves is None:
            raise ModelError(
                f"{name} has no alias {alias!r}", fix=known_names(alias, models[name].aliases, "aliases")
            )
        if isinstance(serves, str):
            raise ConfigError(f"{spec} is {serves}, no version", fix="name a version by its number")
        return get_version(ledger, name, serves)
    ready = next((version for version in models[name].versions if version.state == READY), None)
    if ready is None:
        raise ModelError(f"{name} has no version that is ready", fix="see: mlx-distill registry list")
    return ready


def lineage(ledger: Ledger, version: Version) -> list[dict[str, Any]]:
    """Where a version comes from: the stages that made it, nearest first.

    Returns:
        For each ``folder``, ``stage``, ``key``, ``content``, ``source`` (of a checkpoint that was converted),
        ``finished``, ``parents`` (folder: the hash of its content) and ``versions``: those of the registry
        that have this content, as names.
    """
    named: dict[str, list[str]] = defaultdict(list)
    for other in list_versions(ledger):
        if other.info.get("content"):
            named[other.info["content"]].append(other.name)
    return [{**step, "versions": sorted(named[step["content"]])} for step in version.info.get("lineage", ())]
