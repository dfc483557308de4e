"""A recipe to a run: what of the graph of stages is current, what is made, and the report at its end.

Each stage is a folder of the run with a ``manifest.json``. Its key is a hash of the stage, its format, the
part of the recipe that can change its result, and the contents of its parents; a folder with the right key is
current and is not made again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlx_distill.config import to_mapping
from mlx_distill.errors import ConfigError, DistillError, FileError
from mlx_distill.graph import Outcome, Plan, Stage, differences, graph
from mlx_distill.progress import NullProgress, Progress
from mlx_distill.recipe import Recipe, current_settings, load_recipe
from mlx_distill.runtime import machine, rank_and_size, stop_on_signal, versions
from mlx_distill.storage import (
    Manifest,
    check_folder,
    fingerprint,
    lock_folder,
    open_partial,
    partial_folder,
    publish,
    read_manifest,
    recover,
    remove_leftovers,
    stage_key,
)
from mlx_distill.tasks.task import Task

if TYPE_CHECKING:
    from mlx_distill.report import RunReport
    from mlx_distill.stages.context import Context
    from mlx_distill.train.profiling import Profile

TRAININGS = ("teach", "distill")
COMMANDS = ("prepare", "convert", "teach", "targets", "distill", "quantize", "evaluate")


# --- what is current ----------------------------------------------------------------------------------------


@dataclass
class _Runner:
    recipe: Recipe
    task: Task
    out: Path
    progress: Progress
    resume: bool
    arguments: str
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
        parents = self.parents(stage)
        if manifest.key != stage_key(stage.name, stage.format, stage.config, parents):
            return f"to do: {differences(stage, manifest, parents)}"
        damage = check_folder(folder, manifest)
        return f"to do: {damage}" if damage else "current"

    def key_here(self, stage: Stage) -> str:
        """The key of a stage whose parents are read as they stand in ``out``."""
        found = {name: read_manifest(self.out / name) for name in stage.parents}
        self.manifests |= {name: manifest for name, manifest in found.items() if manifest is not None}
        return stage_key(stage.name, stage.format, stage.config, self.parents(stage))

    def make(self, stage: Stage, context: Context) -> None:
        folder = self.out / stage.name
        self.check_owner(folder)
        parents = self.parents(stage)
        key = stage_key(stage.name, stage.format, stage.config, parents)
        partial = open_partial(folder, key)
        if stage.command in TRAININGS:
            from mlx_distill.train.distributed import agree_on_key

            agree_on_key(self.out, key)
        began = time.time()
        facts = stage.work(context, partial)
        recorded = {
            **facts,
            "started": began,
            "seconds": time.time() - began,
            "versions": versions(),
            "machine": machine(),
            "inputs": list(stage.inputs),
            "recipe": self.recipe.name,
        }
        self.manifests[stage.name] = publish(
            folder, stage.name, stage.format, stage.config, parents, recorded
        )
        self.made.append(stage.name)

    def check_owner(self, folder: Path) -> None:
        """Refuse to replace, or to go on from, what a recipe of another name made with other settings: likely
        hours of training.
        """
        manifest = read_manifest(folder)
        owner = manifest.recorded.get("recipe", self.recipe.name) if manifest else self.recipe.name
        if owner != self.recipe.name:
            raise FileError(
                f"{folder}: made by the recipe {owner!r}, not by {self.recipe.name!r}",
                fix=f"choose another --out, or remove {self.out} first",
            )

    def check_leftover(self, stage: Stage, anew: bool) -> None:
        """Refuse what an unfinished training of this stage does not fit, or, where it is to be done ``anew``,
        give that up.
        """
        note = partial_folder(self.out / stage.name) / "key"
        if stage.command not in TRAININGS or not note.is_file():
            return
        from mlx_distill.train.preflight import check_leftover

        key = stage_key(stage.name, stage.format, stage.config, self.parents(stage))
        fits = note.read_text(encoding="utf-8") == key
        try:
            check_leftover(
                note.parent / "scratch" / "checkpoints",
                getattr(self.recipe, stage.command),
                stage.command,
                fits,
            )
        except DistillError:
            if not anew:
                raise
            note.unlink()  # no stage goes on without it

    def command(self, name: str) -> str:
        """The command line that makes a stage of this run."""
        return f"mlx-distill {name} {self.arguments}"


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
    hooks: Sequence[Callable[[dict[str, Any]], None]] = (),
    profile: Profile | None = None,
) -> RunReport | Outcome | Plan:
    """Run every stage of a recipe that is not current, and report.

    Args:
        recipe: A packaged recipe's name or a YAML file.
        out: The run's folder. The same call goes on where a run was interrupted.
        resume: False makes every stage again.
        overrides: ``KEY=VALUE`` texts over the recipe, such as ``distill.learning_rate=1e-5``.
        from_stage: Make this stage again, and all that follow from it.
        only: Make this stage alone, from its parents as they stand (a converted base that is missing is made
            too).
        dry_run: Return the :class:`Plan` and write nothing.
        progress: Where progress is told; silent by default.
        hooks: Called after every step of every training; see :mod:`mlx_distill.train.events`.
        profile: Takes the time of every training's parts.

    Returns:
        The report of the run; after ``only`` a stage before ``evaluate`` what came of it; with ``dry_run``
        the plan.

    Raises:
        ConfigError: the recipe, an override or a stage's name is wrong, or does not fit what an unfinished
            training left.
        FileError: the folder cannot be written, or another run holds it.
    """
    renamed: list[str] = []
    loaded = load_recipe(recipe, overrides, renamed)
    task, out = loaded.load_task(), Path(out)
    for name in (from_stage, only):
        if name is not None and name not in COMMANDS:
            raise ConfigError(f"no stage {name!r}", fix=f"stages: {', '.join(COMMANDS)}")
    stages = graph(loaded, task)
    settings = [part for text in overrides for part in ("--set", text)]
    runner = _Runner(
        loaded,
        task,
        out,
        progress or NullProgress(),
        resume,
        shlex.join([str(recipe), "--out", str(out), *settings]),
    )
    rank, size = rank_and_size()
    for text in renamed if rank == 0 else ():
        runner.progress.note(text)
    if dry_run:
        return _plan(runner, stages, from_stage)
    if size > 1 and only not in TRAININGS:
        raise ConfigError(
            f"{only or 'a whole run'} on {size} ranks",
            fix=f"one machine does it; launch the trainings alone: {' or '.join(TRAININGS)}",
        )
    if rank:
        return _follow(runner, [stage for stage in stages if stage.command == only], hooks, profile)
    if only is None:
        _find_models(stages)
    with lock_folder(out), stop_on_signal() as stop:
        remove_leftovers(out)
        from mlx_distill.report import build_report, write_report
        from mlx_distill.stages.context import Context
        from mlx_distill.stages.training import check_training

        context = Context(loaded, task, out, runner.progress, stop, hooks, profile)
        check_training(
            context,
            {s.command for s in stages if only in (None, s.command) and read_manifest(out / s.name) is None},
        )
        needed = {name for stage in stages if stage.command == only for name in stage.parents}
        for stage in stages:
            recover(out / stage.name)
            _step(runner, stage, context, from_stage, only, needed)
        if only not in (None, "evaluate"):
            return _outcome(runner, stages, only)
        evaluations = {stage.model: out / stage.name for stage in stages if stage.model is not None}
        report = build_report(
            out, to_mapping(loaded), task, evaluations, confidence=loaded.evaluate.confidence
        )
        return write_report(out, report)


def _follow(
    runner: _Runner, stages: Sequence[Stage], hooks: Sequence[Any], profile: Profile | None
) -> Outcome:
    """Another rank's part: it trains along on what stands in its own ``out``, in a folder that vanishes; rank
    0 writes and tells.
    """
    from mlx_distill.stages.context import Context
    from mlx_distill.train.distributed import agree_on_key

    with stop_on_signal() as stop:
        context = Context(runner.recipe, runner.task, runner.out, NullProgress(), stop, hooks, profile)
        for stage in stages:
            if agree_on_key(runner.out, "", lambda stage=stage: runner.key_here(stage)):  # type: ignore[misc]
                with TemporaryDirectory(prefix="mlx-distill-") as folder:
                    stage.work(context, Path(folder))
    return Outcome(runner.recipe.name, str(runner.out), [])


def _find_models(stages: Sequence[Stage]) -> None:
    """Say that a model's path is wrong before the rows are prepared, and not an hour later."""
    from mlx_distill.models.hub import find_local

    for stage in stages:
        if stage.command == "convert":
            find_local(stage.inputs[0])


def _step(
    runner: _Runner,
    stage: Stage,
    context: Context,
    from_stage: str | None,
    only: str | None,
    needed: set[str],
) -> None:
    if only is not None and stage.command != only:
        _stand_as_parent(runner, stage, context, stage.name in needed)
        return
    if only is not None:
        missing = [name for name in stage.parents if name not in runner.manifests]
        if missing:
            makes = {
                "data": "prepare",
                "teacher": "teach",
                "targets": "targets",
                "student": "distill",
                "quantized": "quantize",
            }
            cure = runner.command(
                next((made for name, made in makes.items() if not (runner.out / name).is_dir()), "run")
            )
            raise FileError(
                f"{runner.out / missing[0]} is not there yet",
                fix=f"run first: {cure} (or run, for all at once)",
            )
    # What follows from a stage that was asked for is made again even where its parents came out the same.
    follows = from_stage is not None and any(name in runner.made for name in stage.parents)
    anew = not runner.resume or stage.command == from_stage or follows
    state = runner.state(stage, anew)
    if state == "current":
        if stage.command in TRAININGS:
            from mlx_distill.train.distributed import agree_on_key

            agree_on_key(runner.out, "")
        runner.progress.note(f"{stage.name}: current")
        runner.manifests[stage.name] = read_manifest(runner.out / stage.name)  # type: ignore[assignment]
        return
    runner.check_leftover(stage, anew)
    if state not in ("to do", "to do: asked for"):
        runner.progress.note(f"{stage.name}: made again, {state.removeprefix('to do: ')}")
    runner.make(stage, context)


def _stand_as_parent(runner: _Runner, stage: Stage, context: Context, needed: bool) -> None:
    """A stage that was not asked for, beside one that was: it is read as it stands, old settings and all, but
    never damaged.
    """
    folder = runner.out / stage.name
    manifest = read_manifest(folder)
    damage = check_folder(folder, manifest) if manifest is not None and needed else None
    # No command with a recipe makes the converted bases, so a stage that needs one makes it.
    if needed and stage.command == "convert" and (manifest is None or damage):
        runner.make(stage, context)
        return
    if manifest is None:
        return
    if damage:
        raise FileError(damage, fix=f"make it again: {runner.command(stage.command)}")
    if needed and (state := runner.state(stage, False)) != "current":
        runner.check_owner(folder)
        anew = (
            runner.command(stage.command)
            if stage.command != "convert"
            else "run, or the stages that read it,"
        )
        runner.progress.note(
            f"{stage.name}: read as it stands; {state.removeprefix('to do: ')} ({anew} makes it again)"
        )
    runner.manifests[stage.name] = manifest


def _outcome(runner: _Runner, stages: Sequence[Stage], only: str | None) -> Outcome:
    """What came of the stage ``only``, and of the bases that were converted for it."""
    rows = []
    for stage in stages:
        manifest = runner.manifests.get(stage.name)
        if manifest is not None and (stage.command == only or stage.name in runner.made):
            recorded = {
                key: value
                for key, value in manifest.recorded.items()
                if key not in ("versions", "machine", "recipe", "inputs")
            }
            rows.append(
                {
                    "command": stage.command,
                    "writes": str(runner.out / stage.name),
                    "state": "made" if stage.name in runner.made else "current",
                    "seconds": manifest.recorded["seconds"],
                    "bytes": sum(entry.size for entry in manifest.files.values()),
                    "recorded": recorded,
                }
            )
    plan = _plan(replace(runner, resume=True, manifests={}, made=[]), stages, None)
    follows = "evaluate" if plan.next == "report" else plan.next  # which writes the report too
    done = plan.next == "report" and (runner.out / "report.html").is_file()
    return Outcome(plan.recipe, plan.out, rows, None if done else runner.command(follows))


def _plan(runner: _Runner, stages: Sequence[Stage], from_stage: str | None) -> Plan:
    rows = []
    for stage in stages:
        state = runner.state(stage, stage.command == from_stage or not runner.resume)
        manifest = read_manifest(runner.out / stage.name) if state == "current" else None
        if manifest is not None:
            runner.manifests[stage.name] = manifest
        reads = [str(runner.out / name) for name in stage.parents] + list(stage.inputs)
        settings = {
            k: v
            for k, v in current_settings(stage.config).items()
            if k not in ("task", "sources") and v not in (None, [], {}, "")
        }
        writes = str(runner.out / stage.name)
        rows.append(
            {
                "command": stage.command,
                "writes": writes,
                "reads": reads,
                "absent": stage.absent,
                "state": state,
                "settings": settings,
            }
        )
    rows.append(
        {
            "command": "report",
            "writes": str(runner.out / "report.html"),
            "state": "to do",
            "settings": {},
            "absent": [],
            "reads": [str(runner.out / s.name) for s in stages if s.command == "evaluate"],
        }
    )
    return Plan(runner.recipe.name, str(runner.out), rows)
