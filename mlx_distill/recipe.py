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
    to_mapping,
)
from mlx_distill.config_sections import Section, sections
from mlx_distill.errors import ConfigError
from mlx_distill.tasks.task import Task, load_task
from mlx_distill.text import known_names

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
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
METHODS = ["lora", "dora", "galore", "apollo", "apollo-mini", "full"]
PROJECTIONS = ["std", "reverse_std", "left", "right", "full"]
MOMENTS = ["keep", "reset", "project"]
TEXTS = ["greedy", "data"]
REFINEMENTS = ["none", "calibrate", "distill"]
TOKEN_LOSSES = ["auto", "kl", "token_groups", "alm", "none"]


@dataclass(frozen=True)
class ValueConfig:
    """What is done with the values of one field of the answer, in this order."""

    field: str | None = option(None, "its name in the rows, where that is another one")
    split: str | None = option(None, "split a text at each of these into a list, such as ','")
    wrap: bool = option(False, "make a list of one item of a value that is no list")
    map: Mapping[str, Any] | None = option(None, "value in the rows: value in the answer, also within lists")
    others: str = option("error", "values that the map does not have", choices=["error", "keep"])
    scale: float | None = option(None, "multiply numbers by this; a number that is written as text is read")
    round: bool = option(False, "round to whole numbers, halves away from zero")
    default: Any = option(None, "the value in the answer where a row has none")
    drop: bool = option(False, "leave the field out of the answer")


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows: files, a SQLite query, a Hub data set or a packaged generator."""

    path: str | None = option(
        None,
        "a file, or a folder of files: JSONL, JSON, CSV, TSV, Parquet, Arrow, compressed or not, or what "
        "save_to_disk wrote (asset:NAME for a packaged one)",
    )
    sqlite: str | None = option(None, "a SQLite database, with query", default_keyed=False)
    query: str | None = option(None, "the SELECT that gives the rows of sqlite", default_keyed=False)
    hub: str | None = option(None, "a data set of the Hugging Face Hub: org/name, or org/name:configuration")
    generator: str | None = option(None, "a packaged generator of rows")
    revision: str | None = option(None, "commit of the Hub data set")
    hub_split: str = option("train", "split of the Hub data set, or of a folder that has several")
    count: int = option(
        0,
        "rows to take: of a generator (0: its own default), or the first of a file or data set (0: all)",
        low=0,
    )
    seed: int = option(0, "seed of the generator", low=0)
    noise: float = option(
        0.0, "share of the generator's labels that are replaced by random ones", low=0.0, high=1.0
    )
    part: str | None = option(None, "part of the generator's templates: train or test")
    format: str = option(
        "auto", "format of the rows", choices=["auto", "messages", "sharegpt", "alpaca", "openai", "plain"]
    )
    columns: Mapping[str, str] = option({}, "field of the task: column of the file")
    values: Mapping[str, ValueConfig] = option(
        {}, "field of the answer: how its values become those of the task's schema", default_keyed=False
    )
    answer_after: str | None = option(
        None,
        "a marker within the prompts, such as '### Classification:', behind which the answer stands: the "
        "prompt ends before it, and what is behind it is the answer of a row that has no other",
        default_keyed=False,
    )
    where: Mapping[str, Any] = option({}, "keep only rows whose fields have these values")
    split: str | None = option(
        None, "put every row of this source in this split", choices=["train", "valid", "test"]
    )
    set: str | None = option(None, "name under which results on its test rows are reported; default: 'test'")


@dataclass(frozen=True)
class DataConfig:
    """Prepare: rows to validated chats, filtered, deduplicated and split."""

    sources: list[SourceConfig] = option([], "where the rows come from")
    valid_fraction: float = option(
        0.05, "share of the rows without a split of their own that becomes validation rows", low=0.0, high=0.5
    )
    test_fraction: float = option(
        0.1, "share of the rows without a split of their own that becomes test rows", low=0.0, high=0.9
    )
    stratify: list[str] = option([], "fields to stratify the splits by, besides the label")
    min_chars: int = option(1, "drop rows with fewer characters of text", low=0)
    max_chars: int = option(100_000, "drop rows with more characters of text", low=1)
    min_prompt_chars: int = option(
        0,
        "drop rows with fewer characters before the answer, the system prompt included",
        low=0,
        default_keyed=False,
    )
    min_answer_chars: int = option(
        0, "drop rows with fewer characters of the answer, as JSON", low=0, default_keyed=False
    )
    min_share: Mapping[str, float] = option(
        {},
        "field: the smallest share of the training rows that each of its values may have; less is an error",
        default_keyed=False,
    )
    min_rating: float | None = option(None, "drop rows with a lower rating")
    rating_field: str = option("rating", "the field that holds the rating")
    domains: list[str] = option([], "keep only rows of these domains; empty keeps all")
    domain_field: str = option("domain", "the field that holds the domain")
    near_duplicates: float = option(
        0.85,
        "rows with this Jaccard similarity of word shingles or more are duplicates; 0 turns it off",
        low=0.0,
        high=1.0,
    )
    split_field: str = option("split", "the field that holds a row's own split")
    drop_invalid: bool = option(False, "drop and count rows that do not fit the task, instead of failing")
    seed: int = option(0, "seed of the split", low=0)


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
class TrainConfig:
    """The settings that every training has."""

    method: str = option("lora", "training method", choices=METHODS)
    lora_rank: int = option(16, "rank of the adapters", low=1)
    lora_alpha: float = option(32.0, "adapters are scaled by alpha / rank", low=0.0)
    use_rslora: bool = option(False, "adapters are scaled by alpha / sqrt(rank) instead")
    lora_dropout: float = option(0.1, "dropout on the adapters' input", low=0.0, high=0.99)
    target_modules: list[str] = option(
        ATTENTION + MLP, "linear layers that get an adapter, or whose gradients are projected"
    )
    modules_to_save: list[str] = option(
        [],
        "modules that are trained fully besides, such as embed_tokens, norm, lm_head; "
        "AdamW needs 8 bytes of state for each of their weights",
    )
    galore_rank: int = option(512, "rank of the gradient projection", low=1)
    galore_update_gap: int = option(400, "steps between updates of the projection", low=1)
    galore_scale: float = option(0.25, "factor on the update of projected weights", low=0.0)
    galore_projection: str = option(
        "std", "side of a weight matrix that is projected; std: the shorter one", choices=PROJECTIONS
    )
    galore_moments: str = option(
        "project",
        "Adam's moments when the projection changes: kept, reset, or projected into the new subspace",
        choices=MOMENTS,
    )
    galore_stagger: bool = option(True, "update the projections of different matrices at different steps")
    galore_refresh_below: float = option(
        0.0,
        "skip an update while the projection captures this share of what it captured when new; 0 never skips",
        low=0.0,
        high=1.0,
    )
    apollo_rank: int = option(256, "rank of the random projection; apollo-mini always has rank 1", low=1)
    apollo_update_gap: int = option(200, "steps between new random projections", low=1)
    apollo_scale: float | None = option(
        None, "factor on the update; none: 1, and sqrt(128) for apollo-mini", low=0.0
    )
    learning_rate: float = option(2e-5, "peak learning rate", low=0.0)
    schedule: str = option(
        "cosine",
        "learning rate schedule after the warmup",
        choices=["cosine", "linear", "constant", "wsd"],
    )
    warmup: float = option(
        0.03, "share of the steps in which the learning rate rises linearly", low=0.0, high=1.0
    )
    weight_decay: float = option(0.0, "decoupled weight decay", low=0.0)
    clip_norm: float = option(1.0, "maximum global gradient norm; 0 turns clipping off", low=0.0)
    batch_size: int = option(
        1,
        "rows in a micro-batch of each rank, on average: micro-batches are balanced by their trained tokens",
        low=1,
    )
    accumulate: int = option(
        8, "gradient accumulation: micro-batches of each rank for an optimizer step", low=1
    )
    epochs: float = option(1.0, "passes over the training rows; steps overrides it", low=0.0)
    steps: int = option(0, "optimizer steps; 0: as epochs says", low=0)
    max_length: int = option(
        512, "maximum length of a row in tokens; longer rows are reported and left out", low=8
    )
    packing: bool = option(
        False,
        "pack several rows into sequences of at most max_length tokens, without attention between rows; "
        "batch_size then counts sequences",
    )
    loss_on: str = option("last", "assistant turns that the loss is computed on", choices=["last", "all"])
    grad_checkpoint: bool = option(
        False,
        "gradient checkpointing: recompute activations in the backward pass to save memory",
        keyed=False,
    )
    compile: bool = option(False, "compile the layers with mx.compile; traced once for each shape of batch")
    seed: int = option(0, "seed of the order of rows, of initialization and of dropout", low=0)
    stream_gradients: bool = option(
        False,
        "do not hold all gradients in memory at once; needs accumulate: 1, and with "
        "clip_norm gradients are computed twice",
        keyed=False,
    )
    checkpoint_every: int = option(50, "steps between checkpoints", low=1, keyed=False)
    keep_checkpoints: int = option(2, "checkpoints that are kept, besides the best one", low=1, keyed=False)
    evaluate_every: int = option(50, "steps between validations; 0: no validation", low=0)
    patience: int = option(
        0, "early stopping: validations without a lower loss after which the training ends; 0: never", low=0
    )
    use_best: bool = option(
        False, "keep the weights with the lowest validation loss, instead of the last ones"
    )


@dataclass(frozen=True)
class TeachConfig(TrainConfig):
    """Teach: fine-tune the teacher on the labelled rows."""


@dataclass(frozen=True)
class TargetsConfig:
    """Targets: the teacher's answers and distributions on the training rows."""

    text: str = option(
        "greedy",
        "the text that the student learns: the teacher's greedy answer, or the row's own answer (data)",
        choices=TEXTS,
    )
    top_k: int = option(32, "most probable tokens kept of each distribution", low=1, high=1024)
    min_valid: float = option(
        0.5,
        "quality gate: the least share of the teacher's greedy answers that fit the task; below it the run "
        "stops with exit code 3, unless --force is given; 0 turns it off",
        low=0.0,
        high=1.0,
        keyed=False,
    )
    batch_size: int = option(16, "rows at a time", low=1, keyed=False)
    max_rows: int = option(0, "training rows that the teacher answers; 0: all", low=0)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distill: the student learns the teacher's label distribution, text and token distributions."""

    learning_rate: float = option(1e-5, "peak learning rate", low=0.0)
    target_modules: list[str] = option(ATTENTION, "linear layers that get an adapter")
    loss_on: str = option(
        "last",
        "assistant turns that the loss is computed on: the teacher answers the last one",
        choices=["last"],
    )
    label_weight: float = option(
        0.7, "alpha: weight of the KL divergence of the label's distribution", low=0.0
    )
    label_temperature: float = option(
        4.0, "temperature of that divergence, which is multiplied by T squared", low=0.01
    )
    text_weight: float = option(0.3, "weight of the cross-entropy on the teacher's text", low=0.0)
    token_weight: float = option(0.3, "weight of the token-level loss", low=0.0)
    token_loss: str = option(
        "auto",
        "the token-level loss; auto: KL where the vocabularies are equal, else token_groups",
        choices=TOKEN_LOSSES,
        old_values={"cells": "token_groups"},
    )
    temperature: float = option(1.0, "temperature of the token-level loss", low=0.01)


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

    models: list[str] = option(["teacher", "student_before", "student", "quantized"], "models to evaluate")
    batch_size: int = option(16, "rows at a time", low=1)
    max_rows: int = option(0, "held-out rows of each set; 0: all", low=0)
    constrain: bool = option(
        True,
        "measure the answers under the grammar of the task too; only those that differ are generated again",
    )
    confidence: float = option(0.95, "confidence level of the intervals", low=0.5, high=0.999, keyed=False)


@dataclass(frozen=True)
class ControlsConfig:
    """Controls: students trained for as many steps without a part of the distillation, to show its effect."""

    labels: bool = option(False, "a student trained on the rows' own answers")
    text: bool = option(False, "a student trained on the teacher's text, without its distributions")


@dataclass(frozen=True)
class Recipe:
    """The settings of a run."""

    name: str = option(help="name of the run, in reports and as the default folder under runs/")
    task: str | Mapping[str, Any] = option(
        help="a packaged task, a YAML file, or a mapping with name and overrides"
    )
    teacher: str = option(help="a Hub id, a folder, or asset:NAME")
    student: str = option(help="a Hub id, a folder, or asset:NAME")
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
    base: Path | None = field(
        default=None,
        metadata={"keyed": False, "settable": False, "help": "folder that paths are relative to"},
    )

    def dequantizes(self, folder: str) -> bool:
        """Whether the model in this folder of the run computes with dequantized weights. The quantized model
        never does, since its quantized weights are what is measured.
        """
        return self.dequantize and folder != "quantized"

    def load_task(self) -> Task:
        """Load the task that the recipe names."""
        return load_task(self.task, self.base)


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
        raw.pop("base")
        renamed: list[str] = []
    else:
        path = _recipe_path(spec)
        where, base = str(path), path.resolve().parent
        raw, renamed = current_spelling(Recipe, read_yaml(path), where)
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
