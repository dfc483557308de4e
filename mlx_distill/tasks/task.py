"""A task: the prompt, the answer's schema, and the fields that are measured.

A task is a YAML file, packaged in ``assets/<name>/task.yaml`` or written by a user.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import ASSETS, from_mapping, option, packaged, read_yaml
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.tasks.prompt import Field, Options, parse_prompt, render_prompt
from mlx_distill.tasks.references import Checker, parse_checkers, with_vocabularies
from mlx_distill.tasks.schema import check_score, field_options, open_fields, validator_of
from mlx_distill.text import known_names


@dataclass(frozen=True)
class Task:
    """Prompt, answer schema and measured fields of a task."""

    name: str = option(help="what it is called")
    system: str = option(help="the system prompt, with {field} for a row's field; empty for none")
    user: str = option(help="the user's turn, with {field} for a row's field")
    schema: Mapping[str, Any] = option(
        help="JSON schema of the answer; the order of its properties is that of the answer"
    )
    label: str | None = option(
        None,
        "the answer's field with the classes, which are its enum in the schema; none: a task without "
        "classes, such as a summary",
    )
    # Unkeyed: it changes how answers are counted, not what any stage writes.
    positive: tuple[str, ...] = option(
        (), "classes that count as positive for precision and recall", keyed_as=()
    )
    score: str | None = option(None, "the answer's field with a number")
    score_tolerance: float = option(5.0, "how far two scores may lie apart and still agree", low=0.0)
    score_scale: tuple[float, float] = option((0.0, 100.0), "lowest and highest score")
    slices: tuple[str, ...] = option((), "fields of a row by which results are split")
    group: str | None = option(None, "the field of a row between whose values error rates must not differ")
    id: str = option("id", "the field of a row with its name")
    title: str | None = option(None, "the field of a row that the report shows it by")
    max_answer_tokens: int = option(256, "most tokens of an answer", low=1)
    open: tuple[str, ...] = option(
        (),
        "fields of the answer whose enum in the schema is only a proposal: any text is valid there",
        default_keyed=False,
    )
    metrics: tuple[str | Mapping[str, Any], ...] = option(
        (),
        "metrics that are measured besides those that every task has: names, or mappings with metric, name "
        "and options; your own function is module:function",
        keyed=False,
    )
    score_threshold: float | None = option(
        None, "a score from which on an item counts as positive, for metrics of its own", keyed=False
    )
    error_categories: Mapping[str, Mapping[str, Any] | list[Mapping[str, Any]]] = option(
        {}, "name: condition on the answer and the truth under which a row is such an error", keyed=False
    )
    cluster: str | None = option(
        None,
        "the field of a row that related rows share, such as an artist; their errors are not independent",
        default_keyed=False,
    )
    references: Mapping[str, Any] = option(
        {},
        "field of the answer: its checker, or several: {kind: scripture, versification: kjv}, {kind: "
        "vocabulary, list: file or names}, {kind: support, in: [fields of the row]}, or your own "
        "module:function",
        keyed=False,
    )
    edge_cases: str | None = option(
        None, "a file of unusual rows with the expected behaviour, for evaluate.edge_cases", keyed=False
    )
    description: str = option("", "one line for the list of tasks", keyed=False)
    folders: tuple[str, ...] = field(
        default=(),
        compare=False,
        metadata={"keyed": False, "settable": False, "help": "where files that it names are"},
    )

    @property
    def is_chats(self) -> bool:
        """Whether it is :data:`CHATS`, the task of a recipe without one: answers are texts of any kind."""
        return not self.schema

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the schema's order; none for a task without a label."""
        return tuple(self.schema["properties"][self.label]["enum"]) if self.label else ()

    @property
    def checkers(self) -> list[Checker]:
        """The checkers of the answer's fields."""
        return parse_checkers(self.references, self.schema, f"{self.name}: references")

    def file(self, name: str) -> Path:
        """The path of a file that the task names: beside the recipe, or beside the task.

        Raises:
            ConfigError: there is none.
        """
        candidates = [Path(folder) / name for folder in (*self.folders, "")]
        for path in candidates:
            if path.is_file():
                return path
        places = ", ".join(str(path.parent) for path in candidates[:-1]) or "."
        raise ConfigError(f"{self.name}: no file {name!r}", fix=f"looked in {places}; correct the name")

    @functools.cached_property
    def input_fields(self) -> tuple[str, ...]:
        """The fields of a row that the prompt names."""
        return tuple(dict.fromkeys(part.name for part in self._parts() if isinstance(part, Field)))

    @property
    def lists_labels(self) -> bool:
        """Whether the prompt has a place for the list of classes, ``{label:options}`` with the label's name.

        Only there can they be listed in another order.
        """
        return any(isinstance(part, Options) and part.name == self.label for part in self._parts())

    @property
    def user_literals(self) -> list[str]:
        """The texts of the user's turn that every row has."""
        return [
            self._list_of(part) if isinstance(part, Options) else part
            for part in parse_prompt(self.user, f"{self.name}: user")
            if not isinstance(part, Field)
        ]

    def with_label_order(self, labels: Sequence[str]) -> Task:
        """The same task with its classes in another order in the prompt and in :attr:`labels`.

        >>> schema = {"type": "object", "properties": {"mood": {"enum": ["joy", "fear"]}}}
        >>> task = Task("t", system="{mood:options}?", user="{text}", schema=schema, label="mood")
        >>> task.with_label_order(["fear", "joy"]).prompt({"text": "Hello"})
        ('fear, joy?', 'Hello')
        """
        if self.label is None or sorted(labels) != sorted(self.labels):
            raise ConfigError(f"{list(labels)} is no order of the classes", fix="give all of them, once each")
        properties = dict(self.schema["properties"])
        properties[self.label] = {**properties[self.label], "enum": list(labels)}
        return replace(self, schema={**self.schema, "properties": properties})

    def _parts(self) -> list[str | Field | Options]:
        return [
            *parse_prompt(self.system, f"{self.name}: system"),
            *parse_prompt(self.user, f"{self.name}: user"),
        ]

    def prompt(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The system and user prompts of one row.

        Raises:
            DataError: the row lacks a field of the prompt, or has a value that does not suit it.
        """
        missing = [name for name in self.input_fields if row.get(name) is None]
        if missing:
            raise DataError(
                f"no field {missing[0]!r}", fix=f"the task {self.name!r} needs {', '.join(self.input_fields)}"
            )
        options = {part.name: self._list_of(part) for part in self._parts() if isinstance(part, Options)}
        return (
            render_prompt(self.system, row, options).strip(),
            render_prompt(self.user, row, options).strip(),
        )

    def _list_of(self, part: Options) -> str:
        return ", ".join(map(str, field_options(self.schema["properties"][part.name])))


CHATS = Task("chats", system="", user="", schema={}, description="chats of any kind")
"""The task of a recipe without one: rows are chats of any kind, and an answer is a text without a schema."""


def parse_task(raw: Mapping[str, Any], where: str) -> Task:
    """A task from a YAML mapping.

    Raises:
        ConfigError: an unknown or missing key, a schema that is none, a label without an enum, an unknown
            positive class, a score that is no number or has other limits than ``score_scale``, braces in a
            prompt that are not a field, a prompt that names a field of the answer, or positive classes or a
            group without a label.
    """
    task = from_mapping(Task, raw, where)
    properties = task.schema.get("properties") if isinstance(task.schema, Mapping) else None
    if not isinstance(properties, Mapping) or task.schema.get("type") != "object":
        raise ConfigError(
            f"{where}: schema is not an object with properties", fix="give a JSON schema with type: object"
        )
    validator_of(task.schema, f"{where}: schema")
    _check_label(task, properties, where)
    if task.score:
        check_score(task.schema, task.score, task.score_scale, where)
    for key in ("system", "user"):
        _check_prompt(getattr(task, key), properties, task.open, f"{where}: {key}")
    _check_measured(task, properties, where)
    # Before the enum of an open field is taken out.
    task = replace(task, references=with_vocabularies(task.references, task.schema))
    return replace(task, schema=open_fields(task.schema, task.open, where)) if task.open else task


def _check_measured(task: Task, properties: Mapping[str, Any], where: str) -> None:
    """Refuse a threshold without a score, references of unknown fields, and metrics without a name."""
    if task.score_threshold is not None:
        low, high = task.score_scale
        if task.score is None:
            raise ConfigError(f"{where}: score_threshold without score", fix="name the field with the score")
        if not low < task.score_threshold <= high:
            raise ConfigError(
                f"{where}: score_threshold: {task.score_threshold:g} does not divide the scale "
                f"{low:g} to {high:g}",
                fix=f"above {low:g} and at most {high:g}",
            )
    parse_checkers(task.references, task.schema, f"{where}: references")
    for number, metric in enumerate(task.metrics):
        if isinstance(metric, Mapping) and not isinstance(metric.get("metric"), str):
            raise ConfigError(
                f"{where}: metrics[{number}]: a metric without a name",
                fix="write {metric: NAME, ...} with its options, or the name alone",
            )


def _check_prompt(prompt: str, properties: Mapping[str, Any], open: Sequence[str], where: str) -> None:
    """Refuse a prompt into which a row's own answer would be written, and a list of options of a field
    without any.
    """
    for part in parse_prompt(prompt, where):
        if isinstance(part, Options) and (part.name in open or not field_options(properties.get(part.name))):
            listed = [name for name in properties if name not in open and field_options(properties[name])]
            raise ConfigError(
                f"{where}: {{{part.name}:options}}: the answer has no field {part.name!r} with an enum",
                fix=known_names(part.name, listed, "fields with an enum are")
                if listed
                else "write the options as text",
            )
        if isinstance(part, Field) and part.name in properties:
            raise ConfigError(
                f"{where}: {{{part.name}}} is a field of the answer, so the prompt would hold it",
                fix=f"write {{{{{part.name}}}}} for braces that are text; or give the column of the input "
                f"another name in the prompt, such as {{input_{part.name}}} with columns: "
                f"{{input_{part.name}: COLUMN}} in the source",
            )


def _check_label(task: Task, properties: Mapping[str, Any], where: str) -> None:
    if task.label is None:
        for key in ("positive", "group"):
            if getattr(task, key):
                raise ConfigError(
                    f"{where}: {key} without label",
                    fix=f"name the field with the classes as label, or remove {key}",
                )
        return
    if task.label in task.open:
        raise ConfigError(
            f"{where}: open: {task.label!r} is the label, whose classes must be listed",
            fix="take it out of open, or leave out label for a task without classes",
        )
    part = properties.get(task.label)
    enum: list[Any] = (part.get("enum") or []) if isinstance(part, Mapping) else []
    is_text = bool(enum) and all(isinstance(name, str) for name in enum)
    if not is_text or len(set(enum)) < 2:
        quotes = "put each class in quotes (YAML reads yes and no as true and false)"
        raise ConfigError(
            f"{where}: label field {task.label!r} has no enum of two or more strings",
            fix=quotes
            if enum and not is_text
            else "list the classes in the schema, or leave out label for a task without classes",
        )
    unknown = [name for name in task.positive if name not in enum]
    if unknown:
        raise ConfigError(
            f"{where}: positive class {unknown[0]!r} is not one of {', '.join(enum)}",
            fix="name classes of the label field",
        )


def load_task(spec: str | Mapping[str, Any], base: Path | None = None) -> Task:
    """Load a packaged task by name or a YAML file by path; a mapping with such a ``name`` overrides its other
    keys.
    """
    overrides: Mapping[str, Any] = {}
    if isinstance(spec, Mapping):
        overrides = {key: value for key, value in spec.items() if key != "name"}
        spec = str(spec.get("name", ""))
    path = packaged(f"{spec}/task.yaml")
    if path is None:
        candidate = (base / spec) if base else Path(spec)
        if not candidate.is_file():
            known = known_names(str(spec), task_names(), "packaged tasks")
            raise ConfigError(f"no task {spec!r}", fix=f"{known}; or give the path of a YAML file")
        path = candidate
    task = parse_task({**read_yaml(path), **overrides}, str(path))
    folders = dict.fromkeys([*([str(base)] if base else []), str(path.resolve().parent)])
    return replace(task, folders=tuple(folders))


def task_names() -> list[str]:
    """The names of the packaged tasks."""
    return sorted(p.parent.name for p in ASSETS.glob("*/task.yaml"))
