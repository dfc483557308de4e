"""A user's own functions: ``module:function`` in a task."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_distill.errors import ConfigError


def load_function(name: str, folders: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Args:
        name: The module, which may be a file beside the task or the recipe, and the function in it.
        folders: Where modules are looked for besides Python's own path: the task's ``folders``.

    Raises:
        ConfigError: no such module or function, or a module that fails when it is imported.

    >>> load_function("math:sqrt")(9)
    3.0
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"{name!r} names no function", fix="write module:function")
    with _also_in(folders):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{name}: no module {error.name!r}",
                fix=f"write {module.partition('.')[0]}.py beside the task, or install it",
            ) from error
        except Exception as error:
            raise ConfigError(
                f"{name}: importing {module} fails: {error!r}", fix="correct the module"
            ) from error
    found = getattr(loaded, function, None)
    if not callable(found):
        names = [name for name, value in vars(loaded).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"{name}: {module} has no function {function!r}", fix=f"it has {', '.join(names)}")
    return found


@contextmanager
def _also_in(folders: Sequence[str]) -> Iterator[None]:
    """Let modules be found in these folders too."""
    before = list(sys.path)
    sys.path[:0] = [folder for folder in folders if folder not in before]
    try:
        yield
    finally:
        sys.path[:] = before
