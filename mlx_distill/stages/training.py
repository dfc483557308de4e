"""What the stages that train share: rows into the loop, and the result into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.files import scratch
from mlx_distill.recipe import TrainConfig
from mlx_distill.runtime import rank_and_size
from mlx_distill.stages.context import Context, Facts, read_rows


def fine_tune(context: Context, folder: Path, name: str, model: Any, tokenizer: Any, base: str, settings: TrainConfig) -> Facts:
    """Supervised fine-tuning on the rows' own answers."""
    from mlx_distill.data.batches import collate, encode_rows
    from mlx_distill.data.rows import from_row
    from mlx_distill.data.templates import pad_id
    from mlx_distill.train.objectives import sft

    encoded: dict[str, Any] = {}
    for split in ("train", "valid"):
        rows = read_rows(context, split)
        encoded[split] = []
        if rows:
            where = str(context.run / "data" / f"{split}.jsonl")
            examples = (from_row(row) for row in rows)
            encoded[split], report = encode_rows(examples, tokenizer, settings.max_length, settings.loss_on, where=where)
            if report.too_long or report.nothing_to_train:
                context.progress.note(f"{name}: {split}: {report}")
    pad = pad_id(tokenizer)
    return train_rows(
        context, folder, name, model, tokenizer, base, settings, sft(), encoded["train"], encoded["valid"],
        lambda rows, chosen: collate(rows, chosen, pad),
    )  # fmt: skip


def train_rows(
    context: Context, folder: Path, name: str, model: Any, tokenizer: Any, base: str, settings: TrainConfig, objective: Any,
    rows: Sequence[Any], valid: Sequence[Any], collate: Callable[[Sequence[Any], Sequence[int]], Any],
) -> Facts:  # fmt: skip
    """The loop over prepared rows; leaves an adapter folder, or a whole model where all its weights moved."""
    from mlx_distill.models.adapters import LoraSettings, save_adapter
    from mlx_distill.models.save import save_model
    from mlx_distill.optim import make_optimizer
    from mlx_distill.train.loop import total_steps, train
    from mlx_distill.train.methods import make_trainable
    from mlx_distill.train.rows import RowBatches

    make_trainable(model, settings)
    rank, size = rank_and_size()
    source = RowBatches(
        [len(row.tokens) for row in rows], lambda chosen: collate(rows, chosen), settings.batch_size, settings.seed, rank=rank, size=size
    )
    steps = total_steps(settings, len(source))
    look = [collate(valid, range(i, min(i + settings.batch_size, len(valid)))) for i in range(0, len(valid), settings.batch_size)]
    with context.progress.task(name, total=steps, unit="step") as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update(row["step"], loss=row["loss"], tokens_per_second=round(row["tokens_per_second"]))

        result = train(
            model, source, objective, make_optimizer(settings, steps), settings, folder=scratch(folder), valid=look, hooks=[show],
            stop=context.stop,
        )  # fmt: skip
    shutil.copyfile(scratch(folder) / "metrics.jsonl", folder / "metrics.jsonl")
    if settings.method in ("lora", "dora"):
        lora = LoraSettings(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.target_modules, settings.method)
        save_adapter(model, folder, lora, context.run / base)
    else:
        save_model(model, context.run / base, folder)
    return {
        "steps": result.steps, "rows": len(rows), "tokens": result.tokens, "seconds": result.seconds, "resumed": result.resumed,
        "best_step": result.best_step, "best_loss": result.best_loss, "trainable": trainable_share(model),
        "peak_memory_bytes": result.metrics.get("peak_memory_bytes"),
    }  # fmt: skip


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
        return packed + sum(value.size for name, value in own.items() if name not in ("weight", "scales", "biases"))
    return sum(value.size for value in own.values())
