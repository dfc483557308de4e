"""The graph of a recipe: its stages, what each reads, and the settings that are part of its key.

    rows -------------------> data --------------+------------------+
    teacher -> teacher_base ---------------------+-> teacher -> targets --+
    student -> student_base ------------------------------------------------+-> student -> quantized
    any of these models, and data -> evaluations/<model> -> report.json, report.html
    teacher, student, their bases, targets and data -> audit -> report.json, report.html

A recipe without a student has the upper half alone, up to ``teacher``, and measures it before and after; the
audit then reads its base, the teacher and the data.
Each name is a folder of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import ASSETS, keyed, resolve_asset
from mlx_distill.data.sources import generator_files
from mlx_distill.data.sqlite import write_ahead_log
from mlx_distill.distill.setting_checks import check_settings
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.audit import FOLDER as AUDIT
from mlx_distill.evaluate.categories import parse_categories
from mlx_distill.evaluate.edge_cases import edge_case_file
from mlx_distill.evaluate.goals import check_goals
from mlx_distill.evaluate.registry import task_metrics
from mlx_distill.models.folder import conversion_format
from mlx_distill.models.hub import is_hub_id
from mlx_distill.recipe import EVALUATED, UNTRAINED, Recipe
from mlx_distill.run_models import CONTROLS, RUN_MODELS, RunModel
from mlx_distill.stages.audit import audit, audited_models, general_text_file
from mlx_distill.stages.convert import convert
from mlx_distill.stages.distill import distill
from mlx_distill.stages.evaluate import evaluate
from mlx_distill.stages.evaluate_chats import evaluate_chats
from mlx_distill.stages.prepare import prepare
from mlx_distill.stages.quantize import quantize
from mlx_distill.stages.targets import recipe_temperatures, targets
from mlx_distill.stages.teach import teach
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names

if TYPE_CHECKING:
    from mlx_distill.stages.context import Context


TRAININGS = ("teach", "distill")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: Its folder under the run.
        command: The command that makes it.
        format: A number that is raised when the files that it writes change.
        config: The settings that are part of its key.
        parents: The names of the stages that it reads.
        work: Makes it: takes the context and the folder to write into, and returns facts for the manifest.
        inputs: What it reads from outside the run: paths and ids of the Hub.
        local: The inputs that cannot be downloaded, so must exist on this machine.
        model: The model that an evaluation measures.
    """

    name: str
    command: str
    format: int
    config: Mapping[str, Any]
    parents: tuple[str, ...]
    work: Callable[[Context, Path], dict[str, Any]]
    inputs: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    model: str | None = None

    @property
    def absent(self) -> list[str]:
        """The local inputs that do not exist."""
        return [name for name in self.local if not Path(name).expanduser().exists()]


def graph(recipe: Recipe, task: Task) -> list[Stage]:
    """The stages of a recipe, parents before children.

    Raises:
        ConfigError: stages, metrics, error categories or goals that do not fit each other or the task.
    """
    parse_categories(task)
    task_metrics(task)
    check_goals(recipe.goals, task)
    _check_distillation(recipe, task)
    edge_cases = (str(edge_case_file(task)),) if recipe.evaluate.edge_cases else ()
    # The part of the keys of all stages that run a model. Keys keep the old name of dequantize.
    shared = {"task": keyed(task), "compute_dtype": recipe.compute_dtype, "unpack": recipe.dequantize}
    out = [
        Stage(
            "data",
            "prepare",
            2,
            {**keyed(recipe.data), "task": keyed(task)},
            (),
            prepare,
            *_sources(recipe),
        ),
        _conversion(recipe, "teacher_base", recipe.teacher),
    ]
    prompt, prompt_file = _teacher_prompt(recipe)
    teaching = Stage(
        "teacher",
        "teach",
        2,
        {**keyed(recipe.teach), **shared, **prompt},
        ("teacher_base", "data"),
        teach,
        prompt_file,
        prompt_file,
    )
    if recipe.student is None:
        own = _models_without_student(recipe)
        evaluations = [_evaluation(recipe, RUN_MODELS[name], shared, edge_cases) for name in own]
        return [*out, teaching, *evaluations, *_audit(recipe, shared)]
    out += [
        _conversion(recipe, "student_base", recipe.student),
        teaching,
        _targets(recipe, shared),
        Stage(
            "student",
            "distill",
            4,
            {**keyed(recipe.distill), **shared, **_student_thinking(recipe)},
            _distillation_parents(recipe),
            distill,
        ),
        _quantization(recipe, shared),
    ]
    controls = [model for model in CONTROLS if getattr(recipe.controls, model.control or "")]
    out += [_control(recipe, model, shared) for model in controls]
    measured = dict.fromkeys(["teacher", *_named_models(recipe), *(model.name for model in controls)])
    out += [_evaluation(recipe, RUN_MODELS[name], shared, edge_cases) for name in measured]
    return [*out, *_audit(recipe, shared)]


def _check_distillation(recipe: Recipe, task: Task) -> None:
    """Refuse settings of targets and distillation that do not go together, or not with the rest of the
    recipe.
    """
    check_settings(recipe.distill, recipe.targets)
    if recipe.distill.teacher == "live" and recipe.teach.method == UNTRAINED and _same_source(recipe):
        recipe.check_own_base()
    if recipe.teacher_thinking and recipe.evaluate.shuffle_options:
        raise ConfigError(
            "evaluate.shuffle_options scores labels right behind a prompt, and with targets.thinking: "
            f"{recipe.targets.thinking} the teacher thinks first",
            fix="leave out evaluate.shuffle_options, or set targets.thinking: none",
        )
    for name, plain in (("labels_hard", "labels"), ("teacher_hard", "text")):
        if getattr(recipe.controls, name) and (task.label is None or not recipe.distill.label_weight):
            raise ConfigError(
                f"controls.{name}: the distillation has no label term, so it is controls.{plain}",
                fix=f"set controls.{plain} instead, or distill.label_weight",
            )


def _same_source(recipe: Recipe) -> bool:
    """Whether teacher and student are one base model."""
    return recipe.student is not None and (
        resolve_asset(recipe.teacher, recipe.base) == resolve_asset(recipe.student, recipe.base)
    )


def stages_for(stages: Sequence[Stage], models: Sequence[str]) -> list[Stage]:
    """The stages that the evaluations of some models need, parents before children.

    Raises:
        ConfigError: a model that the graph does not evaluate.
    """
    by_name = {stage.name: stage for stage in stages}
    evaluated = [stage.model for stage in stages if stage.model is not None]
    for model in models:
        if model not in evaluated:
            raise ConfigError(
                f"no model {model!r}", fix=known_names(model, evaluated, "models of this recipe")
            )
    needed = [f"evaluations/{model}" for model in models]
    for name in needed:  # it grows while it is read
        needed += [parent for parent in by_name[name].parents if parent not in needed]
    return [stage for stage in stages if stage.name in needed]


def _models_without_student(recipe: Recipe) -> list[str]:
    """The teacher before and after fine-tuning; another model cannot be named."""
    own = [name for name, model in RUN_MODELS.items() if model.role == "teacher"]
    fix = "name a student, or leave it out"
    if recipe.teach.method == UNTRAINED:
        raise ConfigError("teach.method: none: the recipe has no student, so nothing is trained", fix=fix)
    for model in CONTROLS:
        if getattr(recipe.controls, model.control or ""):
            raise ConfigError(f"controls.{model.control}: the recipe has no student", fix=fix)
    for name in [] if recipe.evaluate.models == EVALUATED else _named_models(recipe):
        if name not in own:
            raise ConfigError(f"evaluate.models: {name!r}, and the recipe has no student", fix=fix)
    if recipe.targets.system or recipe.targets.system_file:
        raise ConfigError(
            "targets.system: the recipe has no student, which would read another system prompt",
            fix="write the prompt into the task or the rows, or name a student",
        )
    if recipe.teacher_thinking:
        raise ConfigError("targets.thinking: the recipe has no student, so there are no targets", fix=fix)
    for goal in recipe.goals:
        if goal.model not in own:
            raise ConfigError(f"goals: a goal of {goal.model!r}, and the recipe has no student", fix=fix)
    return own


def _targets(recipe: Recipe, shared: Mapping[str, Any]) -> Stage:
    config = {**keyed(recipe.targets), **shared}
    if temperatures := recipe_temperatures(recipe):
        config["temperatures"] = list(temperatures)
    _, prompt_file = _teacher_prompt(recipe)  # targets.system itself is among their settings
    # What is kept for a temperature is another since format 5; without one nothing changed.
    number = 5 if temperatures else 4
    return Stage("targets", "targets", number, config, ("teacher", "data"), targets, prompt_file, prompt_file)


def _teacher_prompt(recipe: Recipe) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The system prompt that the teacher reads in place of the rows', and how much it thinks, as a part of
    the keys of its stages: the text, or the file.
    """
    path = recipe.teacher_system_file
    prompt: dict[str, Any] = {"targets_system": recipe.targets.system} if recipe.targets.system else {}
    if recipe.teacher_thinking:
        prompt["thinking"] = recipe.teacher_thinking
    return prompt, () if path is None else (str(path),)


def _conversion(recipe: Recipe, name: str, spec: str) -> Stage:
    source = resolve_asset(spec, recipe.base)
    local = () if is_hub_id(source) and not Path(source).exists() else (source,)
    return Stage(
        name,
        "convert",
        conversion_format(recipe.convert.quantize),
        keyed(recipe.convert),
        (),
        lambda context, folder: convert(context, folder, source, name),
        (source,),
        local,
    )


def _quantization(recipe: Recipe, shared: Mapping[str, Any]) -> Stage:
    settings = recipe.quantize
    needs_rows = {"quantize.refine: distill": settings.refine == "distill"}
    needs_rows["quantize.bits_per_weight"] = settings.bits_per_weight > 0
    if settings.adapter == "keep" and recipe.distill.method in ("lora", "dora"):
        for key, is_set in needs_rows.items():
            if is_set:
                raise ConfigError(
                    f"{key} measures the merged student, and quantize.adapter is keep",
                    fix="set quantize.adapter: merge",
                )
    config = {**keyed(settings), **shared, "max_length": recipe.distill.max_length}
    parents = ["student", "student_base", "data"]
    if recipe.student_thinking and (settings.refine != "none" or settings.bits_per_weight):
        parents.append("targets")  # the student's rows, with what it learned to think
    # Refined weights are others since format 4; rounded ones are not.
    number = 3 if settings.refine == "none" else 4
    return Stage("quantized", "quantize", number, config, tuple(parents), quantize)


def _distillation_parents(recipe: Recipe) -> tuple[str, ...]:
    live = ("teacher",) if recipe.distill.teacher == "live" else ()
    return ("student_base", "targets", "data", *live)


def _student_thinking(recipe: Recipe) -> dict[str, Any]:
    return {"thinking": recipe.student_thinking} if recipe.student_thinking else {}


def _control(recipe: Recipe, model: RunModel, shared: Mapping[str, Any]) -> Stage:
    of_rows = model.control in ("labels", "labels_hard")
    parents = ("student_base", "data") if of_rows else _distillation_parents(recipe)
    config = {**keyed(recipe.distill), **shared, "control": model.control}
    config |= {} if of_rows else _student_thinking(recipe)
    return Stage(
        model.name,
        "distill",
        2,
        config,
        parents,
        lambda context, folder: distill(context, folder, model.control),
    )


def _named_models(recipe: Recipe) -> list[str]:
    """The models that ``evaluate.models`` names; controls have keys of their own."""
    known = {name for name, model in RUN_MODELS.items() if model.role != "control"}
    for name in recipe.evaluate.models:
        if name not in known:
            raise ConfigError(
                f"evaluate.models: {name!r} is not one of {', '.join(sorted(known))}",
                fix="name models of the run",
            )
    return recipe.evaluate.models


def _evaluation(
    recipe: Recipe, model: RunModel, shared: Mapping[str, Any], edge_cases: tuple[str, ...]
) -> Stage:
    settings = {k: v for k, v in keyed(recipe.evaluate).items() if k != "models"}
    config = {**settings, **shared, "unpack": recipe.dequantizes(model.folder), "model": model.name}
    base = (model.base,) if model.base else ()
    if recipe.task is None:
        return _chat_evaluation(recipe, model, shared, base)
    prompt, prompt_file = _teacher_prompt(recipe) if model.role == "teacher" else ({}, ())
    return Stage(
        f"evaluations/{model.name}",
        "evaluate",
        4,
        config | prompt,
        (model.folder, *base, "data"),
        lambda context, folder: evaluate(context, folder, model.folder, model.name),
        (*edge_cases, *prompt_file),
        prompt_file,
        model=model.name,
    )


def _audit(recipe: Recipe, shared: Mapping[str, Any]) -> list[Stage]:
    """The audit of the models that are evaluated; none where it measures nothing."""
    models = [RUN_MODELS[name] for name in audited_models(recipe)]
    if not models:
        return []
    prompt, prompt_file = _teacher_prompt(recipe)
    text = general_text_file(recipe)
    settings = {"audit_rows": recipe.evaluate.audit_rows, "batch_size": recipe.evaluate.batch_size}
    folders = dict.fromkeys(name for model in models for name in (model.base, model.folder) if name)
    targets_read = ("targets",) if "student" in folders else ()
    parents = (*folders, *targets_read, "data")
    inputs = (text, *prompt_file)
    return [Stage(AUDIT, "evaluate", 1, {**settings, **shared, **prompt}, parents, audit, inputs, inputs)]


def _chat_evaluation(
    recipe: Recipe, model: RunModel, shared: Mapping[str, Any], base: tuple[str, ...]
) -> Stage:
    """The loss of a model on the held-out chats of a recipe without a task."""
    config = {
        "max_rows": recipe.evaluate.max_rows,
        "max_length": recipe.teach.max_length,
        "loss_on": recipe.teach.loss_on,
        **shared,
        "unpack": recipe.dequantizes(model.folder),
        "model": model.name,
    }
    return Stage(
        f"evaluations/{model.name}",
        "evaluate",
        1,
        config,
        (model.folder, *base, "data"),
        lambda context, folder: evaluate_chats(context, folder, model.folder, model.name),
        model=model.name,
    )


def _sources(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The inputs of the prepare stage, and those of them that cannot be downloaded."""
    out, hub, logs = [], [], []
    for source in recipe.data.sources:
        name = source.path or source.sqlite
        if name:
            out.append(resolve_asset(name, recipe.base))
            log = write_ahead_log(Path(out[-1])) if source.sqlite else None
            logs += [str(log)] if log else []
        elif source.generator:
            files = generator_files(source.generator) if source.policy else []
            out += map(str, files or [ASSETS / source.generator / "generator.py"])
        elif source.hub:
            folder = resolve_asset(source.hub.partition(":")[0], recipe.base)
            if not Path(folder).exists():
                folder = f"{source.hub}@{source.revision or 'main'}"
                hub.append(folder)
            out.append(folder)
    out += logs  # behind the others, whose numbers then stay the same while a database is written to
    return tuple(out), tuple(name for name in out if name not in hub)
