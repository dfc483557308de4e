"""What a cross-validation consists of and what it costs: its runs, their rows, and the time that is left by
what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.config import override_texts
from mlx_distill.graph import Stage, graph, stages_for
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.resources import stage_resources, total_disk
from mlx_distill.run_models import fold_name
from mlx_distill.storage import digest, read_manifest
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, duration, listed, size

SHARES = (0.25, 0.5, 0.75)
"""The shares of the training rows of a learning curve, before all of them."""


@dataclass(frozen=True)
class FoldRun:
    """One run of a cross-validation.

    Attributes:
        folder: Its folder.
        fold: Its number, from 1.
        models: Whose evaluations it makes.
        overrides: The keys of the recipe that make it this fold.
        share: The share of the training rows that it is given.
    """

    folder: Path
    fold: int
    models: tuple[str, ...]
    overrides: tuple[str, ...]
    share: float = 1.0

    @property
    def name(self) -> str:
        """For people."""
        return f"fold {self.fold}" + (f" at {self.share:.0%} of its rows" if self.share < 1 else "")


@dataclass(frozen=True)
class ValidationPlan:
    """What a cross-validation costs.

    Attributes:
        recipe: The recipe's name.
        out: The folder.
        folds: How many.
        rows: ``all`` rows, and of the first fold how many it has to ``train`` on, for ``valid`` and for
            ``test``.
        trainings: One entry a command that trains: ``command``, ``runs`` of it, of them ``done``, ``rows`` of
            one, and its ``steps`` where they do not depend on lengths.
        answers: Of each model the number of rows that it answers.
        disk: Bytes at most, where that is known.
        seconds: The time that is left; None where nothing was measured yet.
        measured: What ``seconds`` was measured on.
        memory: Bytes that a training with a live teacher takes at least; None without one, or where that is
            not known.
    """

    recipe: str
    out: str
    folds: int
    rows: Mapping[str, int]
    trainings: Sequence[Mapping[str, Any]]
    answers: Mapping[str, int]
    disk: int | None
    seconds: float | None
    measured: str | None
    memory: int | None = None

    @property
    def lines(self) -> list[str]:
        """The plan for people."""
        rows = self.rows
        lines = [
            f"{self.recipe}: {counted(rows['all'], 'row')} in {self.folds} folds -> {self.out}",
            f"each fold: {rows['train']:,} rows to train on, {rows['valid']:,} for validation, "
            f"{rows['test']:,} to test on",
        ]
        for entry in self.trainings:
            steps = f", about {counted(entry['steps'], 'step')} each" if entry["steps"] else ""
            done = f"; {entry['done']} done" if entry["done"] else ""
            lines.append(
                f"{counted(entry['runs'], 'training')}: {entry['command']} on {entry['rows']}{steps}{done}"
            )
        answers = [f"{model} {counted(count, 'row')}" for model, count in self.answers.items()]
        lines.append(f"answers: {', '.join(answers)}")
        if self.disk is not None:
            lines.append(f"disk: at most {size(self.disk)}, converted models once")
        if self.memory is not None:
            lines.append(f"memory: at least {size(self.memory)}, student and live teacher")
        lines.append(f"time left: {self._time}")
        return lines

    @property
    def _time(self) -> str:
        if self.seconds is None:
            return "not known before the first fold is done: nothing of it was measured on this machine"
        if not self.measured:
            return "none, every stage is current"
        return f"about {duration(self.seconds)}, as {self.measured} took"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}


@dataclass
class FoldRuns:
    """A cross-validation in progress."""

    spec: str | Path | Recipe
    recipe: Recipe
    task: Task
    out: Path
    folds: int
    models: tuple[str, ...]
    curve: str | None
    overrides: tuple[str, ...]
    counts: dict[Path, dict[str, int]] = field(default_factory=dict)  # rows of each split, by folder
    _stages: dict[Path, list[Stage]] = field(default_factory=dict)

    @property
    def runs(self) -> list[FoldRun]:
        """One run a fold, then those of the learning curve, by rising share."""
        whole = [self._run(fold, self.models) for fold in range(1, self.folds + 1)]
        return whole + [
            self._run(fold, ("teacher",), share) for share in self.shares for fold in self.curve_folds
        ]

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of a learning curve, before all of the rows."""
        return SHARES if self.curve else ()

    @property
    def curve_folds(self) -> range:
        """The folds whose learning curve is measured."""
        return range(1, (self.folds if self.curve == "each" else 1) + 1)

    def _run(self, fold: int, models: tuple[str, ...], share: float = 1.0) -> FoldRun:
        name = fold_name(fold, self.folds, share)
        settings = {
            "data.folds": self.folds,
            "data.fold": fold,
            "evaluate.models": list(models),
            "controls.labels": False,
            "controls.text": False,
            "controls.labels_hard": False,
            "controls.teacher_hard": False,
            **({"data.train_share": share} if share < 1 else {}),
        }
        overrides = (*self.overrides, *override_texts(settings))
        return FoldRun(self.out / name, fold, models, overrides, share)

    def stages(self, one: FoldRun) -> list[Stage]:
        """The stages of one run."""
        if one.folder not in self._stages:
            recipe = load_recipe(self.spec, one.overrides)
            self._stages[one.folder] = stages_for(graph(recipe, self.task), one.models)
        return self._stages[one.folder]


def row_counts(folder: Path) -> dict[str, int]:
    """The prepared rows of each split of a run."""
    manifest = read_manifest(folder / "data")
    assert manifest is not None
    return dict(manifest.recorded["rows"])


def stage_seconds(folder: Path, stage: Stage) -> float | None:
    """How long a finished stage took; None where it is not there."""
    manifest = read_manifest(folder / stage.name)
    return None if manifest is None else float(manifest.recorded.get("seconds") or 0.0)


def make_plan(validation: FoldRuns) -> ValidationPlan:
    """What is left to do, and how long it takes by what was measured."""
    runs = validation.runs
    rows = validation.counts[runs[0].folder]
    seconds, measured = _time_left(validation)
    disk = _disk(validation)
    return ValidationPlan(
        validation.recipe.name,
        str(validation.out),
        validation.folds,
        {"all": sum(rows.values()), **rows},
        _trainings(validation, rows),
        {
            model: sum(_rows_of(validation, one)["test"] for one in runs if model in one.models)
            for model in validation.models
        },
        disk,
        seconds,
        measured,
        _memory(validation),
    )


def _rows_of(validation: FoldRuns, one: FoldRun) -> Mapping[str, int]:
    """The rows of a run; before it is prepared, those of the first fold."""
    known = validation.counts.get(one.folder)
    if known is not None:
        return known
    rows = validation.counts[validation.runs[0].folder]
    return {**rows, "train": round(rows["train"] * one.share)}


def _trainings(validation: FoldRuns, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    out = []
    for command in ("teach", "distill"):
        made = [
            (one, stage)
            for one in validation.runs
            for stage in validation.stages(one)
            if stage.command == command
        ]
        if not made:
            continue
        settings = getattr(validation.recipe, command)
        counts = sorted({_rows_of(validation, one)["train"] for one, _ in made})
        spread = f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{counts[0]:,}"
        per_step = settings.batch_size * settings.accumulate
        steps = settings.steps or (
            None if settings.packing else max(1, math.ceil(settings.epochs * rows["train"] / per_step))
        )
        out.append(
            {
                "command": command,
                "runs": len(made),
                "done": sum(stage_seconds(one.folder, stage) is not None for one, stage in made),
                "rows": f"{spread} rows",
                "steps": steps if len(counts) <= 2 else None,
            }
        )
    return out


def _time_left(validation: FoldRuns) -> tuple[float | None, str | None]:
    """The seconds that the unfinished stages take if they take as long as the same stages of a finished fold,
    or of the recipe's own run beside this folder; in proportion to the rows, where their number decides.
    """
    own = FoldRun(validation.out.parent / validation.recipe.name, 0, validation.models, ())
    sources = [(one.name, one.folder, validation.counts.get(one.folder)) for one in validation.runs]
    data = read_manifest(own.folder / "data")
    if data is not None and data.recorded.get("recipe") == validation.recipe.name:
        sources.append((str(own.folder), own.folder, dict(data.recorded["rows"])))
    left, names = 0.0, list[str]()
    for one in validation.runs:
        for stage in validation.stages(one):
            if stage.command in ("prepare", "convert") or stage_seconds(one.folder, stage) is not None:
                continue
            rows = _rows_of(validation, one)
            for name, folder, counts in sources:
                took = _same_stage_seconds(folder, stage)
                if took is not None and counts:
                    left += took * _ratio(validation.recipe, stage, rows, counts)
                    names.append(name)
                    break
            else:
                return None, None
    return left, listed(list(dict.fromkeys(names))) or None


def _same_stage_seconds(folder: Path, stage: Stage) -> float | None:
    """How long a stage took in a run that made it with the same settings."""
    manifest = read_manifest(folder / stage.name)
    same = manifest is not None and digest(manifest.config) == digest(stage.config)
    return stage_seconds(folder, stage) if same else None


def _ratio(recipe: Recipe, stage: Stage, rows: Mapping[str, int], counts: Mapping[str, int]) -> float:
    """How many times as long a stage takes with some rows as with others."""
    if stage.command in ("teach", "distill") and getattr(recipe, stage.command).steps:
        return 1.0
    split = "test" if stage.command == "evaluate" else "train"
    return rows[split] / counts[split] if counts[split] and stage.command != "quantize" else 1.0


def _memory(validation: FoldRuns) -> int | None:
    """What a training with a live teacher takes at least."""
    one = validation.runs[0]
    needs = stage_resources(load_recipe(validation.spec, one.overrides), validation.stages(one), one.folder)
    return max((need.memory for need in needs.values() if need.memory is not None), default=None)


def _disk(validation: FoldRuns) -> int | None:
    """Bytes that all folds take at most: the converted models once, everything else in each."""
    shared, own = 0, 0
    for one in (validation.runs[0], *validation.runs[validation.folds : validation.folds + 1]):
        recipe = load_recipe(validation.spec, one.overrides)
        stages = validation.stages(one)
        needs = stage_resources(recipe, stages, one.folder)
        if any(need.disk is None for need in needs.values()):
            return None
        bases = {stage.name for stage in stages if stage.command == "convert"}
        times = sum(
            other.models == one.models and (other.share < 1) == (one.share < 1) for other in validation.runs
        )
        own += times * total_disk({name: need for name, need in needs.items() if name not in bases})
        shared = max(shared, total_disk({name: need for name, need in needs.items() if name in bases}))
    return shared + own
