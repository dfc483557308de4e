"""The evaluate stage: held-out rows through one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mlx_distill.config import to_mapping
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.context import Context as Context
from mlx_distill.stages.context import Facts, held_out_rows, load_model, stop_here
from mlx_distill.stages.training import check_training as check_training
from mlx_distill.storage import read_jsonl, scratch, write_jsonl


def evaluate(context: Context, folder: Path, model_folder: str, name: str) -> Facts:
    """Held-out rows through one model, a chunk at a time, so that a killed evaluation goes on behind its last
    whole chunk.
    """
    from mlx_distill.data.predictions import write_predictions
    from mlx_distill.infer.analyze import predict
    from mlx_distill.records import Prediction

    settings = context.recipe.evaluate
    rows = held_out_rows(context)
    model, tokenizer = load_model(context, model_folder)
    reset_peak_memory()
    chunk = settings.batch_size * 4
    found: list[Prediction] = []
    with context.progress.task(f"evaluate {name}", total=len(rows), unit="row") as bar:
        for first in range(0, len(rows), chunk):
            path = scratch(folder) / f"predictions-{first:08d}.jsonl"
            if not path.is_file():
                stop_here(context)
                some = rows[first : first + chunk]
                tell = _from(bar.update, first)
                done = predict(
                    model, tokenizer, context.task, some, batch_size=settings.batch_size, on_done=tell
                )
                write_jsonl(path, (asdict(prediction) for prediction in done))
            found += [Prediction(**row) for _, row in read_jsonl(path)]
            bar.update(len(found))
    write_predictions(
        folder / "predictions.jsonl", name, context.task, rows, found, settings=to_mapping(settings)
    )
    return {"rows": len(rows), "peak_memory_bytes": peak_memory()}


def _from(update: Callable[[int], None], first: int) -> Callable[[int], None]:
    return lambda count: update(first + count)
