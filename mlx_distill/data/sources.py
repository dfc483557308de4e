"""The sources of rows: files and folders, SQLite databases, data sets of the Hub, packaged generators. Each
row comes with its file and line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_distill.config import ASSETS, packaged, resolve_asset
from mlx_distill.data.files import ReadOptions, is_saved_dataset, read_path
from mlx_distill.data.json_values import cell_equals
from mlx_distill.data.layouts import closest, listed
from mlx_distill.data.sqlite import check_query, query_rows
from mlx_distill.data.tables import Fields, class_names, media_columns
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import SourceConfig
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
_ORIGINS = ("path", "sqlite", "hub", "generator")
_MOST_VALUES = 12  # of a field that a message lists


def read_source(
    config: SourceConfig,
    task: Task | None = None,
    base: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Rows:
    """Yield ``(where, row)`` of one source, one row at a time; ``where`` is ``file:line`` or its equivalent.

    Args:
        config: A path, a database with a query, a Hub data set or a generator: exactly one of them.
        task: The task of the rows: cells of CSV files and databases are read by its schema.
        base: The folder that relative paths start from: the recipe's.
        note: Is called with what is left out, such as the other files of a folder.

    Raises:
        ConfigError: none or several of the four are given, no such generator, or ``columns`` names a column
            that no row has.
        DataError: no such file, an empty or damaged one, a line that is not UTF-8 or not a JSON object, or no
            row that fits ``where``.
    """
    origins = [name for name in _ORIGINS if getattr(config, name)]
    if len(origins) != 1:
        given = " and ".join(origins) if origins else "none of them"
        raise ConfigError(
            f"data.sources: a source has one of path, sqlite, hub and generator, not {given}",
            fix="write one source for each",
        )
    if config.query and not config.sqlite:
        raise ConfigError("data.sources: query without sqlite", fix="write sqlite: FILE beside it")
    name = str(getattr(config, origins[0]))
    rows = _origin_rows(config, task, base, ReadOptions(_fields(config, task), config.hub_split, note))
    if config.where:
        rows = _matching(rows, config, name)
    if config.count and not config.generator:
        rows = itertools.islice(rows, config.count)
    empty, seen = True, dict[str, None]()
    for where, row in rows:
        if config.columns:
            seen.update(dict.fromkeys(row))
        empty = False
        yield where, row
    if empty:
        in_recipe = f" for the task {task.name!r}, or take the source out of data.sources" if task else ""
        raise DataError(f"{name}: no rows", fix=f"add rows{in_recipe}")
    _check_columns(config, name, seen)


def _fields(config: SourceConfig, task: Task | None) -> Fields:
    """For each column that holds a field of the answer the field's schema, and whether it is required."""
    if task is None or task.is_chats:
        return {}
    required = task.schema.get("required", ())
    out = {}
    for name, schema in task.schema["properties"].items():
        field = config.values[name].field if name in config.values else None
        if name not in task.input_fields:
            out[config.columns.get(field or name, field or name)] = (schema, name in required)
    return out


def _origin_rows(config: SourceConfig, task: Task | None, base: Path | None, options: ReadOptions) -> Rows:
    if config.generator:
        return _generate(config)
    if config.hub:
        return _read_hub(config, base, options)
    if config.sqlite:
        path = _existing(config.sqlite, base)
        query = check_query(path, config.sqlite, config.query)
        return query_rows(path, config.sqlite, query, options.fields)
    return read_path(_existing(str(config.path), base), str(config.path), options)


def _existing(spec: str, base: Path | None) -> Path:
    """The path that a source names."""
    path = Path(resolve_asset(spec, base))
    if path.exists():
        return path
    if path.is_absolute():
        raise DataError(f"{spec}: no such file", fix="put it there, or correct its path under data.sources")
    # Nobody keeps rows in the folder of the packaged recipes.
    folders = [base, Path()] if base is not None and not base.is_relative_to(ASSETS) else [Path()]
    searched = dict.fromkeys(str(folder.resolve()) for folder in folders)
    raise DataError(
        f"{spec}: no such file in {' or '.join(searched)}",
        fix="put it there, or write its whole path under data.sources",
    )


def _matching(rows: Rows, config: SourceConfig, name: str) -> Rows:
    """The rows whose fields have the values of ``where``; an error with the values that exist if none has."""
    found, columns = False, dict[str, None]()
    values: dict[str, dict[str, None]] = {field: {} for field in config.where}
    for where, row in rows:
        own = {field: row.get(_column(field, row, config)) for field in config.where}
        if all(cell_equals(own[field], value) for field, value in config.where.items()):
            found = True
            yield where, row
        elif not found:
            columns.update(dict.fromkeys(row))
            for field, value in own.items():
                if value is not None and len(values[field]) <= _MOST_VALUES:
                    values[field][str(value)[:40]] = None
    if not found and columns:
        raise _no_match(config, name, columns, values)


def _column(field: str, row: Mapping[str, Any], config: SourceConfig) -> str:
    return field if field in row else config.columns.get(field, field)


def _no_match(
    config: SourceConfig, name: str, columns: Mapping[str, None], values: Mapping[str, Mapping[str, None]]
) -> DataError:
    asked = ", ".join(f"{field}: {value}" for field, value in config.where.items())
    for field, wanted in config.where.items():
        if _column(field, columns, config) not in columns:
            near = closest(field, columns)
            hint = f"; did you mean {near!r}?" if near else ""
            reason = f"no row has the column {field!r}"
            return DataError(
                f"{name}: no row fits where: {asked}: {reason}", fix=f"they have {listed(columns)}{hint}"
            )
        if str(wanted) not in values[field]:
            near = closest(str(wanted), values[field])
            hint = f"; did you mean {near!r}?" if near else ""
            known = listed(values[field], _MOST_VALUES) or "none"
            return DataError(f"{name}: no row fits where: {asked}", fix=f"values of {field}: {known}{hint}")
    return DataError(f"{name}: no row fits where: {asked}", fix="each value occurs, but not in one row")


def _check_columns(config: SourceConfig, name: str, seen: Mapping[str, None]) -> None:
    absent = [column for column in config.columns.values() if column not in seen]
    if absent:
        near = closest(absent[0], seen)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"data.sources: {name}: columns: no row has the column {absent[0]!r}",
            fix=f"they have {listed(seen)}{hint}",
        )


def _read_hub(config: SourceConfig, base: Path | None, options: ReadOptions) -> Rows:
    name, _, subset = str(config.hub).partition(":")
    local = Path(resolve_asset(name, base))
    if local.is_file() or is_saved_dataset(local):
        yield from read_path(local, name, options)
        return
    fix = (
        "check the name, the network and the right to read it (hf auth login); offline, download it and give "
        "its path"
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{name}: the package datasets is missing", fix="pip install datasets") from error
    try:
        data = load_dataset(
            str(local) if local.is_dir() else name,
            subset or None,
            split=config.hub_split,
            revision=config.revision,
            streaming=True,
        )
        types = getattr(data, "features", None)
        features = types.to_dict() if types else {}
        if media := media_columns(features):
            data = data.remove_columns(media)
        names = class_names(features, options.fields)
        rows = iter(data)
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            yield f"{name}:{number}", names(dict(row))
    except DataError:
        raise
    except Exception as error:  # the Hub's client raises dozens of types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: the data set cannot be read: {reason}", fix=fix) from error


def generator_files(name: str) -> list[Path]:
    """The modules of a packaged generator: ``generator.py``, and one for each of its other policies."""
    folder = ASSETS / name
    return [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


def _generate(config: SourceConfig) -> Iterator[tuple[str, Row]]:
    name = str(config.generator)
    if not name.isidentifier() or packaged(f"{name}/generator.py") is None:
        known = sorted(
            path.parent.name for path in Path(resolve_asset("asset:templates")).parent.glob("*/generator.py")
        )
        raise ConfigError(f"no generator {name!r}", fix=known_names(name, known, "packaged"))
    policies = [path.stem for path in generator_files(name) if path.stem != "generator"]
    if config.policy is not None and config.policy not in policies:
        raise ConfigError(
            f"the generator {name!r} has no policy {config.policy!r}",
            fix=known_names(config.policy, policies, "policies") if policies else "take policy out",
        )
    options: dict[str, Any] = {"seed": config.seed, "noise": config.noise, "part": config.part or "train"}
    if config.count:
        options["count"] = config.count
    try:
        rows = import_module(f"mlx_distill.assets.{name}.{config.policy or 'generator'}").generate(**options)
        for index, row in enumerate(rows):
            yield f"{name} generator:{index}", row
    except ValueError as error:
        raise ConfigError(f"the generator {name!r}: {error}", fix="change the source's settings") from error
