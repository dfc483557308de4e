"""A recipe as the texts of a form, and back: the inputs are those of the recipe's dataclasses.

An input that is left empty is a key that the recipe does not have, so that its default holds. Keys that hold
mappings are written as YAML. A list of mappings (``data.sources``, ``goals``) has a group of inputs an item,
named ``data.sources.0.path``; items that are empty throughout are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from mlx_distill.config import from_mapping, to_mapping
from mlx_distill.config_sections import Key, Section
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import Recipe, recipe_sections

Texts = Mapping[str, str]

_TOP = "recipe"  # the section of the keys without a block
_MAX_ITEMS = 50
# The keys that the form shows unfolded; every other one is one click away.
_TRAINING = (
    "method",
    "learning_rate",
    "epochs",
    "steps",
    "batch_size",
    "accumulate",
    "lora_rank",
    "max_length",
)
COMMON: Mapping[str, tuple[str, ...]] = {
    _TOP: ("name", "task", "teacher", "student"),
    "data": ("valid_fraction", "test_fraction"),
    "data.sources": ("path", "hub", "generator", "count", "split"),
    "teach": _TRAINING,
    "targets": ("text", "top_k"),
    "distill": (*_TRAINING, "label_weight", "label_temperature"),
    "quantize": ("mode", "refine"),
    "evaluate": ("batch_size", "max_rows"),
    "goals": ("model", "metric", "at_least", "at_most"),
}
_TITLES = {_TOP: "Models and task", "data.sources": "Rows"}


@dataclass(frozen=True)
class Input:
    """One input of the form.

    Attributes:
        name: Its name in the form, such as ``teach.learning_rate`` or ``data.sources.0.path``.
        key: The key of the recipe.
        text: What stands in it.
        errors: What is wrong with it.
    """

    name: str
    key: Key
    text: str
    errors: Sequence[str] = ()

    @property
    def kind(self) -> str:
        """``choice``, ``yaml``, ``number`` or ``text``."""
        if self.options:
            return "choice"
        kind = _kind(self.key)
        if kind == "text or mapping":
            return "yaml" if self.text.lstrip().startswith("{") else "text"
        return {"list": "text", "whole number": "number"}.get(kind, "yaml" if kind in _AS_YAML else kind)

    @property
    def options(self) -> list[str]:
        """The values that can be chosen, where there are few."""
        if _kind(self.key) == "true or false":
            return ["true", "false"]
        options = list(self.key.choices or ())
        return (
            [*options, "none"] if options and self.key.nullable and self.key.default is not None else options
        )

    @property
    def default(self) -> str:
        """The default as a text; empty where there is none."""
        return (
            ""
            if self.key.needed or self.key.default in (None, [], {})
            else value_text(self.key, self.key.default)
        )


@dataclass(frozen=True)
class Group:
    """A section of the form, or one item of a list of mappings.

    Attributes:
        name: The section of the recipe.
        title, help: For people.
        common, more: Its inputs; ``more`` are folded.
        item: Which item it is, from 0; None for a section that is no list.
    """

    name: str
    title: str
    help: str
    common: Sequence[Input]
    more: Sequence[Input]
    item: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether the folded inputs must be shown: one of them is filled or wrong."""
        return any(one.text or one.errors for one in self.more)


@cache
def form_sections() -> dict[str, Section]:
    """The sections of the form in their order: rows stand before what is done with them."""
    every = {section.name: section for section in recipe_sections()}
    inside = {name for name in every if name.count(".") > 1}  # written as YAML in the input around them
    order = sorted(every, key=lambda name: (list(every).index(name.split(".")[0]), name == "data"))
    return {name: every[name] for name in order if name not in inside}


def is_list(section: str) -> bool:
    """Whether a section of the recipe is a list of mappings."""
    parent, _, name = section.rpartition(".")
    keys = {key.name: key for key in form_sections()[parent or _TOP].keys} if section != _TOP else {}
    return name in keys and keys[name].type.startswith("list, see")


def groups(texts: Texts, errors: Mapping[str, Sequence[str]] | None = None) -> list[Group]:
    """The groups of inputs of a form, with an empty item at the end of each list.

    Args:
        texts: The texts of the inputs, by name.
        errors: What is wrong with each.
    """
    out = []
    for name, section in form_sections().items():
        for item in range(_count(name, texts) + 1) if is_list(name) else (None,):
            prefix = "" if name == _TOP else f"{name}." if item is None else f"{name}.{item}."
            inputs = [
                Input(
                    prefix + key.name,
                    key,
                    texts.get(prefix + key.name, ""),
                    (errors or {}).get(prefix + key.name, ()),
                )
                for key in section.keys
                if not key.type.startswith("list, see")
            ]
            common = COMMON.get(name, ())
            shown = [one for one in inputs if one.key.name in common]
            shown.sort(key=lambda one: common.index(one.key.name))
            title, _, help = section.help.partition(": ")
            out.append(
                Group(
                    name,
                    _TITLES.get(name, title if help else name),
                    help or section.help,
                    shown,
                    [one for one in inputs if one.key.name not in common],
                    item,
                )
            )
    return out


def _count(section: str, texts: Texts) -> int:
    """The number of filled items of a list."""
    return 1 + max((int(match[1]) for name in texts if (match := _item_of(section, name))), default=-1)


def _item_of(section: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(section) + r"\.([0-9]{1,6})\.(\w+)", name)


# -- texts of a recipe


_AS_YAML = ("mapping", "any value", "text or mapping")


def _kind(key: Key) -> str:
    return key.type.partition(",")[0]


def texts_of(raw: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the inputs for a recipe, by name; keys that the recipe does not have are left out.

    Args:
        raw: The recipe in its plain YAML form, with current names.

    >>> texts_of({"name": "a", "student": None, "data": {"sources": [{"path": "rows.jsonl", "count": 5}]}})
    {'name': 'a', 'student': 'none', 'data.sources.0.path': 'rows.jsonl', 'data.sources.0.count': '5'}
    """
    out: dict[str, str] = {}
    for name, section in form_sections().items():
        node: Any = raw
        for part in () if name == _TOP else name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        items = list(enumerate(node or ())) if is_list(name) else [(None, node or {})]
        for item, values in items:
            prefix = "" if name == _TOP else f"{name}." if item is None else f"{name}.{item}."
            out |= {
                prefix + key.name: value_text(key, values[key.name])
                for key in section.keys
                if key.name in values and not key.type.startswith("list, see")
            }
    return out


def value_text(key: Key, value: Any) -> str:
    """A value of a key as the text of its input."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = value and value == value.strip() and value[0] not in "\"'[{" and value != "none"
        return (
            value
            if (plain or value in (key.choices or ())) and _kind(key) != "any value"
            else json.dumps(value)
        )
    if isinstance(value, list) and _kind(key) == "list" and all(map(_is_plain_item, value)) and value:
        return ", ".join(value)
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(to_mapping(value), ensure_ascii=False)  # JSON is YAML in one line


def _is_plain_item(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) is not None


# -- a recipe of texts


def read_texts(texts: Texts) -> tuple[dict[str, Any], dict[str, str], dict[str, list[str]]]:
    """The recipe of a form.

    Returns:
        The recipe in its plain YAML form; the texts of the inputs that are filled, with the items of lists
        numbered anew; what is wrong with an input whose YAML cannot be read.

    Raises:
        ConfigError: an input that no recipe has, such as one that allows remote code.

    >>> read_texts({"name": "a", "teach.epochs": "2", "goals.3.model": "student"})[0]
    {'name': 'a', 'teach': {'epochs': 2.0}, 'goals': [{'model': 'student'}]}
    """
    raw: dict[str, Any] = {}
    kept: dict[str, str] = {}
    errors: dict[str, list[str]] = {}
    places = dict(_placed({name: text for name, text in texts.items() if text.strip()}))
    for name in texts:
        if not texts[name].strip():
            key_of(name)  # an unknown input is refused, filled or not
    for name, (path, key) in places.items():
        new_name = ".".join(map(str, path))
        kept[new_name] = texts[name]
        try:
            value = _value(key, texts[name].strip())
        except ConfigError as error:
            errors[new_name] = [error.message]
            continue
        _set(raw, path, value)
    return raw, kept, errors


def _placed(texts: Texts) -> Iterator[tuple[str, tuple[tuple[str | int, ...], Key]]]:
    """The path in the recipe and the key of each input; items of lists are numbered without gaps."""
    numbers: dict[str, dict[int, int]] = {}
    found = {name: key_of(name) for name in texts}
    for section, item, _ in found.values():
        if item is not None:
            numbers.setdefault(section, {})[item] = 0
    for section, items in numbers.items():
        numbers[section] = {item: number for number, item in enumerate(sorted(items))}
    for name, (section, item, key) in found.items():
        path: tuple[str | int, ...] = () if section == _TOP else tuple(section.split("."))
        yield name, ((*path, *(() if item is None else (numbers[section][item],)), key.name), key)


def key_of(name: str) -> tuple[str, int | None, Key]:
    """The section, the item and the key of an input.

    Raises:
        ConfigError: an input that no recipe has.
    """
    section, _, last = name.rpartition(".")
    item = None
    if numbered := re.fullmatch(r"(.+)\.([0-9]{1,6})", section):
        section, item = numbered[1], int(numbered[2])
    known = form_sections().get(section or _TOP)
    key = next((key for key in known.keys if key.name == last), None) if known else None
    if known is None or key is None or (item is not None) != is_list(known.name) or (item or 0) >= _MAX_ITEMS:
        raise ConfigError(f"{name!r}: no key of a recipe", fix="see: mlx-distill recipes keys")
    return known.name, item, key


def _set(raw: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    node: Any = raw
    for part, following in pairwise(path):
        if isinstance(node, list) and int(part) == len(node):
            node.append({})
        elif isinstance(node, dict):
            node.setdefault(part, [] if isinstance(following, int) else {})
        node = node[part]
    node[path[-1]] = value


def _value(key: Key, text: str) -> Any:
    """The value of an input; a text that does not fit the key's type stays one, and is refused later."""
    kind = _kind(key)
    if text == "none" and key.nullable and kind not in _AS_YAML:
        return None
    if text in (key.choices or ()):
        return text
    if kind == "true or false":
        return {"true": True, "false": False}.get(text, text)
    if kind in ("whole number", "number"):
        try:
            return int(text) if kind == "whole number" else float(text)
        except ValueError:
            return text
    if kind == "list" and not text.startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    if kind in ("list", "mapping", "any value") or text[0] in "\"'{":
        return _yaml(text)
    return text


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or "nested too deeply"
        raise ConfigError(f"not valid YAML: {problem}", fix="write {key: value, ...}") from error


# -- differences


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys of two recipes whose values differ, with both values; a missing key has its default.

    Args:
        old, new: Recipes in their plain YAML form, both valid.

    >>> old = {"name": "a", "task": "music", "teacher": "x"}
    >>> differences(old, old | {"teach": {"epochs": 2}})
    [('teach.epochs', 1.0, 2.0)]
    """
    before, after = (to_mapping(from_mapping(Recipe, raw, "recipe")) for raw in (old, new))
    return list(_different("", before, after))


def _different(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    sections = form_sections()
    for key in dict.fromkeys([*old, *new]):
        path = f"{name}.{key}" if name else key
        one, other = old.get(key), new.get(key)
        if path in sections and not is_list(path):
            yield from _different(path, one, other)
        elif one != other:
            yield path, one, other
