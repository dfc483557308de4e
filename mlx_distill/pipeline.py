"""A recipe to a run: the graph of stages, what of it is current, and the report at its end.

    rows -------------------> data --------------+------------------+
    teacher -> teacher_base ---------------------+-> teacher -> targets --+
    student -> student_base ------------------------------------------------+-> student -> quantized
    any of these models, and data -> evaluations/<model> -> report.json, report.html

Each box is a folder of the run with a ``manifest.json``. Its key is a hash of the stage, its format, the part of the recipe that can change
its result, and the contents of its parents; a folder with the right key is current and is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import ASSETS, keyed, resolve_asset, to_mapping
from mlx_distill.errors import ConfigError, FileError
from mlx_distill.files import (
    Manifest,
    check_folder,
    fingerprint,
    lock_folder,
    open_partial,
    publish,
    read_manifest,
    recover,
    remove_leftovers,
    stage_key,
)
from mlx_distill.progress import NullProgress, Progress
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.runtime import machine, stop_on_signal, versions
from mlx_distill.task import Task

if TYPE_CHECKING:
    from mlx_distill.report import RunReport
    from mlx_distill.stages import Context

COMMANDS = ("prepare", "convert", "teach", "targets", "distill", "quantize", "evaluate")


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


@dataclass(frozen=True)
class Plan:
    """What a run would do; ``--dry-run`` prints it."""

    recipe: str
    out: str
    stages: Sequence[Mapping[str, Any]]

    @property
    def lines(self) -> list[str]:
        """One paragraph a stage, for people."""
        lines = [f"{self.recipe} -> {self.out}"]
        for stage in self.stages:
            lines.append(f"{stage['command']:<9} {stage['writes']}  [{stage['state']}]")
            lines += [f"          reads  {name}" for name in stage["reads"]]
            lines.append(f"          with   {', '.join(f'{k}={v}' for k, v in stage['settings'].items())}" if stage["settings"] else "")
        return [line for line in lines if line]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"recipe": self.recipe, "out": self.out, "stages": list(self.stages)}


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
        Stage("targets", "targets", 1, {**keyed(recipe.targets), **seen}, ("teacher", "data"), stages.targets),
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


# --- what is current ------------------------------------------------------------------------------------------------------------


@dataclass
class _Runner:
    recipe: Recipe
    task: Task
    out: Path
    progress: Progress
    resume: bool
    spec: str
    manifests: dict[str, Manifest] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def parents(self, stage: Stage) -> dict[str, str]:
        parents = {name: self.manifests[name].content for name in stage.parents if name in self.manifests}
        return parents | {f"input {i}": fingerprint(source) for i, source in enumerate(stage.inputs)}

    def state(self, stage: Stage, forced: bool) -> str:
        """``current``, or why the stage is to be made."""
        missing = [name for name in stage.parents if name not in self.manifests]
        if missing:
            return f"to do: after {', '.join(missing)}"
        folder = self.out / stage.name
        manifest = read_manifest(folder)
        if manifest is None:
            return "to do"
        if forced:
            return "to do: asked for"
        if manifest.key != stage_key(stage.name, stage.format, stage.config, self.parents(stage)):
            return "to do: its settings or its inputs have changed"
        damage = check_folder(folder, manifest)
        return f"to do: {damage}" if damage else "current"

    def make(self, stage: Stage, context: Context) -> None:
        folder = self.out / stage.name
        parents = self.parents(stage)
        partial = open_partial(folder, stage_key(stage.name, stage.format, stage.config, parents))
        began = time.time()
        facts = stage.work(context, partial)
        recorded = {
            **facts, "started": began, "seconds": time.time() - began, "versions": versions(), "machine": machine(),
            "inputs": list(stage.inputs),
        }  # fmt: skip
        self.manifests[stage.name] = publish(folder, stage.name, stage.format, stage.config, parents, recorded)
        self.made.append(stage.name)


def run(
    recipe: str | Path,
    out: str | Path,
    resume: bool = True,
    *,
    overrides: Sequence[str] = (),
    from_stage: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RunReport | Plan:
    """Run every stage of a recipe that is not current, and report.

    Args:
        recipe: A packaged recipe's name or a YAML file.
        out: The run's folder. The same call goes on where a run was interrupted.
        resume: False makes every stage again.
        overrides: ``KEY=VALUE`` texts over the recipe, such as ``distill.learning_rate=1e-5``.
        from_stage: Make this stage again, and all that follow from it.
        only: Make this stage alone, from its parents as they stand (a converted base that is missing is made too).
        dry_run: Return the :class:`Plan` and write nothing.
        progress: Where progress is told; silent by default.

    Returns:
        The report of the run; after ``only`` a stage before ``evaluate``, or with ``dry_run``, the plan as it stands.

    Raises:
        ConfigError: the recipe, an override or a stage's name is wrong.
        FileError: the folder cannot be written, or another run holds it.
    """
    loaded = load_recipe(recipe, overrides)
    task, out = loaded.load_task(), Path(out)
    for name in (from_stage, only):
        if name is not None and name not in COMMANDS:
            raise ConfigError(f"no stage {name!r}", fix=f"stages: {', '.join(COMMANDS)}")
    stages = graph(loaded, task)
    runner = _Runner(loaded, task, out, progress or NullProgress(), resume, str(recipe))
    if dry_run:
        return _plan(runner, stages, from_stage)
    with lock_folder(out), stop_on_signal() as stop:
        remove_leftovers(out)
        from mlx_distill.report import build_report, write_report
        from mlx_distill.stages import Context

        context = Context(loaded, task, out, runner.progress, stop)
        needed = {name for stage in stages if stage.command == only for name in stage.parents}
        for stage in stages:
            recover(out / stage.name)
            _step(runner, stage, context, from_stage, only, needed)
        if only not in (None, "evaluate"):
            return _plan(_Runner(loaded, task, out, runner.progress, True, runner.spec), stages, None)
        evaluations = {s.name.removeprefix("evaluations/"): out / s.name for s in stages if s.command == "evaluate"}
        report = build_report(out, to_mapping(loaded), task, evaluations, confidence=loaded.evaluate.confidence)
        return write_report(out, report)


def _step(runner: _Runner, stage: Stage, context: Context, from_stage: str | None, only: str | None, needed: set[str]) -> None:
    if only is not None and stage.command != only:
        manifest = read_manifest(runner.out / stage.name)
        # No command with a recipe makes the converted bases, so a stage that needs one makes it.
        if manifest is None and stage.command == "convert" and stage.name in needed:
            runner.make(stage, context)
        elif manifest is not None:
            runner.manifests[stage.name] = manifest
        return
    if only is not None:
        missing = [name for name in stage.parents if name not in runner.manifests]
        if missing:
            raise FileError(
                f"{runner.out / missing[0]} is not there yet", fix=f"run first: mlx-distill run {runner.spec} --out {runner.out}"
            )
    # What follows from a stage that was asked for is made again even where its parents came out the same.
    follows = from_stage is not None and any(name in runner.made for name in stage.parents)
    if runner.state(stage, not runner.resume or stage.command == from_stage or follows) == "current":
        runner.progress.note(f"{stage.name}: current")
        runner.manifests[stage.name] = read_manifest(runner.out / stage.name)  # type: ignore[assignment]
        return
    runner.make(stage, context)


def _plan(runner: _Runner, stages: Sequence[Stage], from_stage: str | None) -> Plan:
    rows = []
    for stage in stages:
        state = runner.state(stage, stage.command == from_stage or not runner.resume)
        manifest = read_manifest(runner.out / stage.name) if state == "current" else None
        if manifest is not None:
            runner.manifests[stage.name] = manifest
        reads = [str(runner.out / name) for name in stage.parents] + list(stage.inputs)
        settings = {k: v for k, v in stage.config.items() if k not in ("task", "sources") and v not in (None, [], {}, "")}
        writes = str(runner.out / stage.name)
        rows.append({"command": stage.command, "writes": writes, "reads": reads, "state": state, "settings": settings})
    rows.append({
        "command": "report", "writes": str(runner.out / "report.html"), "state": "to do", "settings": {},
        "reads": [str(runner.out / s.name) for s in stages if s.command == "evaluate"],
    })  # fmt: skip
    return Plan(runner.recipe.name, str(runner.out), rows)
