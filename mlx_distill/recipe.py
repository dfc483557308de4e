"""A recipe: teacher, student, task, data, and one block of settings for each stage, with the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import (
    ASSETS,
    Overrides,
    current_spelling,
    from_mapping,
    option,
    override,
    override_items,
    packaged,
    read_yaml,
    resolve_asset,
    to_mapping,
)
from mlx_distill.config_sections import Section, sections
from mlx_distill.errors import ConfigError
from mlx_distill.recipe_data import DataConfig as DataConfig
from mlx_distill.recipe_data import SourceConfig as SourceConfig
from mlx_distill.recipe_data import ValueConfig as ValueConfig
from mlx_distill.recipe_training import ATTENTION as ATTENTION
from mlx_distill.recipe_training import MAX_TOP_K as MAX_TOP_K
from mlx_distill.recipe_training import MLP as MLP
from mlx_distill.recipe_training import TOKEN_LOSSES as TOKEN_LOSSES
from mlx_distill.recipe_training import UNTRAINED as UNTRAINED
from mlx_distill.recipe_training import VALIDATION_METRICS as VALIDATION_METRICS
from mlx_distill.recipe_training import DistillConfig as DistillConfig
from mlx_distill.recipe_training import TargetsConfig as TargetsConfig
from mlx_distill.recipe_training import TeachConfig as TeachConfig
from mlx_distill.recipe_training import TrainConfig as TrainConfig
from mlx_distill.recipe_training import validation_metrics
from mlx_distill.tasks.task import CHATS, Task, load_task, task_names
from mlx_distill.text import known_names

EVALUATED = ["teacher", "student_before", "student", "quantized"]
# affineN has N bits; the mixed modes keep embeddings and output head in 8 bits. See models/quantization.py.
MODES = [
    "affine1",
    "affine2",
    "affine3",
    "affine4",
    "affine5",
    "affine6",
    "affine8",
    "mxfp4",
    "nvfp4",
    "mxfp8",
    "mixed4",
    "mixed-mxfp4",
    "mixed-nvfp4",
]
FLOATS = ["float32", "bfloat16", "float16"]
REFINEMENTS = ["none", "calibrate", "distill"]


@dataclass(frozen=True)
class ConvertConfig:
    """Convert: a Hugging Face checkpoint to an MLX folder, numerically the same."""

    quantize: str | None = option(
        None, "quantization mode of the converted weights; none: not quantized further", choices=MODES
    )
    dtype: str | None = option(
        None, "dtype of the floating-point weights; none keeps each tensor's own", choices=FLOATS
    )
    revision: str | None = option(None, "commit or tag of a Hub model")


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantize: the student's weights, except those that are MXFP4 already."""

    mode: str = option("affine4", "quantization mode", choices=MODES)
    group_size: int = option(0, "weights that share a scale; 0: the mode's default", low=0)
    adapter: str = option(
        "merge", "merge the adapter first, or keep it beside the quantized base", choices=["merge", "keep"]
    )
    keep: list[str] = option(["router"], "modules with one of these in their name are not quantized")
    bits_per_weight: float = option(
        0.0,
        "size budget: stored bits of the whole model for each of its weights, such as 4.3; modules get "
        "different modes of the family of mode (affine3 to affine8; or mxfp4, nvfp4, mxfp8) so that the "
        "model loses least; 0: mode everywhere",
        low=0.0,
    )
    refine: str = option(
        "calibrate",
        "fit the quantized weights to rows: calibrate (weighted scales and GPTQ, no training), distill (then "
        "train them towards the unquantized student), or none; kept only where held-out rows lose less",
        choices=REFINEMENTS,
    )
    refine_rows: int = option(128, "training rows that calibrate and distill use", low=8)
    refine_steps: int = option(50, "steps of distill, of 4 rows each", low=1)
    refine_learning_rate: float = option(
        1.5e-4, "learning rate of distill, in units of the weights; ten times as much diverges", low=0.0
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate: each model answers the held-out rows."""

    models: list[str] = option(EVALUATED, "models to evaluate")
    batch_size: int = option(16, "rows at a time", low=1)
    max_rows: int = option(0, "held-out rows of each set; 0: all", low=0)
    constrain: bool = option(
        True,
        "measure the answers under the grammar of the task too; only those that differ are generated again",
    )
    confidence: float = option(0.95, "confidence level of the intervals", low=0.5, high=0.999, keyed=False)
    margin: str | None = option(
        "3pt",
        "how much worse than the teacher is still as good: points (3pt), or a share of the teacher's value "
        "(5%); none: no student is called as good",
        keyed=False,
    )
    repeats: int = option(
        0,
        "runs in which the held-out rows are answered again, to measure how much answers vary: greedily in "
        "shuffled batches, and as many times with sampling; 2 or more; 0: none",
        low=0,
        default_keyed=False,
    )
    repeat_temperature: float = option(
        0.7,
        "temperature of the sampled runs of repeats; 0: shuffled batches alone",
        low=0.0,
        default_keyed=False,
    )
    repeat_rows: int = option(
        0, "held-out rows that the repeats answer, drawn at random; 0: all", low=0, default_keyed=False
    )
    shuffle_options: int = option(
        0,
        "orders of the task's labels in the prompt in which the held-out rows' labels are scored, to count "
        "how often the order decides; 2 or more; 0: none",
        low=0,
        default_keyed=False,
    )
    edge_cases: bool = option(
        False,
        "let each model answer the task's edge cases too: unusual rows with the behaviour that is expected",
        default_keyed=False,
    )
    audit_rows: int = option(
        64,
        "rows of each kind (training, validation, targets) that the audit of a run measures; 0: no audit",
        low=0,
        keyed=False,  # no part of an evaluation; the audit's own key has it
    )
    general_text: str | None = option(
        None,
        "a text file, or JSONL with a text a line, of what is not of the task: on it the audit measures what "
        "models have forgotten; none: packaged paragraphs",
        keyed=False,
    )
    costs: str | None = option(
        None,
        "a YAML file of prices: hardware, watts, electricity, an API's tokens, labelling",
        keyed=False,
    )


@dataclass(frozen=True)
class GoalConfig:
    """Goals: limits for figures of the report, judged by the ends of their intervals."""

    model: str = option(help="a model that the run measures")
    metric: str = option(
        help="a figure of the model in the report, such as accuracy or false_positive_rate, or a metric or "
        "error category of the task"
    )
    at_least: float | None = option(None, "met where the whole interval is at this value or above")
    at_most: float | None = option(None, "met where the whole interval is at this value or below")


@dataclass(frozen=True)
class ControlsConfig:
    """Controls: students trained for as many steps without a part of the distillation, to show its effect."""

    labels: bool = option(
        False,
        "a student trained on the rows' own answers by cross-entropy: what plain fine-tuning brings; it "
        "differs from the student in where the loss lies too",
    )
    text: bool = option(
        False,
        "a student trained on the teacher's text by cross-entropy, without its distributions; it differs "
        "from the student in where the loss lies too",
    )
    labels_hard: bool = option(
        False,
        "a fair control: the student's terms and weights, with the row's own label in place of the teacher's "
        "distribution; the difference is what the teacher brings",
    )
    teacher_hard: bool = option(
        False,
        "a fair control: the student's terms and weights, with the teacher's most probable label in place of "
        "its distribution; the difference is what the teacher's probabilities bring",
    )


@dataclass(frozen=True)
class Recipe:
    """The settings of a run."""

    name: str = option(help="name of the run, in reports and as the default folder under runs/")
    teacher: str = option(help="a Hub id, a folder, or asset:NAME")
    task: str | Mapping[str, Any] | None = option(
        None,
        "a packaged task, a YAML file, or a mapping with name and overrides; without a task and a student "
        "the teacher is fine-tuned on chats of any kind",
    )
    student: str | None = option(
        None,
        "a Hub id, a folder, or asset:NAME; without a student the run ends after teach, and compares the "
        "teacher before and after it",
    )
    description: str = option("", "one line for the list of recipes", keyed=False)
    compute_dtype: str | None = option(
        None,
        "dtype that weights that are not quantized are computed in; none: that of the checkpoint",
        choices=FLOATS,
    )
    dequantize: bool = option(
        False,
        "dequantize weights before computing, except in the quantized model: the same numbers, faster on a "
        "CPU, more memory",
        old_name="unpack",
    )
    data: DataConfig = option(DataConfig, "prepare")
    convert: ConvertConfig = option(ConvertConfig, "convert")
    teach: TeachConfig = option(TeachConfig, "teach")
    targets: TargetsConfig = option(TargetsConfig, "targets")
    distill: DistillConfig = option(DistillConfig, "distill")
    quantize: QuantizeConfig = option(QuantizeConfig, "quantize")
    evaluate: EvaluateConfig = option(EvaluateConfig, "evaluate")
    controls: ControlsConfig = option(ControlsConfig, "controls")
    goals: list[GoalConfig] = option([], "what the run has to show", keyed=False)
    base: Path | None = field(
        default=None,
        metadata={"keyed": False, "settable": False, "help": "folder that paths are relative to"},
    )

    def dequantizes(self, folder: str) -> bool:
        """Whether the model in this folder of the run computes with dequantized weights. The quantized model
        never does, since its quantized weights are what is measured.
        """
        return self.dequantize and folder != "quantized"

    @property
    def teacher_thinking(self) -> int:
        """The most tokens that the teacher thinks before an answer; 0 where it answers at once."""
        return self.targets.teacher_thinking

    @property
    def student_thinking(self) -> int:
        """The same of the student."""
        return self.targets.student_thinking

    def check_own_base(self) -> None:
        """Refuse a live teacher that is the student's own base where the training moves that base.

        Raises:
            ConfigError: all weights, or some modules fully, are trained.
        """
        settings = self.distill
        moves = settings.method not in ("lora", "dora")
        if moves or settings.modules_to_save:
            changed = f"method: {settings.method}" if moves else "modules_to_save"
            raise ConfigError(
                f"distill.teacher: live, and the teacher is the student's own base, which {changed} changes: "
                "with the adapter switched off there would be no teacher left",
                fix="set distill.method: lora or dora without modules_to_save, or distill.teacher: cached",
            )

    @property
    def teacher_system_file(self) -> Path | None:
        """The file of ``targets.system_file``."""
        name = self.targets.system_file
        return None if name is None else Path(resolve_asset(name, self.base))

    def teacher_system(self) -> str | None:
        """The system prompt that the teacher reads in place of the rows', or None where it reads theirs.

        Raises:
            ConfigError: a file that cannot be read, or that holds no text.
        """
        path = self.teacher_system_file
        if path is None:
            return self.targets.system.strip() or None
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"targets.system_file: {path}: cannot be read as UTF-8 text: {error}", fix="correct the path"
            ) from error
        if not text:
            raise ConfigError(
                f"targets.system_file: {path} is empty", fix="write the prompt, or leave it out"
            )
        return text

    def load_task(self) -> Task:
        """Load the task that the recipe names; of a recipe without one :data:`mlx_distill.tasks.task.CHATS`.

        Raises:
            ConfigError: no such task, a recipe that needs one and names none, or a ``best_metric`` that the
                task does not have.
        """
        if self.task is None:
            self._check_without_task()
        task = CHATS if self.task is None else load_task(self.task, self.base)
        self._check_best_metric(task)
        return task

    def _check_best_metric(self, task: Task) -> None:
        measured = validation_metrics(task)
        reason = "the recipe has no task" if task.is_chats else f"the task {task.name!r} has no such metric"
        for name, settings in (("teach", self.teach), ("distill", self.distill)):
            if settings.best_metric not in measured and (name == "teach" or self.student is not None):
                raise ConfigError(
                    f"{name}.best_metric: {settings.best_metric}: {reason}",
                    fix=f"one of {', '.join(measured)}",
                )

    def _check_without_task(self) -> None:
        """Refuse what only the answers of a task have."""
        fix = f"name a task: a packaged one ({', '.join(task_names())}), or a YAML file"
        if self.student is not None:
            raise ConfigError(f"recipe {self.name}: a student, and no task that it learns", fix=fix)
        for number, source in enumerate(self.data.sources):
            for key in ("values", "answer_after"):
                if getattr(source, key):
                    raise ConfigError(f"data.sources[{number}].{key}: the recipe has no task", fix=fix)
        for key in ("repeats", "shuffle_options", "edge_cases", "costs"):
            if getattr(self.evaluate, key):
                raise ConfigError(f"evaluate.{key}: the recipe has no task", fix=fix)
        if self.data.folds:
            raise ConfigError("a cross-validation, and the recipe has no task", fix=fix)


def load_recipe(
    spec: str | Path | Recipe, overrides: Overrides = (), notes: list[str] | None = None
) -> Recipe:
    """Load a packaged recipe by name or a YAML file by path, and set some of its keys.

    Args:
        spec: The name, the path, or a recipe that is loaded already.
        overrides: ``{"distill.epochs": 2}``, or texts such as ``distill.epochs=2``; see
            :func:`mlx_distill.config.override`.
        notes: A note for each key or value that is spelled in an old way is appended to it.

    Raises:
        ConfigError: no such recipe, an unknown key, a value of the wrong type or out of range.

    >>> load_recipe("tiny", {"distill.epochs": 2, "data.sources.0.count": 50}).data.sources[0].count
    50
    """
    if isinstance(spec, Recipe):
        raw, where, base = to_mapping(spec), f"recipe {spec.name}", spec.base
        renamed: list[str] = []
    else:
        path = _recipe_path(spec)
        where, base = str(path), path.resolve().parent
        raw = read_yaml(path, fix="check the path, or see: mlx-distill recipes list")
        raw, renamed = current_spelling(Recipe, raw, where)
    for one in override_items(overrides):
        raw, again = current_spelling(Recipe, override(raw, one), "--set", replace=True)
        renamed += again
    if notes is not None:
        notes += renamed
    recipe = replace(from_mapping(Recipe, raw, where), base=base)
    if recipe.name in ("", "..") or recipe.name != Path(recipe.name).name:  # it names the run's folder
        raise ConfigError(
            f"{where}: name: {recipe.name!r} cannot be the name of a folder",
            fix="a word or two, without slashes",
        )
    for number, goal in enumerate(recipe.goals):
        if (goal.at_least is None) == (goal.at_most is None):
            raise ConfigError(
                f"{where}: goals[{number}]: {goal.metric} of {goal.model} needs one limit",
                fix="give at_least or at_most, not both",
            )
    if recipe.targets.system and recipe.targets.system_file:
        raise ConfigError(
            f"{where}: targets: system_file: targets.system is set too", fix="keep one of the two"
        )
    recipe.load_task()
    return recipe


def _recipe_path(spec: str | Path) -> Path:
    path = Path(spec)
    if path.is_file():
        return path
    packaged_path = packaged(f"recipes/{spec}.yaml")
    if packaged_path is None:
        known = known_names(str(spec), recipe_names(), "packaged")
        raise ConfigError(f"no recipe {str(spec)!r}", fix=f"{known}; or give the path of a YAML file")
    return packaged_path


def length_options(section: str, steps: int | None) -> str:
    """The options that make a training longer: where ``steps`` is set, ``epochs`` has no effect.

    >>> length_options("teach", 0), length_options("teach", 80)
    ('teach.epochs or teach.steps', 'teach.steps')
    """
    return f"{section}.steps" if steps else f"{section}.epochs or {section}.steps"


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keyed settings of a stage, which keep old spellings, under their current names: for people.

    >>> current_settings({"unpack": True, "token_loss": "cells", "epochs": 1.0})
    {'dequantize': True, 'token_loss': 'token_groups', 'epochs': 1.0}
    """
    return current_spelling(Recipe, current_spelling(DistillConfig, settings)[0])[0]


def recipe_sections() -> list[Section]:
    """Every key of a recipe with its help; the section ``recipe`` has the keys at the top level."""
    return sections(Recipe, "recipe")


def recipe_names() -> list[str]:
    """The names of the packaged recipes."""
    return sorted(p.stem for p in (ASSETS / "recipes").glob("*.yaml"))
