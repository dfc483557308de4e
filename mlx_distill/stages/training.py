"""What the stages that train share: rows into the loop, and the result into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import resolve_asset
from mlx_distill.recipe import TrainConfig
from mlx_distill.runtime import rank_and_size
from mlx_distill.stages.context import Context, Facts, content_of
from mlx_distill.stages.encoding import encoded_rows
from mlx_distill.storage import digest, read_jsonl, scratch
from mlx_distill.text import size

if TYPE_CHECKING:
    from mlx_distill.storage.array_store import Store

# Rows, the numbers of those in each line of a batch, and what the width is rounded up to.
Collate = Callable[[Sequence[Any], Sequence[Sequence[int]], int], Any]


def fine_tune(
    context: Context, folder: Path, name: str, model: Any, tokenizer: Any, base: str, settings: TrainConfig
) -> Facts:
    """Supervised fine-tuning on the rows' own answers."""
    from mlx_distill.data.batching import collate
    from mlx_distill.data.chat import pad_id
    from mlx_distill.train.objective import sft

    rows, valid = (
        encoded_rows(context, folder, name, split, tokenizer, base, settings) for split in ("train", "valid")
    )
    pad = pad_id(tokenizer)
    return train_rows(
        context,
        folder,
        name,
        model,
        tokenizer,
        base,
        settings,
        sft(),
        rows,
        valid,
        lambda pieces, chosen, multiple: collate(pieces, chosen, pad, multiple),
    )


def train_rows(
    context: Context,
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    base: str,
    settings: TrainConfig,
    objective: Any,
    rows: Store[Any],
    valid: Store[Any],
    collate: Collate,
) -> Facts:
    """The loop over stored rows; leaves an adapter folder, or a whole model where all its weights moved."""
    from mlx_distill.models.adapters import save_adapter
    from mlx_distill.models.load import save_model
    from mlx_distill.optim import make_optimizer
    from mlx_distill.train.diagnostics import diagnose_curve
    from mlx_distill.train.loop import total_steps, train
    from mlx_distill.train.trainable import adapter_of, make_trainable

    make_trainable(model, settings)
    source, look = _batches(context, name, settings, rows, valid, collate)
    steps = total_steps(settings, len(source))
    identity = digest(
        {"train": rows.content, "valid": valid.content, "model": content_of(context.run / base)}
    )
    profile = context.profile
    with context.progress.task(name, total=steps, unit="step", start=_steps_done(folder)) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update(
                row["step"],
                loss=row["loss"],
                tokens_per_second=round(row["tokens_per_second"]),
                memory=size(row["peak_memory_bytes"]),
            )

        watchers = [show, *([profile.add] if profile else []), *context.hooks]
        try:
            result = train(
                model,
                source,
                objective,
                make_optimizer(settings, steps),
                settings,
                folder=scratch(folder),
                valid=look,
                hooks=[_named(name, hook) for hook in watchers],
                stop=context.stop,
                watch=profile.watch if profile else None,
                identity=identity,
            )
        finally:
            if profile:
                profile.finish()
    if rank_and_size()[0]:
        return {}
    shutil.copyfile(scratch(folder) / "metrics.jsonl", folder / "metrics.jsonl")
    for doubt in diagnose_curve(
        (row for _, row in read_jsonl(folder / "metrics.jsonl")), use_best=settings.use_best
    ):
        context.progress.note(f"{name}: {doubt}")
    adapter = adapter_of(settings)
    if adapter is not None:
        save_adapter(model, folder, adapter, context.run / base)
    else:
        save_model(model, context.run / base, folder)
    return {
        "steps": result.steps,
        "rows": len(rows),
        "tokens": result.tokens,
        "seconds": result.seconds,
        "resumed": result.resumed,
        "best_step": result.best_step,
        "best_loss": result.best_loss,
        "steps_wanted": steps,
        "kept_step": result.best_step if settings.use_best and result.best_step else result.steps,
        "trainable": trainable_share(model),
        "peak_memory_bytes": result.metrics.get("peak_memory_bytes"),
    }


def _steps_done(folder: Path) -> int:
    """The step that an interrupted training of this folder goes on from; 0 for a fresh start."""
    from mlx_distill.train.checkpoint import latest, read_state

    path = latest(scratch(folder) / "checkpoints")
    return int(read_state(path)["step"]) if path else 0


def _named(stage: str, hook: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda row: hook({"stage": stage, **row})


def check_training(context: Context, commands: Collection[str]) -> None:
    """Refuse what the trainings among ``commands`` could not be done with, as far as it shows without loading
    a weight.

    A base that is on this machine is asked for its shapes; one that has to be downloaded first is asked when
    it is here.

    Raises:
        ConfigError, ModelError: settings that contradict each other, an unknown target, a rank above a
            dimension.
    """
    from mlx_distill.train.preflight import check_model, check_settings

    recipe = context.recipe
    for command, settings, base, source in (
        ("teach", recipe.teach, "teacher_base", recipe.teacher),
        ("distill", recipe.distill, "student_base", recipe.student),
    ):
        if command not in commands:
            continue
        check_settings(settings, rank_and_size()[1])
        folders = [context.run / base, Path(resolve_asset(source, recipe.base))]
        here = next((folder for folder in folders if (folder / "config.json").is_file()), None)
        if here is not None:
            check_model(here, settings, dequantize=recipe.dequantize)


def _batches(
    context: Context, name: str, settings: TrainConfig, rows: Store[Any], valid: Store[Any], collate: Collate
) -> tuple[Any, Sequence[Any]]:
    """The stream of training batches and the fixed list of validation batches: each row in a line of its own,
    or packed.
    """
    from mlx_distill.data.batching import BatchList, plan_epoch
    from mlx_distill.data.packing import plan_sequences
    from mlx_distill.train.batches import RowBatches

    lines, look = (
        plan_sequences(
            some.lengths.tolist(),
            settings.max_length,
            settings.seed,
            settings.packing,
            few_widths=settings.compile,
        )
        for some in (rows, valid)
    )
    batch_size = settings.batch_size
    if settings.packing:
        full = f"{settings.max_length} tokens, {lines.fill_ratio(settings.max_length):.1%} full"
        context.progress.note(
            f"{name}: {len(rows)} rows in {len(lines.rows)} lines of {full}; batch_size {batch_size} counts lines"
        )
    rank, ranks = rank_and_size()
    if ranks > 1 and rank == 0:
        some = f"{batch_size * settings.accumulate * ranks} {'lines' if settings.packing else 'rows'} a step"
        context.progress.note(
            f"{name}: {ranks} ranks: batch_size {batch_size} x accumulate {settings.accumulate} x {ranks} = {some}"
        )
    weights, looked = (of.sum_rows(some.counted.tolist()) for of, some in ((lines, rows), (look, valid)))
    source = RowBatches(
        lines.lengths,
        lambda chosen: collate(rows, lines.rows_of(chosen), lines.multiple),
        batch_size,
        settings.seed,
        weights=weights,
        identity=rows.content,
        rank=rank,
        size=ranks,
    )
    fixed = [
        look.rows_of(chosen) for chosen in plan_epoch(look.lengths, batch_size, settings.seed, 0, looked)
    ]
    return source, BatchList(fixed, lambda chosen: collate(valid, chosen, look.multiple))


def trainable_share(model: Any) -> dict[str, float]:
    """Trained parameters, all parameters, and the share of them."""
    from mlx.utils import tree_flatten

    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
    total = sum(_count(module) for _, module in model.named_modules())
    return {"trained": trained, "all": total, "share": trained / total}


def _count(module: Any) -> int:
    """Weights of one module itself; packed ones count as what they stand for."""
    import mlx.core as mx

    own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
    if "scales" in own and hasattr(module, "bits"):
        packed = own["weight"].size * 32 // module.bits
        return packed + sum(
            value.size for name, value in own.items() if name not in ("weight", "scales", "biases")
        )
    return sum(value.size for value in own.values())
