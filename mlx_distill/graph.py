"""The graph of a recipe: which stages there are, what each reads, and by what it is keyed.

    rows -------------------> data --------------+------------------+
    teacher -> teacher_base ---------------------+-> teacher -> targets --+
    student -> student_base ------------------------------------------------+-> student -> quantized
    any of these models, and data -> evaluations/<model> -> report.json, report.html

Each box is a folder of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import ASSETS, keyed, resolve_asset, to_mapping
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import Recipe
from mlx_distill.task import Task

if TYPE_CHECKING:
    from mlx_distill.stages import Context


@dataclass(frozen=True)
class Stage:
    """One box of the graph.

    ``name`` its folder under the run; ``command`` the stage that makes it; ``format`` raised when what it writes changes; ``config`` the
    keyed settings; ``parents`` the boxes that it reads; ``inputs`` what it reads from outside the run; ``work`` what it does.
    """

    name: str
    command: str
    format: int
    config: Mapping[str, Any]
    parents: tuple[str, ...]
    work: Callable[[Context, Path], dict[str, Any]]
    inputs: tuple[str, ...] = ()


def graph(recipe: Recipe, task: Task) -> list[Stage]:
    """The boxes of a recipe, parents before children."""
    from mlx_distill import stages

    seen = {"task": _task_key(task), "compute_dtype": recipe.compute_dtype, "unpack": recipe.unpack}
    teacher, student = (resolve_asset(spec, recipe.base) for spec in (recipe.teacher, recipe.student))
    out = [
        Stage("data", "prepare", 1, {**keyed(recipe.data), "task": _task_key(task)}, (), stages.prepare, _sources(recipe)),
        Stage("teacher_base", "convert", 1, keyed(recipe.convert), (), lambda c, f: stages.convert(c, f, teacher), (teacher,)),
        Stage("student_base", "convert", 1, keyed(recipe.convert), (), lambda c, f: stages.convert(c, f, student), (student,)),
        Stage("teacher", "teach", 1, {**keyed(recipe.teach), **seen}, ("teacher_base", "data"), stages.teach),
        Stage("targets", "targets", 2, {**keyed(recipe.targets), **seen}, ("teacher", "data"), stages.targets),
        Stage("student", "distill", 1, {**keyed(recipe.distill), **seen}, ("student_base", "targets", "data"), stages.distill),
        Stage("quantized", "quantize", 1, keyed(recipe.quantize), ("student", "student_base"), stages.quantize),
    ]
    for control in ("labels", "text"):
        if getattr(recipe.controls, control):
            out.append(_control(recipe, control, seen))
    return out + [_evaluation(recipe, name, seen) for name in _measured(recipe)]


def _control(recipe: Recipe, control: str, seen: Mapping[str, Any]) -> Stage:
    from mlx_distill import stages

    parents = ("student_base", "data") if control == "labels" else ("student_base", "targets", "data")
    config = {**keyed(recipe.distill), **seen, "control": control}
    return Stage(f"student_{control}", "distill", 1, config, parents, lambda c, f: stages.distill(c, f, control))


def _measured(recipe: Recipe) -> list[str]:
    controls = [f"student_{c}" for c in ("labels", "text") if getattr(recipe.controls, c)]
    known = {"teacher_before", "teacher", "student_before", "student", "quantized"}
    for name in recipe.evaluate.models:
        if name not in known:
            raise ConfigError(f"evaluate.models: {name!r} is not one of {', '.join(sorted(known))}", fix="name models of the run")
    return list(dict.fromkeys(["teacher", *recipe.evaluate.models, *controls]))


def _evaluation(recipe: Recipe, name: str, seen: Mapping[str, Any]) -> Stage:
    from mlx_distill import stages

    folder = {"teacher_before": "teacher_base", "student_before": "student_base"}.get(name, name)
    # An adapter folder is not a model without its base.
    base = {"teacher": ("teacher_base",)} | dict.fromkeys(("student", "student_labels", "student_text"), ("student_base",))
    settings = {k: v for k, v in keyed(recipe.evaluate).items() if k != "models"}
    return Stage(
        f"evaluations/{name}", "evaluate", 1, {**settings, **seen, "model": name}, (folder, *base.get(folder, ()), "data"),
        lambda c, f: stages.evaluate(c, f, folder, name),
    )  # fmt: skip


def _task_key(task: Task) -> dict[str, Any]:
    raw: dict[str, Any] = to_mapping(task)
    return {key: value for key, value in raw.items() if key != "description"}


def _sources(recipe: Recipe) -> tuple[str, ...]:
    out = []
    for source in recipe.data.sources:
        if source.path:
            out.append(resolve_asset(source.path, recipe.base))
        elif source.generator:
            out.append(str(ASSETS / source.generator / "generator.py"))
        elif source.hub:
            out.append(f"{source.hub}@{source.revision or 'main'}")
    return tuple(out)
