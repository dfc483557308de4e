"""The keys of a config for people: names, types, help, defaults and limits, section by section."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.config import config_in, to_mapping

_TYPES: dict[Any, str] = {
    Any: "any value",
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config, for people. ``default`` is in its plain YAML form; ``needed`` says that there is no
    default, ``nullable`` that the value may be none.
    """

    name: str
    type: str
    help: str
    default: Any = None
    needed: bool = False
    choices: Sequence[str] | None = None
    low: float | None = None
    high: float | None = None
    nullable: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys of a config that hold values, under the config's dotted name. Keys that hold configs are
    sections of their own.
    """

    name: str
    help: str
    keys: Sequence[Key]


def sections(cls: type, name: str) -> list[Section]:
    """Every key of a config and of the configs inside it.

    >>> from mlx_distill.recipe import ControlsConfig
    >>> section, = sections(ControlsConfig, "controls")
    >>> section.name, [key.name for key in section.keys]
    ('controls', ['labels', 'text', 'labels_hard', 'teacher_hard'])
    """
    hints, keys, inside = typing.get_type_hints(cls), [], []
    for f in dataclasses.fields(cls):
        if not f.metadata.get("settable", True):
            continue
        config = config_in(hints[f.name])
        part = f"{name}.{f.name}".removeprefix("recipe.")
        if config is not None:
            inside.append((part, config))
        if config is hints[f.name]:
            continue
        factory = f.default_factory
        default = f.default if factory is dataclasses.MISSING else factory()
        needed = default is dataclasses.MISSING
        limits = {limit: f.metadata.get(limit) for limit in ("choices", "low", "high")}
        text = _type_text(hints[f.name]) if config is None else f"{_container(hints[f.name])}, see {part}"
        plain = None if needed else to_mapping(default)
        nullable = type(None) in typing.get_args(hints[f.name])
        keys.append(Key(f.name, text, f.metadata.get("help", ""), plain, needed, **limits, nullable=nullable))
    out = [Section(name, (cls.__doc__ or "").strip().split("\n")[0], keys)]
    for part, config in inside:
        out += sections(config, part)
    return out


def _container(hint: Any) -> str:
    return "list" if typing.get_origin(hint) is list else "mapping"


def _type_text(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(arg) for arg in args if arg is not type(None))
    if origin in (list, tuple):
        return "list"
    return "mapping" if isinstance(origin, type) and issubclass(origin, Mapping) else _TYPES[hint]
