"""The status of the stages of a run; the plan of a dry run and the outcome of a stage, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_distill.config import changes
from mlx_distill.distill.answer_check import FACT
from mlx_distill.errors import DistillError, FileError
from mlx_distill.graph import TRAININGS, Stage
from mlx_distill.models.hub import model_problem
from mlx_distill.recipe import Recipe, current_settings
from mlx_distill.report.diagnosis import Finding, finding
from mlx_distill.stages.answers_gate import gate_text
from mlx_distill.storage import (
    Manifest,
    check_folder,
    check_replaceable,
    fingerprint,
    partial_folder,
    read_manifest,
    stage_key,
)
from mlx_distill.text import counted, duration, size

_MAX_NAMED_CHANGES = 4


@dataclass(frozen=True)
class StageStatus:
    """Whether a stage has to be made, and why.

    Attributes:
        kind: ``current``: its folder holds what would be made now; ``missing``: it has no folder; ``stale``:
            its settings, its inputs or its files have changed; ``forced``: it was asked for; ``blocked``: a
            parent has to be made first, so nothing more is known.
        reason: Why it is stale, forced or blocked, for people.
    """

    kind: Literal["current", "missing", "stale", "forced", "blocked"]
    reason: str = ""

    @property
    def text(self) -> str:
        """The status for people.

        >>> StageStatus("stale", "seed was 0, is 1").text, StageStatus("missing").text
        ('to do: seed was 0, is 1', 'to do')
        """
        if self.kind == "current":
            return "current"
        return f"to do: {self.reason}" if self.reason else "to do"


def stage_status(
    stage: Stage, out: Path, manifests: Mapping[str, Manifest], forced: bool = False
) -> StageStatus:
    """Whether a stage of the run in ``out`` has to be made.

    Args:
        stage: The stage.
        out: The run's folder.
        manifests: The manifests of the parents that are current.
        forced: Whether the stage is made even if it is current.
    """
    if missing := missing_parents(stage, manifests):
        return StageStatus("blocked", f"after {', '.join(missing)}")
    folder = out / stage.name
    manifest = read_manifest(folder)
    if manifest is None:
        return StageStatus("missing")
    if forced:
        return StageStatus("forced", "asked for")
    parents = parent_contents(stage, manifests)
    if manifest.key != stage_key(stage.name, stage.format, stage.config, parents):
        return StageStatus("stale", differences(stage, manifest, parents))
    damage = check_folder(folder, manifest)
    return StageStatus("stale", damage) if damage else StageStatus("current")


def missing_parents(stage: Stage, manifests: Mapping[str, Manifest]) -> list[str]:
    """The parents of a stage without a manifest."""
    return [name for name in stage.parents if name not in manifests]


def missing_before(stages: Sequence[Stage], command: str, out: Path) -> tuple[list[Path], str] | None:
    """The folders that a command which runs alone reads and does not find, and the command that makes the
    first of them; None where nothing is missing. Conversions are not among them: they are made where needed.

    Args:
        stages: Of the recipe.
        command: The command.
        out: The run's folder.
    """
    read = {name for stage in stages if stage.command == command for name in stage.parents}
    folders = [out / stage.name for stage in stages if stage.command != "convert" and stage.name in read]
    missing = [folder for folder in folders if read_manifest(folder) is None]
    if not missing:
        return None
    makers = (stage for stage in stages if stage.command not in ("convert", "evaluate"))
    return missing, next((stage.command for stage in makers if not (out / stage.name).is_dir()), "run")


def made_from(stages: Sequence[Stage], command: str) -> set[str]:
    """The names of all stages that those of a command are made from, directly or not: a report is about them.

    Args:
        stages: Of the recipe.
        command: The command.
    """
    parents = {stage.name: stage.parents for stage in stages}
    names = [name for stage in stages if stage.command == command for name in stage.parents]
    for name in names:  # it grows while it is read
        names += [parent for parent in parents[name] if parent not in names]
    return set(names)


def parent_contents(stage: Stage, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """The hashes of everything that a stage reads: its parents and its inputs from outside the run."""
    parents = {name: manifests[name].content for name in stage.parents if name in manifests}
    return parents | {f"input {i}": fingerprint(source) for i, source in enumerate(stage.inputs)}


def current_key(stage: Stage, manifests: Mapping[str, Manifest]) -> str:
    """The key that a stage would get if it were made now."""
    return stage_key(stage.name, stage.format, stage.config, parent_contents(stage, manifests))


def differences(stage: Stage, manifest: Manifest, parents: Mapping[str, str]) -> str:
    """What has changed since a stage's folder was made, for people.

    Args:
        stage: The stage as it would be made now.
        manifest: The manifest of its folder.
        parents: The current :func:`parent_contents`.
    """
    changed = changes(current_settings(manifest.config), current_settings(stage.config))
    if manifest.format != stage.format:
        changed.insert(0, "another version of this package made it")
    for name in {**manifest.parents, **parents}:
        if manifest.parents.get(name) != parents.get(name):
            number = name.removeprefix("input ")
            is_input = number.isdigit() and int(number) < len(stage.inputs)
            changed.append(f"{stage.inputs[int(number)] if is_input else name} has changed")
    more = len(changed) - _MAX_NAMED_CHANGES
    return ", ".join(changed[:_MAX_NAMED_CHANGES] + ([f"{more} more"] if more > 0 else []))


def read_as_it_is(
    stage: Stage, status: StageStatus, command_line: Callable[[str], str]
) -> tuple[str, list[Finding]]:
    """What is said of a stage that is not current and is read all the same, and what a report says of it.

    Args:
        stage: The stage.
        status: Its status, not ``current``.
        command_line: Makes the command line of a command of the run.
    """
    is_converted = stage.command == "convert"
    again = "run, or the stages that read it," if is_converted else command_line(stage.command)
    text = f"{stage.name}: read as it is; {status.reason} ({again} makes it again)"
    if status.kind != "stale":  # nothing is known
        return text, []
    fix = f"make it again: {command_line('run' if is_converted else stage.command)}"
    return text, [
        finding(f"{stage.name}: not what the recipe makes now", f"since then: {status.reason}", fix)
    ]


def check_owner(stage: Stage, out: Path, recipe: str) -> None:
    """Refuse to replace, or to continue from, a stage's folder that this stage of this recipe has not made:
    it may hold hours of training, or the user's own files.

    Raises:
        FileError: another command or a recipe of another name made it, or none has.
    """
    folder = out / stage.name
    check_replaceable(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return
    owner = manifest.recorded.get("recipe", recipe)
    if manifest.stage != stage.name:
        raise FileError(
            f"{folder}: made by {manifest.stage!r}, not by this stage of a run", fix="choose another --out"
        )
    if owner != recipe:
        raise FileError(
            f"{folder}: made by the recipe {owner!r}, not by {recipe!r}",
            fix=f"choose another --out, or remove {out} first",
        )


def folder_problems(stages: Iterable[Stage], out: Path, recipe: str) -> list[str]:
    """Why the folders of these stages cannot be written, one line each, see :func:`check_owner`."""
    problems = []
    for stage in stages:
        try:
            check_owner(stage, out, recipe)
        except FileError as error:
            problems.append(error.message)
    return problems


def input_problems(stages: Iterable[Stage], out: Path, written: Sequence[str]) -> list[str]:
    """What is wrong with the inputs of these stages from outside the run, one line each: files and folders
    that do not exist, folders that are no models, and what lies in a folder that the run itself writes.

    Args:
        stages: The stages that have to be made.
        out: The run's folder.
        written: The names of all stages of the run.
    """
    folders = [(out / name).resolve() for name in written]
    problems: list[str | None] = []
    for stage in stages:
        for name in stage.inputs:
            path = Path(name).expanduser()
            own = next((f for f in folders if path.exists() and path.resolve().is_relative_to(f)), None)
            if own is not None:
                problems.append(f"{name}: lies in {own.relative_to(out.resolve())}, which this run writes")
        if stage.command == "convert":
            problems += [model_problem(stage.inputs[0])]
        else:
            problems += [f"{name}: no such file or folder" for name in stage.absent]
    return list(dict.fromkeys(problem for problem in problems if problem))


def check_problems(problems: Sequence[str]) -> None:
    """Raise a :class:`FileError` with all of the problems of :func:`folder_problems` and
    :func:`input_problems`, if there are any.
    """
    if problems:
        several = f"{len(problems)} paths cannot be used: " if len(problems) > 1 else ""
        fix = "correct the paths in the recipe, or choose another --out"
        raise FileError(f"{several}{'; '.join(problems)}", fix=fix)


def unfinished_error(
    recipe: Recipe, stage: Stage, out: Path, manifests: Mapping[str, Manifest]
) -> DistillError | None:
    """The error of a training that the checkpoints of an unfinished one do not fit; None where there are none
    or it goes on from them.
    """
    key_file = partial_folder(out / stage.name) / "key"
    if stage.command not in TRAININGS or not key_file.is_file():
        return None
    from mlx_distill.train.preflight import check_leftover

    fits = key_file.read_text(encoding="utf-8") == current_key(stage, manifests)
    settings = getattr(recipe, stage.command)
    try:
        check_leftover(key_file.parent / "scratch" / "checkpoints", settings, stage.command, fits)
    except DistillError as error:
        return error
    return None


@dataclass(frozen=True)
class Plan:
    """What a run would do; ``--dry-run`` prints it. Each stage has ``command``, ``writes``, ``reads``,
    ``absent`` (inputs that do not exist), ``gate`` (what its result must fulfil, or None), ``state`` (text),
    ``status`` (:attr:`StageStatus.kind`) and ``settings``; one that has to be made may have ``needs`` (text)
    and ``resources``, see :mod:`mlx_distill.resources`. ``problems`` are those of the folders and
    inputs of the stages that have to be made, see :func:`folder_problems` and :func:`input_problems`;
    ``total`` is the sum of the resources, for people.
    """

    recipe: str
    out: str
    stages: Sequence[Mapping[str, Any]]
    problems: Sequence[str] = ()
    total: str | None = None

    @property
    def lines(self) -> list[str]:
        """The plan for people, a paragraph a stage."""
        lines = [f"{self.recipe} -> {self.out}"]
        for stage in self.stages:
            lines.append(f"{stage['command']:<9} {stage['writes']}  [{stage['state']}]")
            for name in stage["reads"]:
                absent = "  (not there yet)" if name in stage["absent"] else ""
                lines.append(f"          reads  {name}{absent}")
            if stage["settings"]:
                settings = ", ".join(f"{key}={value}" for key, value in stage["settings"].items())
                lines.append(f"          with   {settings}")
            if stage["gate"]:
                lines.append(f"          gate   {stage['gate']}")
            if stage.get("needs"):
                lines.append(f"          needs  {stage['needs']}")
        return [*lines, *([self.total] if self.total else [])]

    @property
    def next(self) -> str:
        """The first command that has something to do. Never ``convert``: the stages that need a converted
        model make it.
        """
        return next(
            stage["command"]
            for stage in self.stages
            if stage["status"] != "current" and stage["command"] != "convert"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "recipe": self.recipe,
            "out": self.out,
            "stages": list(self.stages),
            "problems": list(self.problems),
            "total": self.total,
        }


def make_plan(recipe: Recipe, out: Path, stages: Sequence[Stage], forced: Callable[[Stage], bool]) -> Plan:
    """The plan of a run.

    Args:
        recipe: The recipe.
        out: The run's folder.
        stages: The stages, parents before children.
        forced: Whether a stage is made even if it is current.
    """
    manifests: dict[str, Manifest] = {}
    rows, to_do = [], list[Stage]()
    for stage in stages:
        status = stage_status(stage, out, manifests, forced(stage))
        if status.kind != "current":
            to_do.append(stage)
        state = status.text
        if status.kind in ("missing", "stale") and (error := unfinished_error(recipe, stage, out, manifests)):
            state += f"; the run stops here: {error}"
        manifest = read_manifest(out / stage.name) if status.kind == "current" else None
        if manifest is not None:
            manifests[stage.name] = manifest
        rows.append(
            {
                "command": stage.command,
                "writes": str(out / stage.name),
                "reads": list(dict.fromkeys([*(str(out / name) for name in stage.parents), *stage.inputs])),
                "absent": stage.absent,
                "state": state,
                "status": status.kind,
                "settings": _shown_settings(stage),
                "gate": gate_text(recipe, manifest.recorded if manifest else None)
                if stage.command == "targets"
                else None,
            }
        )
    report: dict[str, Any] = {
        "command": "report",
        "writes": str(out / "report.html"),
        "state": "to do",
        "status": "missing",
        "settings": {},
        "gate": None,
        "absent": [],
        "reads": [str(out / stage.name) for stage in stages if stage.command == "evaluate"],
    }
    problems = [
        *folder_problems(to_do, out, recipe.name),
        *input_problems(to_do, out, [stage.name for stage in stages]),
    ]
    return Plan(recipe.name, str(out), [*rows, report], problems)


# Settings by the beginnings of their names, and the training methods that read them.
_OF_METHODS = {
    "lora_": ("lora", "dora"),
    "use_rslora": ("lora", "dora"),
    "galore_": ("galore",),
    "apollo_": ("apollo", "apollo-mini"),
}


def _shown_settings(stage: Stage) -> dict[str, Any]:
    """The settings that have an effect and a value, by name."""
    settings = current_settings(stage.config)
    method = settings.get("method")

    def of_another_method(name: str) -> bool:
        return any(name.startswith(start) and method not in own for start, own in _OF_METHODS.items())

    return {
        name: value
        for name, value in settings.items()
        if name not in ("task", "sources") and value not in (None, [], {}, "") and not of_another_method(name)
    }


@dataclass(frozen=True)
class Outcome:
    """What a stage that was run alone has made. Each folder of it has ``command``, ``writes``, ``state``
    (``made`` or ``current``), ``seconds``, ``bytes`` and ``recorded``; ``next`` is a command line.
    """

    recipe: str
    out: str
    stages: Sequence[Mapping[str, Any]]
    next: str | None = None

    @property
    def lines(self) -> list[str]:
        """A line a folder, and what comes next."""
        lines = []
        for row in self.stages:
            seconds = f"{row['seconds']:.1f} s" if row["seconds"] < 10 else duration(row["seconds"])
            state = f"made in {seconds}" if row["state"] == "made" else "current, nothing was to do"
            facts = ", ".join(stage_facts(row["recorded"], row["bytes"]))
            lines.append(f"{row['command']}: {row['writes']}: {state}; {facts}")
        if self.next:
            return [*lines, f"next: {self.next} (or run, for all that is left)"]
        return [*lines, "next: nothing, every stage is current"]

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain values."""
        return {"recipe": self.recipe, "out": self.out, "stages": list(self.stages), "next": self.next}


def outcome_row(stage: Stage, out: Path, manifest: Manifest, made: bool) -> dict[str, Any]:
    """The row of :class:`Outcome` for a stage's folder."""
    unshown = ("versions", "machine", "recipe", "inputs")
    return {
        "command": stage.command,
        "writes": str(out / stage.name),
        "state": "made" if made else "current",
        "seconds": manifest.recorded["seconds"],
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "recorded": {key: value for key, value in manifest.recorded.items() if key not in unshown},
    }


def stage_facts(recorded: Mapping[str, Any], num_bytes: int) -> list[str]:
    """The few facts of a finished stage that people want to see at once.

    Args:
        recorded: What the stage left in its manifest.
        num_bytes: Size of its files.

    >>> training = {"steps": 32, "resumed": 25, "rows": 200, "best_loss": 0.51234, "best_step": 20}
    >>> stage_facts(training, 1_200_000)
    ['200 rows', '32 steps, 25 of them before', 'best validation loss 0.5123 at step 20', '1.2 MB']
    >>> stage_facts({"rows": {"train": 80, "valid": 10, "test": 10}}, 900)
    ['80 train, 10 valid, 10 test rows', '900 bytes']
    """
    facts = []
    rows = recorded.get("rows")
    if isinstance(rows, Mapping):
        facts.append(", ".join(f"{number:,} {split}" for split, number in rows.items()) + " rows")
    elif rows is not None:
        facts.append(counted(rows, "row"))
    if (steps := recorded.get("steps")) is not None:
        planned = recorded.get("steps_wanted", steps)
        early = f" of {planned}, stopped early" if steps < planned else ""
        resumed = f", {recorded['resumed']} of them before" if recorded.get("resumed") else ""
        facts.append(f"{counted(steps, 'step')}{early}{resumed}")
    if recorded.get("best_loss") is not None:
        kept = recorded.get("kept_step", recorded["best_step"])
        aside = "" if kept == recorded["best_step"] else f" (kept: step {kept}, see use_best)"
        facts.append(
            f"best validation loss {recorded['best_loss']:.4g} at step {recorded['best_step']}{aside}"
        )
    if answers := recorded.get(FACT):
        facts.append(f"{answers['valid']:,} of {answers['rows']:,} answers fit the task")
    if recorded.get("bits_per_weight") is not None:
        facts.append(
            f"{recorded['parameters']:,} parameters, {recorded['bits_per_weight']:.2f} bits per weight"
        )
    return [*facts, size(num_bytes)]
