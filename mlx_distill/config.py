"""YAML files as dataclasses: types are checked, unknown keys refused, defaults stand in the fields alone."""

from __future__ import annotations

import dataclasses
import datetime
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mlx_distill.errors import ConfigError, from_os_error
from mlx_distill.text import did_you_mean

T = TypeVar("T")

ASSETS = Path(__file__).parent / "assets"
_NEEDED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    keyed: bool = True,
    default_keyed: bool = True,
    keyed_as: Any = dataclasses.MISSING,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    old_name: str | None = None,
    old_values: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field that carries its own help and limits.

    Args:
        default: The default value. A list or dict is copied, and a dataclass type created, for each instance.
        help: One line, with the unit.
        keyed: Whether it can change a stage's result and so is part of the stage's key.
        default_keyed: Whether it is part of the key at its default too. Not so for an option that was added
            later and whose default changes nothing: finished stages then stay current.
        keyed_as: The value that stands in the key whatever the option is: for one that was keyed in earlier
            versions and changes no result.
        choices: The values allowed.
        low, high: The closed range allowed.
        old_name: What the key was called in earlier versions; see :func:`current_spelling`.
        old_values: ``{old: new}`` of values that were renamed. Keys of stages are computed over the old
            spelling of names and values, so that finished stages stay current.
    """
    metadata = {
        "help": help,
        "keyed": keyed,
        "default_keyed": default_keyed,
        "keyed_as": keyed_as,
        "choices": choices,
        "low": low,
        "high": high,
        "old_name": old_name,
        "old_values": old_values or {},
    }
    if isinstance(default, (list, dict)) or (isinstance(default, type) and dataclasses.is_dataclass(default)):
        factory = default if isinstance(default, type) else (lambda: type(default)(default))
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_mapping(cls: type[T], raw: Any, where: str) -> T:
    """Build ``cls`` from a YAML mapping.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, a wrong type, a value out of
            range.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: a mapping is needed, not {_show(raw)}", fix="write key: value lines")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("settable", True)}  # type: ignore[arg-type]
    for key in raw:
        if key not in fields:
            hint = did_you_mean(str(key), fields) or f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}", fix=hint)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _check(
                _coerce(hints[name], raw[name], f"{where}: {name}"), f.metadata, f"{where}: {name}"
            )
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {name} is missing", fix=f.metadata.get("help") or "add it")
    return cls(**values)


def current_spelling(
    cls: type, raw: Mapping[str, Any], where: str = "", *, replace: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A mapping with the renamed keys and values of ``cls`` under their current names.

    Args:
        cls: The config that the mapping is for. Keys that it does not have are left alone.
        raw: A YAML mapping; configs inside it are renamed too.
        where: Comes first in notes and errors.
        replace: Whether an old name replaces the value under the current name, where both are there.

    Returns:
        The mapping, and a note for each old name that it had.

    Raises:
        ConfigError: a key under both its names, without ``replace``.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    current_names = {f.metadata["old_name"]: f.name for f in fields.values() if f.metadata.get("old_name")}
    hints = typing.get_type_hints(cls)
    prefix = f"{where}: " if where else ""
    out: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in raw.items():
        name = current_names.get(key, key) if isinstance(key, str) else key
        if name != key:
            if name in raw and not replace:
                raise ConfigError(f"{prefix}both {name} and {key}, its old name", fix=f"remove {key}")
            notes.append(f"{prefix}{key} is now called {name}")
        elif name in out:  # set under its old name already
            continue
        if name not in fields:
            out[name] = value
            continue
        renamed = fields[name].metadata.get("old_values", {})
        config = config_in(hints[name])
        if isinstance(value, str) and value in renamed:
            notes.append(f"{prefix}{name}: {value} is now called {renamed[value]}")
            value = renamed[value]
        elif config is not None and isinstance(value, Mapping):
            value, inside = current_spelling(config, value, f"{prefix}{name}", replace=replace)
            notes += inside
        out[name] = value
    return out, notes


def config_in(hint: Any) -> Any:
    """The config that a field's type names: itself, or inside ``list`` or ``| None``."""
    candidates: tuple[Any, ...] = (hint, *typing.get_args(hint))
    return next((kind for kind in candidates if dataclasses.is_dataclass(kind)), None)


def _check(value: Any, metadata: Mapping[str, Any], where: str) -> Any:
    choices, low, high = metadata.get("choices"), metadata.get("low"), metadata.get("high")
    if choices and value is not None and value not in choices:
        raise ConfigError(
            f"{where}: {_show(value)} is not one of {', '.join(map(str, choices))}", fix="choose one of them"
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        meaning = f": {metadata['help']}" if metadata.get("help") else ""
        if low is not None and value < low:
            raise ConfigError(f"{where}: {value} is below {low}", fix=f"at least {low}{meaning}")
        if high is not None and value > high:
            raise ConfigError(f"{where}: {value} is above {high}", fix=f"at most {high}{meaning}")
    return value


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """The value as the type of a field; raises a :class:`ConfigError` where it does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(args, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)  # type: ignore[arg-type]
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: a list is needed, not {_show(value)}", fix="write [a, b]")
        if origin is tuple and args and args[-1] is not Ellipsis and len(args) != len(value):
            raise ConfigError(
                f"{where}: {len(args)} values are needed, not {len(value)}", fix="write [low, high]"
            )
        items = [args[0]] * len(value) if origin is list or args[-1] is Ellipsis else list(args)
        return origin(
            _coerce(item_hint, item, f"{where}[{i}]")
            for i, (item_hint, item) in enumerate(zip(items, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{where}: a mapping is needed, not {_show(value)}", fix="write key: value lines"
            )
        return {
            (key := _key_text(raw_key)): _coerce(args[1], item, f"{where}.{key}")
            for raw_key, item in value.items()
        }
    return _scalar(hint, value, where)


def _key_text(key: Any) -> str:
    """The key of a mapping as text: YAML reads ``0:`` as a number and ``yes:`` as true."""
    return str(key).lower() if isinstance(key, bool) else "null" if key is None else str(key)


def _coerce_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    first: ConfigError | None = None
    for hint in (arg for arg in args if arg is not type(None)):
        try:
            return _coerce(hint, value, where)
        except ConfigError as error:
            # Show the error of the type that the value is meant to have.
            if first is None or (isinstance(value, Mapping) and dataclasses.is_dataclass(hint)):
                first = error
    assert first is not None
    raise first


def _scalar(wanted: type, value: Any, where: str) -> Any:
    if wanted is float and isinstance(value, str):
        with suppress(ValueError):  # YAML 1.1 reads 1e-5 as a string
            value = float(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not a finite number", fix="change the value")
    if isinstance(value, str) and wanted is str and not _is_text(value):
        raise ConfigError(f"{where}: {_show(value)} holds a character that no text has", fix="remove it")
    if isinstance(value, wanted) and not (wanted in (int, float) and isinstance(value, bool)):
        return value
    unquoted = wanted is str and isinstance(value, (int, float, datetime.date))
    fix = "put it in quotes" if unquoted else "change the value"
    if wanted is str and isinstance(value, Mapping) and not any(v is not None for v in value.values()):
        braces = f'"{{{", ".join(map(str, value))}}}"'  # YAML reads {field} as a mapping
        fix = f"put it in quotes: {braces}; on a command line --set 'KEY={braces}'"
    raise ConfigError(f"{where}: {_NEEDED.get(wanted, wanted)} is needed, not {_show(value)}", fix=fix)


def _is_text(value: str) -> bool:
    """Whether a value has neither NUL, which no path may hold, nor half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def to_mapping(value: Any) -> Any:
    """The plain YAML form of a config: dataclasses become dicts, tuples lists. Fields that no YAML file may
    set are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        settable = [f for f in dataclasses.fields(value) if f.metadata.get("settable", True)]
        return {f.name: to_mapping(getattr(value, f.name)) for f in settable}
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    return value


def keyed(value: Any) -> Any:
    """Like :func:`to_mapping`, without the fields that cannot change a result, and with the old spelling of
    renamed names and values, so that the keys of finished stages stay the same.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.metadata.get("old_name") or f.name: _old_value(f, keyed(_keyed_value(f, value)))
            for f in dataclasses.fields(value)
            if f.metadata.get("keyed", True) and not _left_out_at_default(f, getattr(value, f.name))
        }
    if isinstance(value, Mapping):
        return {key: keyed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [keyed(item) for item in value]
    return value


def _keyed_value(field: dataclasses.Field[Any], config: Any) -> Any:
    """The value of an option that its stages' keys are computed over."""
    fixed = field.metadata.get("keyed_as", dataclasses.MISSING)
    return getattr(config, field.name) if fixed is dataclasses.MISSING else fixed


def _left_out_at_default(field: dataclasses.Field[Any], value: Any) -> bool:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return not field.metadata.get("default_keyed", True) and bool(value == default)


def defaults_left_out(value: Any) -> dict[str, Any]:
    """The defaults of a config's options that :func:`keyed` leaves out."""
    return {f.name: f.default for f in dataclasses.fields(value) if not f.metadata.get("default_keyed", True)}


def _old_value(field: dataclasses.Field[Any], value: Any) -> Any:
    old_values = {new: old for old, new in field.metadata.get("old_values", {}).items()}
    return old_values.get(value, value) if isinstance(value, str) else value


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that differ, for people; lists and mappings are named without their values.

    >>> changes({"steps": 200, "seed": 0}, {"steps": 40, "seed": 0, "betas": [0.9]})
    ['steps was 200, is 40', 'betas has changed']
    """
    out = []
    for name in dict.fromkeys([*new, *old]):
        before, after = old.get(name), new.get(name)
        if before != after:
            is_long = any(isinstance(value, Mapping | list) for value in (before, after))
            values = "has changed" if is_long else f"was {_show(before)}, is {_show(after)}"
            out.append(f"{name} {values}")
    return out


def read_yaml(path: str | Path, fix: str = "check the path") -> dict[str, Any]:
    """A YAML mapping from a file; an unreadable one is a :class:`ConfigError` with the line.

    Args:
        path: The file.
        fix: What to do where there is none.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file", fix=fix) from error
    except OSError as error:
        raise from_os_error(error) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8",
            fix="save the file as UTF-8, for example with: iconv -f latin1 -t utf-8",
        ) from error
    try:
        raw = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply", fix="write key: value lines") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{at}: not valid YAML: {getattr(error, 'problem', error)}", fix="correct that line"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: no mapping at the top", fix="write key: value lines")
    return raw


Overrides = Sequence[str] | Mapping[str, Any]


def override(raw: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Set keys of a nested mapping.

    Args:
        raw: The mapping, which is not changed.
        overrides: ``{"distill.epochs": 2}``, or texts such as ``distill.epochs=2``, whose values are read as
            YAML. A number in a dotted name is the position in a list, counted from 0.

    Raises:
        ConfigError: a text is not KEY=VALUE, or a list has no such position.

    >>> override({"distill": {"epochs": 1}}, ["distill.epochs=2"])
    {'distill': {'epochs': 2}}
    >>> override({"data": {"sources": [{"count": 9}]}}, {"data.sources.0.count": 5})
    {'data': {'sources': [{'count': 5}]}}
    """
    import copy

    out: dict[str, Any] = copy.deepcopy(dict(raw))
    for name, value in (pair for one in override_items(overrides) for pair in one.items()):
        keys = [key.strip() for key in str(name).split(".")]
        if not all(keys):
            raise ConfigError(f"{name}: not the name of a key", fix="write distill.learning_rate")
        node: Any = out
        for depth, key in enumerate(keys[:-1]):
            child = _item(node, key, keys[: depth + 1])
            if isinstance(child, str):  # such as task: music, which is short for task: {name: music}
                child = {"name": child}
            elif not isinstance(child, list | Mapping):
                child = {}
            child = list(child) if isinstance(child, list) else dict(child)
            _set_item(node, key, child)
            node = child
        _item(node, keys[-1], keys)
        _set_item(node, keys[-1], value)
    return out


def override_items(overrides: Overrides) -> list[Mapping[str, Any]]:
    """Overrides one by one, each as a mapping of one key.

    >>> override_items(["distill.epochs=2"])
    [{'distill.epochs': 2}]
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_assignment, overrides)
    return [{name: value} for name, value in pairs]


def override_texts(overrides: Overrides) -> list[str]:
    """Overrides as texts for the command line.

    >>> override_texts({"distill.epochs": 2, "data.domains": ["a"]})
    ['distill.epochs=2', 'data.domains=["a"]']
    """
    import json

    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{name}={json.dumps(to_mapping(value), default=str)}" for name, value in overrides.items()]


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    path, equals, value = text.partition("=")
    if not equals or not all(key.strip() for key in path.split(".")):
        raise ConfigError(f"--set {text}: not KEY=VALUE", fix="write --set distill.learning_rate=1e-5")
    try:
        # On the command line a # begins no comment: '### Label:' is a text.
        return path, value if value.lstrip().startswith("#") else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML", fix="quote it") from error


def _item(node: Any, key: str, path: Sequence[str]) -> Any:
    """The value under a key of a mapping, or at a position of a list; a scalar has none."""
    if not isinstance(node, list):
        return node.get(key)
    if not key.isdigit() or int(key) >= len(node):
        where = ".".join(path[:-1])
        positions = f"0 to {len(node) - 1}" if node else "none, it is empty"
        raise ConfigError(
            f"{'.'.join(path)}: {where} is a list and has no position {key!r}",
            fix=f"positions: {positions}; or set the whole list: {where}=[...]",
        )
    return node[int(key)]


def _set_item(node: Any, key: str, value: Any) -> None:
    node[int(key) if isinstance(node, list) else key] = value


def packaged(name: str) -> Path | None:
    """The packaged file or folder of that name under ``assets``, or None; never one outside it."""
    path = (ASSETS / name).resolve()
    return path if name and path.is_relative_to(ASSETS.resolve()) and path.exists() else None


def asset_name(path: str) -> str:
    """The name of a packaged file as a recipe writes it, whatever folder the package is installed in; other
    paths as they are.

    >>> asset_name(str(ASSETS / "models" / "tiny-qwen3")), asset_name("Qwen/Qwen3-8B")
    ('asset:models/tiny-qwen3', 'Qwen/Qwen3-8B')
    """
    inside = Path(path)
    return f"asset:{inside.relative_to(ASSETS).as_posix()}" if inside.is_relative_to(ASSETS) else path


def resolve_asset(spec: str, base: Path | None = None) -> str:
    """The path that a recipe names: ``asset:NAME`` is a packaged file, and a relative path is looked up in
    ``base`` (the recipe's folder) first. What does not exist is returned as it is, such as a model's id.
    """
    if spec.startswith("asset:"):
        path = packaged(spec.removeprefix("asset:"))
        if path is None:
            raise ConfigError(f"no packaged file {spec!r}", fix="see: mlx-distill recipes list")
        return str(path)
    candidate = Path(spec).expanduser()
    if base and not candidate.is_absolute() and (base / candidate).exists():
        return str(base / candidate)
    return str(candidate) if candidate.exists() else spec
