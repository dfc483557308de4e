"""A task: what is asked, how the answer looks, and which of its fields are measured.

The library knows no task of its own; a task is a YAML file. Packaged ones lie in ``assets/<name>/task.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError, DataError


@dataclass(frozen=True)
class Task:
    """Prompt, answer schema and measured fields.

    ``system`` and ``user`` are the prompt, with ``{field}`` for the row's fields; ``schema`` is the JSON schema of the answer, whose
    ``properties`` stand in the order in which they are written; ``label`` is the field with the classes (its enum in the schema),
    ``positive`` the classes that count as positive for precision and recall, empty where there is no such side; ``score`` the
    numeric field or None, ``score_tolerance`` how far two scores may lie apart and still agree, ``score_scale`` its ends;
    ``slices`` the row fields by which results are split, ``group`` the one by which error rates must not differ.
    """

    name: str
    system: str
    user: str
    schema: Mapping[str, Any]
    label: str
    positive: tuple[str, ...] = ()
    score: str | None = None
    score_tolerance: float = 5.0
    score_scale: tuple[float, float] = (0.0, 100.0)
    slices: tuple[str, ...] = ()
    group: str | None = None
    id: str = "id"
    title: str | None = None
    max_answer_tokens: int = 256
    description: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the schema's order."""
        return tuple(self.schema["properties"][self.label]["enum"])

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The row fields that the prompt names."""
        import string

        names = [name for _, name, _, _ in string.Formatter().parse(self.system + self.user) if name]
        return tuple(dict.fromkeys(names))

    def prompt(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """(system, user) for one row. A missing field is a :class:`DataError` that names it."""
        missing = [name for name in self.input_fields if row.get(name) is None]
        if missing:
            raise DataError(f"no field {missing[0]!r}", fix=f"the task {self.name!r} needs {', '.join(self.input_fields)}")
        return self.system.format_map(row).strip(), self.user.format_map(row).strip()


def parse_task(raw: Mapping[str, Any], where: str) -> Task:
    """A task from a YAML mapping. An unknown or missing key, a label without an enum, or a bad positive class is an error."""
    from mlx_distill.config import from_mapping

    task = from_mapping(Task, raw, where)
    properties = task.schema.get("properties") if isinstance(task.schema, Mapping) else None
    if not isinstance(properties, Mapping) or task.schema.get("type") != "object":
        raise ConfigError(f"{where}: schema is not an object with properties", fix="give a JSON schema with type: object")
    enum = (properties.get(task.label) or {}).get("enum")
    if not enum or len(set(enum)) < 2 or not all(isinstance(name, str) for name in enum):
        raise ConfigError(f"{where}: label field {task.label!r} has no enum of two or more strings", fix="list the classes in the schema")
    unknown = [name for name in task.positive if name not in enum]
    if unknown:
        raise ConfigError(f"{where}: positive class {unknown[0]!r} is not one of {', '.join(enum)}", fix="name classes of the label field")
    if task.score and task.score not in properties:
        raise ConfigError(f"{where}: score field {task.score!r} is not in the schema", fix="name a property of the schema")
    return task


def load_task(spec: str | Mapping[str, Any], base: Path | None = None) -> Task:
    """A packaged task by name, a YAML file by path, or a mapping whose ``name`` is either and whose other keys override it."""
    from mlx_distill.config import ASSETS, packaged, read_yaml

    overrides: Mapping[str, Any] = {}
    if isinstance(spec, Mapping):
        overrides = {key: value for key, value in spec.items() if key != "name"}
        spec = str(spec.get("name", ""))
    path = packaged(f"{spec}/task.yaml")
    if path is None:
        candidate = (base / spec) if base else Path(spec)
        if not candidate.is_file():
            names = ", ".join(sorted(p.parent.name for p in ASSETS.glob("*/task.yaml")))
            raise ConfigError(f"no task {spec!r}", fix=f"packaged tasks: {names}; or give the path of a YAML file")
        path = candidate
    return parse_task({**read_yaml(path), **overrides}, str(path))
