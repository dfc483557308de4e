"""Run a recipe: make the stages that are not current, in order, and write the report.

Each stage is a folder of the run with a ``manifest.json``. Its key is a hash of the stage, its format, the
part of the recipe that can change its result, and the contents of its parents; a folder with the right key is
current and is not made again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlx_distill.config import Overrides, override_texts, resolve_asset, to_mapping
from mlx_distill.data.general_text import read_general_text
from mlx_distill.errors import ConfigError, FileError
from mlx_distill.evaluate.compare import parse_margin
from mlx_distill.evaluate.costs import Prices, read_prices
from mlx_distill.graph import TRAININGS, Stage, graph, stages_for
from mlx_distill.progress import EventProgress, NullProgress, Progress, events_of, make_progress
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.report.diagnosis import Finding
from mlx_distill.resources import with_resources
from mlx_distill.runtime import StopFlag, machine, rank_and_size, stop_on_signal, versions
from mlx_distill.stages.answers_gate import gate_error
from mlx_distill.stages.audit import audited_models, general_text_file
from mlx_distill.stages.context import Context
from mlx_distill.status import (
    Outcome,
    Plan,
    check_owner,
    check_problems,
    current_key,
    folder_problems,
    input_problems,
    made_from,
    make_plan,
    missing_before,
    outcome_row,
    parent_contents,
    read_as_it_is,
    stage_status,
    unfinished_error,
)
from mlx_distill.storage import (
    Manifest,
    check_folder,
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
from mlx_distill.text import known_names, listed

if TYPE_CHECKING:
    from mlx_distill.report import RunReport
    from mlx_distill.train.profiling import Profile

COMMANDS = ("prepare", "convert", "teach", "targets", "distill", "quantize", "evaluate")

Hook = Callable[[dict[str, Any]], None]


@dataclass
class Runner:
    """A run in progress: what was asked for, the manifests of the stages so far, which were made, and what is
    wrong with those that were read as they are.
    """

    recipe: Recipe
    task: Task
    out: Path
    stages: Sequence[Stage]
    arguments: str | None
    progress: Progress
    resume: bool = True
    from_stage: str | None = None
    only: str | None = None
    events: Hook | None = None
    force: bool = False
    manifests: dict[str, Manifest] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def command_line(self, command: str) -> str:
        """What makes a stage of this run: a command line, or a call where the recipe is not a file."""
        if self.arguments is None:
            only = "" if command == "run" else f", only={command!r}"
            return f"md.run(recipe, {str(self.out)!r}{only})"
        return f"mlx-distill {command} {self.arguments}"

    def emit(self, event: str, stage: Stage, **facts: Any) -> None:
        """Report an event of a stage."""
        if self.events is not None:
            place = {"stage": stage.name, "command": stage.command, "run": str(self.out)}
            self.events({"event": event, **place, **facts})

    def is_forced(self, stage: Stage) -> bool:
        """Whether a stage was asked for by name, or every stage."""
        return not self.resume or stage.command == self.from_stage

    def plan(self) -> Plan:
        """What this run would do."""
        return make_plan(self.recipe, self.out, self.stages, self.is_forced)


MakeStage = Callable[[Runner, Stage, Context], Manifest]


def make_stage(runner: Runner, stage: Stage, context: Context) -> Manifest:
    """Make a stage in a partial folder, and publish it as the stage's folder with a manifest."""
    folder = runner.out / stage.name
    check_owner(stage, runner.out, runner.recipe.name)
    parents = parent_contents(stage, runner.manifests)  # as they are before the work begins
    key = stage_key(stage.name, stage.format, stage.config, parents)
    partial = open_partial(folder, key)
    _agree(runner, stage, key)
    started = time.time()
    facts = stage.work(context, partial)
    recorded = {
        **facts,
        "started": started,
        "seconds": time.time() - started,
        "versions": versions(),
        "machine": machine(),
        "inputs": list(stage.inputs),
        "recipe": runner.recipe.name,
    }
    return publish(folder, stage.name, stage.format, stage.config, parents, recorded)


def run(
    recipe: str | Path | Recipe,
    out: str | Path,
    resume: bool = True,
    *,
    overrides: Overrides = (),
    from_stage: str | None = None,
    only: str | None = None,
    models: Sequence[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    hooks: Sequence[Hook] = (),
    events: Hook | None = None,
    stop: StopFlag | None = None,
    profile: Profile | None = None,
    force: bool = False,
    make_stage: MakeStage = make_stage,
) -> RunReport | Outcome | Plan:
    """Run every stage of a recipe that is not current, and report.

    Args:
        recipe: A packaged recipe's name, a YAML file, or a :class:`~mlx_distill.recipe.Recipe`.
        out: The run's folder. The same call continues a run that was interrupted.
        resume: False makes every stage again.
        overrides: Keys of the recipe to set: ``{"distill.epochs": 1, "data.sources.0.count": 50}``, or
            ``KEY=VALUE`` texts.
        from_stage: Make this stage again, and all that follow from it.
        only: Make this stage alone, from its parents as they are (a converted base that is missing is made
            too).
        models: Make only what the evaluations of these models need; all that the recipe names by default.
        dry_run: Return the :class:`Plan` and write nothing.
        progress: Where progress is shown: on standard error by default, as a live bar on a terminal.
            ``md.progress.NullProgress()`` is silent.
        hooks: Called with the row of metrics after every step of every training; see
            :mod:`mlx_distill.train.events`.
        events: Called with every event as a dict. ``event`` is ``stage_started``, ``stage_current`` or
            ``stage_made`` (with ``stage``, ``command``, ``run``), ``task_started``, ``progress`` or
            ``task_ended`` (with ``task``, ``done``, ``total``, ``unit``, ``info``), ``note`` (with ``text``),
            ``training_row`` (with ``row``), or ``checkpoint`` (with ``command``, ``step``, ``steps``).
        stop: Set it from another thread to stop at the next safe point with :class:`Interrupted`. With it no
            signal handlers are installed; without it Ctrl-C and SIGTERM stop the run.
        profile: Measures the time of every training's parts.
        force: Go on where a quality gate fails, such as ``targets.min_valid``.
        make_stage: Makes one stage; a test may replace it.

    Returns:
        The report of the run; with ``only`` and a stage before ``evaluate`` the outcome of that stage; with
        ``dry_run`` the plan.

    Raises:
        ConfigError: the recipe, an override or a stage's name is wrong, or does not fit what an unfinished
            training left.
        QualityGateError: too few of the teacher's answers fit the task. The targets stage is finished; with
            ``force`` the same call goes on from there.
        FileError: the folder cannot be written, or another run holds it.
        Interrupted: it was stopped; the same call continues it.
    """
    renamed: list[str] = []
    loaded = _load_checked(recipe, overrides, renamed)
    task, out = loaded.load_task(), Path(out)
    for name in (from_stage, only):
        if name is not None and name not in COMMANDS:
            raise ConfigError(f"no stage {name!r}", fix=known_names(name, COMMANDS, "stages"))
    check_has_student(loaded, from_stage, only)
    progress = progress or make_progress()
    if events is not None:
        progress = EventProgress(progress, events)
    events = events or events_of(progress)
    if events is not None:
        hooks = [*hooks, lambda row: events({"event": "training_row", "row": row})]
    runner = Runner(
        loaded,
        task,
        out,
        graph(loaded, task) if models is None else stages_for(graph(loaded, task), models),
        _arguments(recipe, out, overrides),
        progress,
        resume,
        from_stage,
        only,
        events,
        force,
    )
    rank, num_ranks = rank_and_size()
    if rank == 0:
        for text in renamed:
            progress.note(text)
    if dry_run:
        return with_resources(runner.plan(), loaded, runner.stages, out)
    _check_ranks(num_ranks, only)
    if rank:
        with stop_flag(stop) as flag:
            return _follow(runner, Context(loaded, task, out, NullProgress(), flag, hooks, profile))
    _check_paths(runner)
    with lock_folder(out), stop_flag(stop) as flag:
        context = Context(loaded, task, out, progress, flag, hooks, profile, events)
        return _run_stages(runner, context, make_stage)


def _check_ranks(num_ranks: int, only: str | None) -> None:
    """Refuse to make on several ranks what one rank makes."""
    if num_ranks > 1 and only not in TRAININGS:
        raise ConfigError(
            f"{only or 'a whole run'} on {num_ranks} ranks",
            fix=f"one machine does it; launch the trainings alone: {' or '.join(TRAININGS)}",
        )


def check_has_student(recipe: Recipe, *commands: str | None) -> None:
    """Refuse to make by name a stage that a recipe without a student does not have.

    Raises:
        ConfigError: the recipe has none.
    """
    for command in commands:
        if recipe.student is None and command in ("targets", "distill", "quantize"):
            raise ConfigError(
                f"{command}: the recipe {recipe.name!r} has no student, so its run ends after teach",
                fix="name a student in the recipe",
            )


def _load_checked(recipe: str | Path | Recipe, overrides: Overrides, renamed: list[str]) -> Recipe:
    """The recipe, with an error now and not after the trainings where the report could not read it."""
    loaded = load_recipe(recipe, overrides, renamed)
    if loaded.evaluate.margin:
        parse_margin(loaded.evaluate.margin)
    _prices(loaded)
    if audited_models(loaded):
        read_general_text(general_text_file(loaded))
    return loaded


def _prices(recipe: Recipe) -> Prices | None:
    path = recipe.evaluate.costs
    return read_prices(resolve_asset(path, recipe.base)) if path else None


def _arguments(recipe: str | Path | Recipe, out: Path, overrides: Overrides) -> str | None:
    """The arguments of the command line that is this run; None for a recipe that is in no file."""
    if isinstance(recipe, Recipe):
        return None
    settings = [part for text in override_texts(overrides) for part in ("--set", text)]
    return shlex.join([str(recipe), "--out", str(out), *settings])


@contextmanager
def stop_flag(stop: StopFlag | None) -> Iterator[StopFlag]:
    """The caller's flag, or one that signals set."""
    if stop is not None:
        yield stop
        return
    with stop_on_signal() as flag:
        yield flag


def _check_paths(runner: Runner) -> None:
    """Refuse wrong paths of rows and models and folders of others before anything is made."""
    if runner.only is None:
        check_problems(runner.plan().problems)
        return
    needed, out = _needed(runner), runner.out
    converted = [stage for stage in runner.stages if stage.command == "convert" and stage.name in needed]
    missing = [stage for stage in converted if read_manifest(out / stage.name) is None]
    to_do = [*missing, *(stage for stage in runner.stages if stage.command == runner.only)]
    inputs = input_problems(to_do, out, [stage.name for stage in runner.stages])
    check_problems([*folder_problems(to_do, out, runner.recipe.name), *inputs])


def _needed(runner: Runner) -> set[str]:
    """The stages that the command which runs alone reads."""
    return {name for stage in runner.stages if stage.command == runner.only for name in stage.parents}


def _run_stages(runner: Runner, context: Context, make: MakeStage) -> RunReport | Outcome:
    """Rank 0's part of a run: all stages that are asked for, then the report."""
    from mlx_distill.stages.training import check_training

    out, stages, only = runner.out, runner.stages, runner.only
    remove_leftovers(out)
    missing = {stage.command for stage in stages if read_manifest(out / stage.name) is None}
    check_training(context, missing if only is None else missing & {only})
    for stage in stages:
        recover(out / stage.name)
    needed = _needed(runner)
    _require_parents(runner)
    for stage in stages:
        if only in (None, stage.command):
            _run_stage(runner, stage, context, make)
        else:
            _read_parent(runner, stage, context, make, stage.name in needed)
    return _outcome(runner) if only not in (None, "evaluate") else _write_report(runner)


def _write_report(runner: Runner) -> RunReport:
    from mlx_distill.data.predictions import read_predictions
    from mlx_distill.evaluate.categories import write_error_rows
    from mlx_distill.report import build_chat_report, build_report, write_report

    evaluations = {stage.model: runner.out / stage.name for stage in runner.stages if stage.model is not None}
    settings, recipe = runner.recipe.evaluate, to_mapping(runner.recipe)
    if runner.task.is_chats:
        options: dict[str, Any] = {"confidence": settings.confidence, "findings": runner.findings}
        return write_report(runner.out, build_chat_report(runner.out, recipe, evaluations, **options))
    report = build_report(
        runner.out,
        recipe,
        runner.task,
        evaluations,
        confidence=settings.confidence,
        margin=settings.margin,
        goals=recipe["goals"],
        prices=_prices(runner.recipe),
        findings=runner.findings,
    )
    if runner.task.error_categories:
        rows = {name: read_predictions(path)[1] for name, path in evaluations.items()}
        write_error_rows(runner.out, rows, runner.task)
    return write_report(runner.out, report)


def _follow(runner: Runner, context: Context) -> Outcome:
    """The part of another rank than 0: it trains on the parents in its own ``out``, in a temporary folder;
    rank 0 keeps the result and reports.
    """
    from mlx_distill.train.distributed import agree_on_key

    for stage in runner.stages:
        if stage.command != runner.only:
            continue

        def own_key(stage: Stage = stage) -> str:
            parents = {name: read_manifest(runner.out / name) for name in stage.parents}
            present = {name: manifest for name, manifest in parents.items() if manifest is not None}
            return current_key(stage, runner.manifests | present)

        if agree_on_key(runner.out, "", own_key):
            with TemporaryDirectory(prefix="mlx-distill-") as folder:
                stage.work(context, Path(folder))
    return Outcome(runner.recipe.name, str(runner.out), [])


def _agree(runner: Runner, stage: Stage, key: str) -> None:
    """Tell the other ranks the key of the training that begins; an empty key says that none begins."""
    if stage.command in TRAININGS:
        from mlx_distill.train.distributed import agree_on_key

        agree_on_key(runner.out, key)


def _run_stage(runner: Runner, stage: Stage, context: Context, make: MakeStage) -> None:
    """Make a stage if it is not current."""
    # What follows from a stage that was asked for is made again even where its parents came out the same.
    follows = runner.from_stage is not None and any(name in runner.made for name in stage.parents)
    forced = runner.is_forced(stage) or follows
    status = stage_status(stage, runner.out, runner.manifests, forced)
    if status.kind == "current":
        _agree(runner, stage, "")
        runner.progress.note(f"{stage.name}: current")
        runner.manifests[stage.name] = read_manifest(runner.out / stage.name)  # type: ignore[assignment]
        runner.emit("stage_current", stage)
        _check_gate(runner, stage)
        return
    _check_unfinished(runner, stage, forced)
    if status.kind == "stale":
        runner.progress.note(f"{stage.name}: made again, {status.reason}")
    _make(runner, stage, context, make)
    _check_gate(runner, stage)


def _check_gate(runner: Runner, stage: Stage) -> None:
    """Stop behind a finished stage whose result is too bad to go on with."""
    if stage.command != "targets":
        return
    teacher = read_manifest(runner.out / "teacher")
    error = gate_error(
        runner.recipe,
        runner.task,
        runner.manifests[stage.name].recorded,
        teacher.recorded if teacher else None,
    )
    if error is None:
        return
    if not runner.force:
        raise error
    runner.progress.note(f"{error.message}; going on, as asked")


def _make(runner: Runner, stage: Stage, context: Context, make: MakeStage) -> None:
    runner.emit("stage_started", stage)
    manifest = make(runner, stage, context)
    runner.manifests[stage.name] = manifest
    runner.made.append(stage.name)
    runner.emit("stage_made", stage, seconds=manifest.recorded.get("seconds"))


def _require_parents(runner: Runner) -> None:
    """Refuse to run a command alone whose parents are missing, before a model is converted for it, and name
    the first command to run.
    """
    found = missing_before(runner.stages, str(runner.only), runner.out)
    if found is not None:
        missing, first = found
        raise FileError(
            f"{listed([str(folder) for folder in missing])} {'is' if len(missing) == 1 else 'are'} not there "
            "yet",
            fix=f"run first: {runner.command_line(first)} (or run, for all at once)",
        )


def _check_unfinished(runner: Runner, stage: Stage, forced: bool) -> None:
    """Refuse to start a training that the checkpoints of an unfinished one do not fit, or, where it is
    ``forced``, discard them.
    """
    error = unfinished_error(runner.recipe, stage, runner.out, runner.manifests)
    if error is None:
        return
    if not forced:
        raise error
    (partial_folder(runner.out / stage.name) / "key").unlink()  # without it nothing is resumed


def _read_parent(runner: Runner, stage: Stage, context: Context, make: MakeStage, needed: bool) -> None:
    """Read a stage that was not asked for as it is, even with old settings, unless it is damaged. A missing
    or damaged converted model is made, since no command with a recipe makes it alone.
    """
    folder = runner.out / stage.name
    manifest = read_manifest(folder)
    damage = check_folder(folder, manifest) if manifest is not None and needed else None
    if needed and stage.command == "convert" and (manifest is None or damage):
        _make(runner, stage, context, make)
        return
    if manifest is None:
        return
    if damage:
        raise FileError(damage, fix=f"make it again: {runner.command_line(stage.command)}")
    reported = runner.only == "evaluate" and stage.name in made_from(runner.stages, "evaluate")
    status = stage_status(stage, runner.out, runner.manifests) if needed or reported else None
    if status is not None and status.kind != "current":
        if needed:
            check_owner(stage, runner.out, runner.recipe.name)
        text, findings = read_as_it_is(stage, status, runner.command_line)
        runner.progress.note(text)
        runner.findings += findings
    runner.manifests[stage.name] = manifest


def _outcome(runner: Runner) -> Outcome:
    """What the stage ``only``, and the conversions that it needed, have made."""
    rows = []
    for stage in runner.stages:
        manifest, made = runner.manifests.get(stage.name), stage.name in runner.made
        if manifest is not None and (stage.command == runner.only or made):
            rows.append(outcome_row(stage, runner.out, manifest, made))
    plan = make_plan(runner.recipe, runner.out, runner.stages, lambda stage: False)
    # The evaluate command writes the report too.
    following = "evaluate" if plan.next == "report" else plan.next
    done = plan.next == "report" and (runner.out / "report.html").is_file()
    return Outcome(plan.recipe, plan.out, rows, None if done else runner.command_line(following))
