"""The evaluate stage: a model answers the held-out rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mlx_distill.config import to_mapping
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.context import Context, Facts, check_stop, held_out_rows, load_model
from mlx_distill.storage import read_jsonl, scratch, write_jsonl


def evaluate(context: Context, folder: Path, model_folder: str, name: str) -> Facts:
    """Let a model answer the held-out rows, in chunks: a killed evaluation continues behind its last finished
    chunk.
    """
    from mlx_distill.data.predictions import FILE_NAME, write_predictions
    from mlx_distill.infer.label_scoring import label_prefix_tokens
    from mlx_distill.infer.predict import predict
    from mlx_distill.records import Prediction

    settings = context.recipe.evaluate
    rows = held_out_rows(context)
    model, tokenizer = load_model(context, model_folder)
    scored = label_prefix_tokens(
        tokenizer, context.task, lambda reason: context.progress.note(f"evaluate {name}: {reason}")
    )
    reset_peak_memory()
    chunk_size = settings.batch_size * 4
    predictions: list[Prediction] = []
    with context.progress.task(f"evaluate {name}", total=len(rows), unit="row") as bar:
        for first in range(0, len(rows), chunk_size):
            path = scratch(folder) / f"predictions-{first:08d}.jsonl"
            if not path.is_file():
                check_stop(context)
                answers = predict(
                    model,
                    tokenizer,
                    context.task,
                    rows[first : first + chunk_size],
                    batch_size=settings.batch_size,
                    label_probs=scored is not None,
                    on_done=lambda count, first=first: bar.update(first + count),  # type: ignore[misc]
                )
                write_jsonl(path, (asdict(answer) for answer in answers))
            predictions += [Prediction(**row) for _, row in read_jsonl(path)]
            bar.update(len(predictions))
    write_predictions(
        folder / FILE_NAME, name, context.task, rows, predictions, settings=to_mapping(settings)
    )
    return {"rows": len(rows), "peak_memory_bytes": peak_memory()}
