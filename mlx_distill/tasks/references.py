"""The key ``references`` of a task: which checkers judge which fields of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError, from_os_error
from mlx_distill.text import known_names

# The keys of each kind of checker, beside ``kind``.
CHECKER_KEYS: Mapping[str, tuple[str, ...]] = {
    "scripture": ("versification", "checked"),
    "vocabulary": ("list", "checked"),
    "support": ("in",),
}
_FUNCTION_KEYS = ("checked",)
_EXAMPLE = "{kind: scripture}, {kind: vocabulary, list: [...]}, {kind: support, in: [...]}, module:function"


@dataclass(frozen=True)
class Checker:
    """A checker of one field of the answer: its kind, or ``module:function``, and its other keys."""

    field: str
    kind: str
    options: Mapping[str, Any]

    @property
    def is_function(self) -> bool:
        """Whether the user's own function judges."""
        return ":" in self.kind


def parse_checkers(references: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> list[Checker]:
    """The checkers of a task.

    Args:
        references: Field of the answer to a checker or a list of them: a mapping with ``kind``, or
            ``module:function``.
        schema: The schema of the answer.
        where: The beginning of error messages.

    Raises:
        ConfigError: no such field, kind or key.

    >>> schema = {"properties": {"verses": {"type": "array"}}}
    >>> checkers = [{"kind": "scripture"}, {"kind": "support", "in": ["lyrics"]}]
    >>> [checker.kind for checker in parse_checkers({"verses": checkers}, schema, "task")]
    ['scripture', 'support']
    """
    properties = schema.get("properties") or {}
    out = []
    for name, entries in references.items():
        if name not in properties:
            raise ConfigError(
                f"{where}: {name!r} is no field of the answer",
                fix=known_names(name, properties, "fields are"),
            )
        listed = entries if isinstance(entries, (list, tuple)) else [entries]
        checkers = [_checker(name, entry, f"{where}: {name}") for entry in listed]
        for checker in checkers:
            if checker.kind == "vocabulary" and "list" not in checker.options and not _enum(properties[name]):
                raise ConfigError(
                    f"{where}: {name}: vocabulary without list",
                    fix="list: [names] or a file with a name a line; a field with an enum needs none",
                )
        if len([1 for checker in checkers if checker.kind != "support"]) > 1:
            raise ConfigError(
                f"{where}: {name}: two checkers say whether it is valid",
                fix="keep one; support can stand beside it",
            )
        out += checkers
    return out


def _checker(name: str, entry: Any, where: str) -> Checker:
    entry = {"kind": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("kind"), str):
        raise ConfigError(f"{where}: {entry!r} is no checker", fix=f"write one of {_EXAMPLE}")
    kind = entry["kind"]
    module, _, function = kind.partition(":")
    if kind not in CHECKER_KEYS and not (module and function):
        raise ConfigError(
            f"{where}: no checker {kind!r}",
            fix=known_names(kind, CHECKER_KEYS, "checkers are") + ", or module:function",
        )
    options = {key: value for key, value in entry.items() if key != "kind"}
    known = CHECKER_KEYS.get(kind, _FUNCTION_KEYS)
    for key in options:
        if key not in known:
            fix = known_names(key, known, "keys are")
            raise ConfigError(f"{where}: {kind}: unknown key {key!r}", fix=fix)
    for key in ("list", "in"):
        value = options.get(key, [])
        names = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, str) and item for item in names) or (key in options and not names):
            raise ConfigError(f"{where}: {key}: {value!r}", fix="give texts, in quotes where YAML needs them")
    for key in ("versification", "checked"):
        if not isinstance(options.get(key, ""), str):
            raise ConfigError(f"{where}: {key}: {options[key]!r}", fix="give the name of a file")
    return Checker(name, kind, options)


def _enum(schema: Any) -> list[str]:
    """The values that a field, or the items of a list, may have."""
    for part in (schema, schema.get("items") if isinstance(schema, Mapping) else None):
        if isinstance(part, Mapping) and isinstance(part.get("enum"), list):
            return [value for value in part["enum"] if isinstance(value, str)]
    return []


def with_vocabularies(references: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The checkers with the schema's enum as the list of each vocabulary that has none.

    >>> with_vocabularies({"mood": {"kind": "vocabulary"}}, {"properties": {"mood": {"enum": ["joy"]}}})
    {'mood': {'kind': 'vocabulary', 'list': ['joy']}}
    """

    def filled(name: str, entry: Any) -> Any:
        kind = entry.get("kind") if isinstance(entry, Mapping) else entry
        if kind != "vocabulary" or (isinstance(entry, Mapping) and "list" in entry):
            return entry
        options = entry if isinstance(entry, Mapping) else {"kind": kind}
        return {**options, "list": _enum(schema["properties"][name])}

    return {
        name: [filled(name, entry) for entry in entries]
        if isinstance(entries, (list, tuple))
        else filled(name, entries)
        for name, entries in references.items()
    }


def read_names(path: Path) -> list[str]:
    """The names of a list, one a line; empty lines and those that begin with ``#`` are none.

    Raises:
        ConfigError: no names, or a file that is not text.
    """
    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise from_os_error(error, path) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8 text", fix="write one name a line") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise ConfigError(f"{path} has no names", fix="write one name a line")
    return names
