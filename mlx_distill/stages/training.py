"""What the training stages (teach and distill) share: from stored rows to a trained model in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import resolve_asset
from mlx_distill.recipe import UNTRAINED, VALIDATION_METRICS, TrainConfig
from mlx_distill.runtime import rank_and_size
from mlx_distill.stages.context import Context, Facts, content_of, read_rows
from mlx_distill.stages.encoding import encoded_rows
from mlx_distill.stages.thinking import check_thinking
from mlx_distill.stages.validation_answers import answer_measure
from mlx_distill.storage import digest, read_jsonl, scratch
from mlx_distill.text import size
from mlx_distill.thinking import thinking_budget, write_thinking

if TYPE_CHECKING:
    from mlx_distill.records import Batch
    from mlx_distill.storage.array_store import Store
    from mlx_distill.train.batches import BatchSource, Collate, RowDataset
    from mlx_distill.train.distributed import Ranks
    from mlx_distill.train.loop import TrainResult
    from mlx_distill.train.objective import Objective
    from mlx_distill.train.validation import Measure

ANSWER_METRICS = [name for name in VALIDATION_METRICS if name != "loss"]


def fine_tune(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    base: str,
    settings: TrainConfig,
    *,
    max_rows: int = 0,
) -> Facts:
    """Supervised fine-tuning on the rows' own answers.

    Args:
        context: Of the run.
        folder: Of the stage; gets the result.
        name: Of the stage, for the user.
        model: The base model.
        tokenizer: Its tokenizer.
        base: The base model's folder in the run.
        settings: Of the training.
        max_rows: So many training rows at most, the first ones; 0: all.
    """
    from mlx_distill.data.batching import collate
    from mlx_distill.data.chat import pad_id
    from mlx_distill.models.forward import embedding_rows
    from mlx_distill.train.objective import sft

    token_rows = embedding_rows(model)
    rows, valid = (
        encoded_rows(
            context, folder, name, split, tokenizer, base, settings, token_rows=token_rows, max_rows=limit
        )
        for split, limit in (("train", max_rows), ("valid", 0))
    )
    pad = pad_id(tokenizer, token_rows)

    def collate_rows(rows: Sequence[Any], sequences: Sequence[Sequence[int]], multiple: int) -> Batch:
        return collate(rows, sequences, pad, multiple)

    return train_rows(
        context, folder, name, model, tokenizer, base, settings, sft(), rows, valid, collate_rows
    )


def train_rows(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    base: str,
    settings: TrainConfig,
    objective: Objective,
    rows: Store[Any],
    valid: Store[Any],
    collate: Collate,
) -> Facts:
    """Train a model on stored rows and save the result: an adapter folder, or a whole model where the model's
    own weights were trained.

    Args:
        context: Of the run.
        folder: Of the stage; gets the result, and in its scratch folder the checkpoints.
        name: Of the stage, for the user.
        model: The base model.
        tokenizer: Its tokenizer.
        base: The base model's folder in the run.
        settings: Of the training.
        objective: The loss.
        rows: The training rows.
        valid: The validation rows; may be empty.
        collate: Makes a batch of rows.
    """
    from mlx_distill.train.batches import make_dataset, total_steps
    from mlx_distill.train.distributed import current_ranks
    from mlx_distill.train.trainable import make_trainable

    make_trainable(model, settings)
    ranks = current_ranks()
    train_set, valid_set = (make_dataset(store, collate, settings) for store in (rows, valid))
    for note in batch_notes(settings, train_set, ranks):
        context.progress.note(f"{name}: {note}")
    source = train_set.train_batches(settings.batch_size, settings.seed, rank=ranks.rank, size=ranks.size)
    steps = total_steps(settings, len(source))
    content = {"train": rows.content, "valid": valid.content, "model": content_of(context.run / base)}
    result = _run_training(
        context,
        folder,
        name,
        model,
        settings,
        objective,
        source,
        valid_set.fixed_batches(settings.batch_size, settings.seed),
        steps,
        digest(content),
        answer_measure(context, name, model, tokenizer, settings),
    )
    if ranks.rank:
        return {}
    _save_result(context, folder, name, model, base, settings)
    write_thinking(folder, thinking_budget(tokenizer))
    return {
        "steps": result.steps,
        "rows": len(rows),
        "tokens": result.tokens,
        "seconds": result.seconds,
        "resumed": result.resumed,
        "best_step": result.best_step,
        "best_loss": result.best_loss,
        **({"best_value": result.best_value} if settings.best_metric != "loss" else {}),
        "steps_wanted": steps,
        "kept_step": result.best_step if settings.use_best and result.best_step else result.steps,
        "trainable": trainable_share(model),
        "peak_memory_bytes": result.metrics.get("peak_memory_bytes"),
    }


def batch_notes(settings: TrainConfig, dataset: RowDataset, ranks: Ranks) -> list[str]:
    """How rows are packed and, on the first of several ranks, how many rows a step has."""
    notes, batch_size = [], settings.batch_size
    if settings.packing:
        capacity = settings.max_length
        full = f"{capacity} tokens, {dataset.plan.fill_ratio(capacity):.1%} full"
        count = len(dataset.plan.rows)
        notes.append(
            f"{len(dataset.store)} rows in {count} sequences of {full}; "
            f"batch_size {batch_size} counts sequences"
        )
    if ranks.size > 1 and ranks.rank == 0:
        unit = "sequences" if settings.packing else "rows"
        size, accumulate = ranks.size, settings.accumulate
        total = f"{batch_size * accumulate * size} {unit} a step"
        notes.append(f"{size} ranks: batch_size {batch_size} x accumulate {accumulate} x {size} = {total}")
    return notes


def _run_training(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    settings: TrainConfig,
    objective: Objective,
    source: BatchSource,
    valid: Sequence[Batch],
    steps: int,
    identity: str,
    measure: Measure | None,
) -> TrainResult:
    """The training loop, with its progress shown, its hooks called and its time measured."""
    from mlx_distill.optim import make_optimizer
    from mlx_distill.train.loop import train

    profile = context.profile
    with context.progress.task(name, total=steps, unit="step", start=_steps_done(folder)) as bar:
        latest: dict[str, float] = {}

        def show(row: dict[str, Any]) -> None:
            latest.update({key: row[f"valid_{key}"] for key in ANSWER_METRICS if f"valid_{key}" in row})
            bar.update(
                row["step"],
                loss=row["loss"],
                **latest,
                tokens_per_second=round(row["tokens_per_second"]),
                memory=size(row["peak_memory_bytes"]),
            )

        def saved(step: int) -> None:
            if context.events is not None:
                context.events({"event": "checkpoint", "command": name, "step": step, "steps": steps})

        hooks = [show, *([profile.add] if profile else []), *context.hooks]
        try:
            return train(
                model,
                source,
                objective,
                make_optimizer(settings, steps),
                settings,
                folder=scratch(folder),
                valid=valid,
                hooks=[_with_stage(name, hook) for hook in hooks],
                stop=context.stop,
                watch=profile.watch if profile else None,
                identity=identity,
                saved=saved,
                measure=measure,
            )
        finally:
            if profile:
                profile.finish()


def _save_result(
    context: Context, folder: Path, name: str, model: Any, base: str, settings: TrainConfig
) -> None:
    """Write metrics and weights to the stage's folder, and show warnings about the loss curve."""
    from mlx_distill.models.adapters import save_adapter
    from mlx_distill.models.load import save_model
    from mlx_distill.models.trained_on import write_trained_on
    from mlx_distill.train.diagnostics import diagnose_curve
    from mlx_distill.train.trainable import adapter_settings

    metrics = folder / "metrics.jsonl"
    shutil.copyfile(scratch(folder) / "metrics.jsonl", metrics)
    for warning in diagnose_curve((row for _, row in read_jsonl(metrics)), use_best=settings.use_best):
        context.progress.note(f"{name}: {warning}")
    adapter = adapter_settings(settings)
    if adapter is not None:
        save_adapter(model, folder, adapter, context.run / base)
    else:
        save_model(model, context.run / base, folder)
    write_trained_on(folder, context.task, read_rows(context, "train"))


def _steps_done(folder: Path) -> int:
    """The step of the checkpoint from which a training in this folder is resumed; 0 for a new one."""
    from mlx_distill.train.checkpoint import latest, read_state

    path = latest(scratch(folder) / "checkpoints")
    return int(read_state(path)["step"]) if path else 0


def _with_stage(stage: str, hook: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The hook, called with the stage's name in each row."""
    return lambda row: hook({"stage": stage, **row})


def check_training(context: Context, commands: Collection[str]) -> None:
    """Refuse settings with which a training among ``commands`` cannot work, as far as that can be seen
    without loading weights.

    The settings are compared with the shapes of a base model that is on this machine; one that has to be
    downloaded is checked when it is there.

    Raises:
        ConfigError, ModelError: settings that contradict each other, an unknown target module, a rank above a
            dimension; thinking that a model has no marks for; a label that a tokenizer cannot write, where
            ``distill.label_weight`` needs it.
    """
    from mlx_distill.train.preflight import check_model, check_settings

    recipe = context.recipe
    for command, settings, base, source in (
        ("teach", recipe.teach, "teacher_base", recipe.teacher),
        ("distill", recipe.distill, "student_base", recipe.student),
    ):
        if command not in commands or source is None or settings.method == UNTRAINED:
            continue
        check_settings(settings, rank_and_size()[1])
        local = _local_model(context, base, source, "config.json")
        if local is not None:
            check_model(local, settings, dequantize=recipe.dequantize)
    if "distill" in commands and recipe.student is not None and recipe.distill.label_weight > 0:
        _check_labels(context)
    if recipe.teacher_thinking:
        check_thinking(recipe, dict(_local_tokenizers(context)))


def _local_tokenizers(context: Context) -> Iterator[tuple[str, Any]]:
    """The tokenizers of teacher and student that are on this machine."""
    from mlx_distill.models.load import load_tokenizer

    recipe = context.recipe
    for name, source in (("teacher", recipe.teacher), ("student", recipe.student)):
        local = source and _local_model(context, f"{name}_base", source, "tokenizer.json")
        if local:
            yield name, load_tokenizer(local)


def _check_labels(context: Context) -> None:
    """Refuse a label loss that a tokenizer cannot have, before hours are spent on the teacher."""
    from mlx_distill.infer.label_scoring import find_label_trie

    for _, tokenizer in _local_tokenizers(context):
        find_label_trie(tokenizer, context.task, context.recipe.distill.label_weight)


def _local_model(context: Context, base: str, source: str, file: str) -> Path | None:
    """The folder of a base model, or of the checkpoint that it is made of, if it is on this machine."""
    folders = [context.run / base, Path(resolve_asset(source, context.recipe.base))]
    return next((folder for folder in folders if (folder / file).is_file()), None)


def trainable_share(model: Any) -> dict[str, float]:
    """The number of trained parameters, of all parameters, and the ratio of the two."""
    from mlx.utils import tree_flatten

    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
    total = sum(_count(module) for _, module in model.named_modules())
    return {"trained": trained, "all": total, "share": trained / total}


def _count(module: Any) -> int:
    """The number of a module's own parameters; a quantized weight counts as the plain one."""
    import mlx.core as mx

    own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
    if "scales" in own and hasattr(module, "bits"):
        weight = own["weight"].size * 32 // module.bits
        others = (array for name, array in own.items() if name not in ("weight", "scales", "biases"))
        return weight + sum(array.size for array in others)
    return sum(array.size for array in own.values())
