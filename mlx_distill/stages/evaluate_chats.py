"""The evaluate stage of a recipe without a task: the loss of a model on held-out chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_distill.data.evaluation_files import CHAT_LOSSES
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.context import Context, Facts, check_stop, count_rows
from mlx_distill.stages.encoding import encoded_rows
from mlx_distill.stages.speed import load_and_measure
from mlx_distill.storage import write_jsonl


def evaluate_chats(context: Context, folder: Path, model_folder: str, name: str) -> Facts:
    """Write the negative log-likelihood of each held-out chat: the test rows, else the validation rows, else
    none.
    """
    from mlx_distill.data.batching import collate
    from mlx_distill.data.chat import pad_id
    from mlx_distill.models.forward import embedding_rows
    from mlx_distill.train.batches import make_dataset
    from mlx_distill.train.validation import sequence_losses

    recipe = context.recipe
    split = next((one for one in ("test", "valid") if count_rows(context, one)), "valid")
    model, tokenizer, facts = load_and_measure(context, model_folder)
    model.eval()
    settings = replace(recipe.teach, packing=False, compile=False)
    token_rows = embedding_rows(model)
    title = f"evaluate {name}"
    store = encoded_rows(
        context, folder, title, split, tokenizer, model_folder, settings, token_rows=token_rows
    )
    pad = pad_id(tokenizer, token_rows)

    def collate_rows(rows: Sequence[Any], sequences: Sequence[Sequence[int]], multiple: int) -> Any:
        return collate(rows, sequences, pad, multiple)

    dataset = make_dataset(store, collate_rows, settings)
    count = min(recipe.evaluate.max_rows or len(store), len(store))
    reset_peak_memory()
    lines: list[dict[str, Any]] = []
    with context.progress.task(title, total=count, unit="row") as bar:
        for first in range(0, count, settings.batch_size):
            check_stop(context)
            rows = range(first, min(first + settings.batch_size, count))
            for row, (nats, right, tokens) in zip(
                rows, sequence_losses(model, dataset.batch([(row,) for row in rows])).tolist(), strict=True
            ):
                lines.append({"row": row, "nats": nats, "right": int(right), "tokens": int(tokens)})
            bar.update(len(lines))
    write_jsonl(folder / CHAT_LOSSES, lines)
    return {
        "rows": len(lines),
        "split": split,
        "tokens": sum(line["tokens"] for line in lines),
        "peak_memory_bytes": peak_memory() if lines else None,
        **facts,
    }
