"""A user's own metric: a function that gives each row a value."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.classification import Row
from mlx_distill.text import known_names


def user_values(
    spec: str, options: Mapping[str, Any], folders: Sequence[str], where: str
) -> Callable[[Sequence[Row]], list[float | None]]:
    """The values of a user's function for each row.

    The function is called once with a list of rows, whose answers are valid: dicts with ``id``, ``answer``,
    ``truth`` (None where the row has no true answer), ``fields`` and the rest of ``predictions.jsonl``;
    options of the metric are keyword arguments. It returns one value a row: a number from 0 to 1 or a bool,
    higher is better, or None for a row that does not count. Rows whose answer is not valid are not given to
    it, they count 0.

    Args:
        spec: ``module:function``; the module is looked for in ``folders`` first, then as any other import.
        options: Keyword arguments.
        folders: Those of the task.
        where: Begins every error message.

    Raises:
        ConfigError: the module or the function is not there.
    """
    function = load_function(spec, folders, where)

    def values(rows: Sequence[Row]) -> list[float | None]:
        valid = [dict(row) for row in rows if row.get("answer") is not None]
        try:
            results = list(function(valid, **options)) if valid else []
        except Exception as error:
            raise DataError(
                f"{where}: the function failed: {type(error).__name__}: {error}",
                fix="correct it: it gets a list of rows and returns one number or None for each",
            ) from error
        if len(results) != len(valid):
            raise DataError(
                f"{where}: {len(results)} values for {len(valid)} rows",
                fix="return one number or None for each row",
            )
        checked = iter(_checked(value, row, where) for value, row in zip(results, valid, strict=True))
        return [0.0 if row.get("answer") is None else next(checked) for row in rows]

    return values


def _checked(value: Any, row: Row, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise DataError(
            f"{where}: {value!r} for row {row.get('id')!r}", fix="return a number from 0 to 1, or None"
        )
    return number


def load_function(spec: str, folders: Sequence[str], where: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
        ConfigError: the module or the function is not there.
    """
    name, _, attribute = spec.partition(":")
    try:
        module = _load_module(name, folders)
    except Exception as error:
        places = ", ".join(folders) or "no folder of a task"
        raise ConfigError(
            f"{where}: the module {name!r} cannot be imported: {type(error).__name__}: {error}",
            fix=f"put {name}.py beside the task or the recipe ({places}), or install it",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"{where}: {name} has no function {attribute!r}",
            fix=known_names(attribute, known, "its functions") if known else "define it there",
        )
    return function


def _load_module(name: str, folders: Sequence[str]) -> ModuleType:
    """A module from a file in one of the folders, else as any other import."""
    for folder in folders:
        path = Path(folder) / f"{name.replace('.', '/')}.py"
        if path.is_file():
            key = f"mlx_distill_metrics.{path.resolve()}"
            module_spec = importlib.util.spec_from_file_location(key, path)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[key] = module  # dataclasses look their module up there
            sys.path.insert(0, str(folder))  # for what it imports from its own folder
            try:
                module_spec.loader.exec_module(module)
            finally:
                sys.path.remove(str(folder))
            return module
    return importlib.import_module(name)
