"""What is wrong with a recipe that came over HTTP, input by input, before a job is made of it."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_distill.config import current_spelling, from_mapping, packaged, read_yaml
from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.ledger.root import STATE, Root
from mlx_distill.recipe import Recipe, load_recipe, recipe_names
from mlx_distill.serve.pages.recipe_form import form_sections, is_list, key_of
from mlx_distill.tasks.task import task_names

_MAX_PROBLEMS = 20
_PLACEHOLDERS: Mapping[str, Any] = {"name": "recipe", "teacher": "none/none"}
GENERAL = ""
"""The name under which problems stand that belong to no input."""


def read_recipe(root: Root, spec: str) -> dict[str, Any]:
    """A packaged recipe by name or a file under the root, in its plain YAML form, with paths relative to the
    root.

    Raises:
        ConfigError: no such recipe, or a path that is not under the root.
    """
    if spec in recipe_names():
        path = Path(__file__).parents[2] / f"assets/recipes/{spec}.yaml"
        return current_spelling(Recipe, read_yaml(path), spec)[0]
    path = root.inside(spec)
    raw = current_spelling(Recipe, read_yaml(path), spec)[0]
    return with_paths(raw, lambda value: _moved(value, path.parent, root.path))


def written_recipe(raw: Mapping[str, Any], root: Root, folder: Path) -> str:
    """A recipe whose paths are relative to the root as a YAML file for ``folder``."""
    import yaml

    moved = with_paths(raw, lambda value: _moved(value, root.path, folder))
    return str(yaml.safe_dump(moved, sort_keys=False, allow_unicode=True, width=100))


def _moved(value: str, old: Path, new: Path) -> str:
    """A path relative to one folder as one relative to another; what does not exist there is left as it is:
    an id of the Hub, a packaged file, or a path that is wrong.
    """
    if value.startswith(("asset:", "~")) or Path(value).is_absolute() or not (old / value).exists():
        return value
    return Path(os.path.relpath(old / value, new)).as_posix()


def with_paths(raw: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a recipe in which every key that can hold a path is changed."""
    out: dict[str, Any] = copy.deepcopy(dict(raw))
    for node, key, _ in _paths(out):
        node[key] = change(node[key])
    return out


def _paths(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The mappings and keys of a recipe that hold a path, with the name of the input."""
    places: list[tuple[Any, str, str]] = [(raw, name, name) for name in ("task", "teacher", "student")]
    places += [(raw.get("task"), name, "task") for name in ("name", "edge_cases")]
    places += [(raw.get("evaluate"), "costs", "evaluate.costs")]
    places += [(raw.get("targets"), "system_file", "targets.system_file")]
    data = raw.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for number, source in enumerate(sources if isinstance(sources, list) else ()):
        places += [(source, name, f"data.sources.{number}.{name}") for name in ("path", "sqlite")]
    for node, key, name in places:
        if isinstance(node, dict) and isinstance(node.get(key), str):
            yield node, key, name


def problems(
    raw: Mapping[str, Any], root: Root, known: Collection[str] = ()
) -> tuple[Recipe | None, dict[str, list[str]]]:
    """Check a recipe.

    Args:
        raw: The recipe in its plain YAML form, with paths relative to the root.
        root: Nothing outside it may be read.
        known: Models that the registry has named, which may lie among the server's own files.

    Returns:
        The recipe, None where it cannot be run, and the problems by the name of the input.
    """
    found = _forbidden(raw, root, known)
    current: dict[str, Any] = copy.deepcopy(dict(raw))
    for name in found:
        _remove(current, name)
    recipe = None
    for _ in range(_MAX_PROBLEMS):
        try:
            recipe = _load(current, root)
            break
        except DistillError as error:
            name, text = located(error.message)
            if name in found:
                break
            found[name] = [f"{text}: {error.fix}" if error.fix else text]
            if not _remove(current, name):
                break
    if recipe is not None:
        for name, text in _missing(recipe):
            found.setdefault(name, []).append(text)
    return (None if found else recipe), found


def _load(raw: Mapping[str, Any], root: Root) -> Recipe:
    from mlx_distill.graph import graph

    recipe = replace(from_mapping(Recipe, raw, "recipe"), base=root.path)
    try:
        recipe = load_recipe(recipe)
        task = recipe.load_task()
    except ConfigError as error:
        prefix = f"recipe {recipe.name}: "
        is_recipe = error.message.startswith(prefix)
        message = f"recipe: {error.message.removeprefix(prefix)}"
        if located(message)[0] == GENERAL and not is_recipe:
            message = f"recipe: task: {error.message}"
        raise ConfigError(message, fix=error.fix) from error
    if not recipe.data.sources:
        raise ConfigError(
            "recipe: data: sources[0]: path: no rows", fix="name a file, a data set or a generator"
        )
    graph(recipe, task)
    return recipe


def _forbidden(raw: Mapping[str, Any], root: Root, known: Collection[str]) -> dict[str, list[str]]:
    """What may stand in a recipe of the command line, but not in one that came over HTTP; and packaged files
    that there are not.
    """
    found: dict[str, list[str]] = {}
    for node, key, name in _paths(copy.deepcopy(dict(raw))):
        path = node[key]
        if path.startswith("asset:"):
            if packaged(path.removeprefix("asset:")) is None:
                found[name] = [f"no packaged file {path!r}"]
            continue
        try:
            inside = root.relative(os.path.expanduser(path))
        except ConfigError:
            found[name] = [
                f"{path} is not under the root {root.path}: move or copy it there, or use the command line"
            ]
            continue
        except ValueError:  # a NUL, say
            found[name] = ["not a path: remove what no path can hold"]
            continue
        if inside.split("/")[0] == STATE and key not in ("path", "sqlite") and path not in known:
            found[name] = [f"{path}: files of the server itself: name another path"]
    if isinstance(raw.get("task"), Mapping) and _names_code(raw["task"]):
        found["task"] = [
            "code of one's own (module:function) is not taken over HTTP: write the task as a YAML file"
        ]
    return found


def served_task(root: Root, task: str) -> str:
    """The task that a request names: a packaged one, or a YAML file under the root that names no code.

    Returns:
        Its name, or its path relative to the root.

    Raises:
        ConfigError: it is neither.
    """
    if task in task_names():
        return task
    name = root.relative(task)
    if name.split("/")[0] == STATE or not root.inside(name).is_file():
        packaged_ones = ", ".join(task_names())
        raise ConfigError(
            f"no task {task!r}", fix=f"one of {packaged_ones}; or the path of a YAML file under the root"
        )
    if _names_code(read_yaml(root.inside(name))):
        raise ConfigError(
            f"{name}: code of one's own (module:function) is not run over HTTP",
            fix="use the command line: mlx-distill data add PATH --task TASK",
        )
    return name


def _names_code(value: Any) -> bool:
    """Whether a part of a task names a function to import, among its metrics or checkers."""
    if isinstance(value, Mapping):
        return any(_names_code(value.get(key)) for key in ("metrics", "references", "metric", "kind")) or any(
            _names_code(item)
            for key, item in value.items()
            if key not in ("system", "user", "schema", "name")
        )
    if isinstance(value, list | tuple):
        return any(map(_names_code, value))
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value) is not None


def _missing(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The files and folders that the run would not find."""
    from mlx_distill.config import resolve_asset
    from mlx_distill.models.hub import model_problem

    for name in ("teacher", "student"):
        spec = getattr(recipe, name)
        if spec is not None and (problem := model_problem(resolve_asset(spec, recipe.base))):
            yield name, problem
    for number, source in enumerate(recipe.data.sources):
        for key in ("path", "sqlite"):
            path = getattr(source, key)
            if path and not Path(resolve_asset(path, recipe.base)).expanduser().exists():
                yield f"data.sources.{number}.{key}", f"{path}: no such file or folder"
    prompt = recipe.teacher_system_file
    if prompt is not None and not prompt.is_file():
        yield "targets.system_file", f"{recipe.targets.system_file}: no such file"


def located(message: str) -> tuple[str, str]:
    """The input that a message of :class:`ConfigError` is about, and the rest of the message.

    >>> located("recipe: teach: epochs: -1.0 is below 0.0")
    ('teach.epochs', '-1.0 is below 0.0')
    >>> located("recipe: data: sources[1]: split: 'x' is not one of train, valid, test")
    ('data.sources.1.split', "'x' is not one of train, valid, test")
    >>> located("recipe: teacher is missing")
    ('teacher', 'is missing')
    """
    rest, place = message.removeprefix("recipe: "), ""
    while True:
        head, colon, after = rest.partition(": ")
        missing = re.fullmatch(r"(\w+) is missing", head)
        name = re.sub(r"\[(\d+)\]", r".\1", missing[1] if missing else head)
        name = f"{place}.{name}" if place else name
        if (colon or missing) and (found := _input_of(name)):
            return found, "is missing" if missing else after
        if not colon or re.sub(r"\.\d+$", "", name) not in form_sections():
            break
        place, rest = name, after
    if rest.startswith("unknown key ") or not place:  # no input has it
        return GENERAL, f"{place}: {rest}" if place else rest
    is_whole_list = is_list(place)
    section = form_sections()[re.sub(r"\.\d+$", "", place)]
    return f"{place}.0.{section.keys[0].name}" if is_whole_list else f"{place}.{section.keys[0].name}", rest


def _input_of(name: str) -> str | None:
    """The input of a dotted name, which may go on into a mapping that is written in it."""
    while name:
        with contextlib.suppress(ConfigError):
            key_of(name)
            return name
        name = name.rpartition(".")[0]
        if name in form_sections() or re.sub(r"\.\d+$", "", name) in form_sections():
            return None
    return None


def _remove(raw: dict[str, Any], name: str) -> bool:
    """Take the value of an input out, so that the next problem can be found; False where nothing changes."""
    if name in _PLACEHOLDERS:
        raw[name] = _PLACEHOLDERS[name]
        return True
    if name == "task":
        raw[name] = task_names()[0]
        return True
    node: Any = raw
    path = name.split(".")
    for part in path[:-1]:
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return False
    if path[0] == "goals" and isinstance(raw.get("goals"), list):  # its keys are needed
        raw["goals"][int(path[1])] = {"model": "teacher", "metric": "accuracy", "at_least": 0.0}
        return True
    return isinstance(node, dict) and node.pop(path[-1], None) is not None
