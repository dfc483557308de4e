"""The sources of rows: JSONL and JSON files, data sets of the Hub, packaged generators. Each row comes with
its file and line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_distill.config import ASSETS, packaged, resolve_asset
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import SourceConfig
from mlx_distill.storage import os_errors, read_jsonl
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names

Row = dict[str, Any]


def read_source(
    config: SourceConfig, task: Task | None = None, base: Path | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, row)`` of one source, one row at a time; ``where`` is ``file:line`` or its equivalent.

    Args:
        config: A path, a Hub data set or a generator: exactly one of them.
        task: The task of the rows, for error messages.
        base: The folder that relative paths start from: the recipe's.

    Raises:
        ConfigError: none or several of the three are given, or no such generator.
        DataError: no such file, an empty one, or a line that is not UTF-8 or not a JSON object.
    """
    origins = [name for name in ("path", "hub", "generator") if getattr(config, name)]
    if len(origins) != 1:
        listed = " and ".join(origins) if origins else "none of them"
        raise ConfigError(
            f"data.sources: a source has one of path, hub and generator, not {listed}",
            fix="write one source for each",
        )
    if config.generator:
        name, rows = config.generator, _generate(config)
    elif config.hub:
        name, rows = config.hub, _read_hub(config)
    else:
        assert config.path is not None
        name, rows = config.path, _read_file(config.path, base)
    if config.where:
        rows = (
            (where, row)
            for where, row in rows
            if all(row.get(field) == value for field, value in config.where.items())
        )
    if config.count and not config.generator:
        rows = itertools.islice(rows, config.count)
    empty = True
    for where, row in rows:
        empty = False
        yield where, row
    if empty:
        needs = f" for the task {task.name!r}" if task else ""
        raise DataError(f"{name}: no rows", fix=f"add rows{needs}, or take the source out of data.sources")


def _read_file(spec: str, base: Path | None) -> Iterator[tuple[str, Row]]:
    path = Path(resolve_asset(spec, base))
    if not path.exists():
        if path.is_absolute():
            raise DataError(
                f"{spec}: no such file", fix="put it there, or correct its path under data.sources"
            )
        # Nobody keeps rows in the folder of the packaged recipes.
        folders = [base, Path()] if base is not None and not base.is_relative_to(ASSETS) else [Path()]
        searched = dict.fromkeys(str(folder.resolve()) for folder in folders)
        raise DataError(
            f"{spec}: no such file in {' or '.join(searched)}",
            fix="put it there, or write its whole path under data.sources",
        )
    if path.is_dir():
        raise DataError(f"{spec}: a folder, not a file", fix="name the JSONL file inside it")
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise DataError(
            f"{spec}: {path.suffix or 'no ending'} is not a known file type",
            fix="convert it to JSONL: one object a line",
        )
    if path.suffix.lower() == ".json" and not _is_jsonl(path):
        yield from _read_json(path, spec)
        return
    try:
        for number, row in read_jsonl(path):
            yield f"{spec}:{number}", row
    except DataError as error:
        raise DataError(
            error.message, fix=f"{error.fix}; data.drop_invalid does not cover such a line"
        ) from error


def _is_jsonl(path: Path) -> bool:
    """Whether the first line that is not blank is a whole JSON object: many JSONL files are named .json."""
    with os_errors(), open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
        more = any(line.strip() for line in file)
    try:
        return isinstance(json.loads(first), dict) and (more or not _row_list(json.loads(first)))
    except (ValueError, RecursionError):
        return False


def _row_list(value: Mapping[str, Any]) -> list[Any]:
    """The list of rows inside an object such as ``{"data": [...]}``."""
    lists = [
        item
        for item in value.values()
        if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)
    ]
    return lists[0] if len(lists) == 1 and len(value) == 1 else []


def _read_json(path: Path, spec: str) -> Iterator[tuple[str, Row]]:
    with os_errors():
        raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig")) if raw.strip() else []
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {error.start} of the file)", fix="save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON: {error}", fix="one list of objects is needed, or JSONL: one object a line"
        ) from error
    if isinstance(value, dict):
        value = _row_list(value) or [value]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: no list of objects", fix="write [{...}, {...}], or JSONL: one object a line"
        )
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}[{index}]: a {type(row).__name__}, not an object",
                fix="one JSON object a row is needed",
            )
        yield f"{spec}[{index}]", row


def _read_hub(config: SourceConfig) -> Iterator[tuple[str, Row]]:
    name, _, subset = str(config.hub).partition(":")
    fix = (
        "check the name, the network and the right to read it (hf auth login); offline, download it and give "
        "its path"
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{name}: the package datasets is missing", fix="pip install datasets") from error
    try:
        rows = iter(
            load_dataset(
                name, subset or None, split=config.hub_split, revision=config.revision, streaming=True
            )
        )
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            yield f"{name}:{number}", dict(row)
    except DataError:
        raise
    except Exception as error:  # the Hub's client raises dozens of types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: the data set cannot be read: {reason}", fix=fix) from error


def _generate(config: SourceConfig) -> Iterator[tuple[str, Row]]:
    name = str(config.generator)
    if not name.isidentifier() or packaged(f"{name}/generator.py") is None:
        known = sorted(
            path.parent.name for path in Path(resolve_asset("asset:templates")).parent.glob("*/generator.py")
        )
        raise ConfigError(f"no generator {name!r}", fix=known_names(name, known, "packaged"))
    options: dict[str, Any] = {"seed": config.seed, "noise": config.noise, "part": config.part or "train"}
    if config.count:
        options["count"] = config.count
    try:
        rows = import_module(f"mlx_distill.assets.{name}.generator").generate(**options)
        for index, row in enumerate(rows):
            yield f"{name} generator:{index}", row
    except ValueError as error:
        raise ConfigError(f"the generator {name!r}: {error}", fix="change the source's settings") from error
