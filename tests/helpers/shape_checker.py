"""The check of the signatures that have shapes: jaxtyping's import hook, with beartype for the values.

The hook decorates every function of a module. Here only those with an array in the signature are checked:
plain types are mypy's, which ignores those of mlx, and a checked call takes many times as long.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# PEP 484's numeric tower: an int is accepted as a float.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def install(modules: Iterable[str]) -> None:
    """Check calls of these modules, which must not be imported yet."""
    jaxtyping.jaxtyped = _decorator  # what the hook writes over each function and class
    jaxtyping.install_import_hook(list(modules), "helpers.check")


def has_shapes(annotations: Iterable[Any], names: dict[str, Any]) -> bool:
    """Whether one of the annotations has a type of jaxtyping; ``names`` are those of their module."""
    words = {word for annotation in annotations for word in re.findall(r"\w+", str(annotation))}
    return any(_is_shape(names.get(word)) for word in words)


def _is_shape(value: Any) -> bool:
    module = getattr(value, "__module__", "") or ""
    return module.split(".")[0] == "jaxtyping" or any(map(_is_shape, typing.get_args(value)))


def _decorator(*, typechecker: Any) -> Any:
    def decorate(made: Any) -> Any:
        function = made.__init__ if inspect.isclass(made) else made
        annotations = getattr(function, "__annotations__", {}).values()
        names = getattr(function, "__globals__", {})
        # What an inner function is given is its outer one's affair; each call of that one would decorate it
        # anew, which takes milliseconds.
        outer = "<locals>" not in made.__qualname__
        if has_shapes(annotations, names) or (outer and _has_arrays(annotations)):
            return _jaxtyped(made, typechecker=typechecker)
        return made

    return decorate


def _has_arrays(annotations: Iterable[Any]) -> bool:
    return any("array" in str(annotation) for annotation in annotations)
