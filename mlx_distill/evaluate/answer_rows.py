"""A model answers the rows of a comparison. Its answers are kept, so that the same comparison is instant and
an interrupted one continues.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_distill.config import to_mapping
from mlx_distill.data.files import ReadOptions, read_path
from mlx_distill.evaluate.comparison_inputs import Side, weights_on_disk
from mlx_distill.progress import Progress
from mlx_distill.storage import digest, fingerprint, finished_lines, read_jsonl
from mlx_distill.storage.line_file import LineFile
from mlx_distill.tasks.task import Task

_FORMAT = 1


def model_side(
    model: str | Path,
    rows: Path,
    task: Task | None,
    *,
    keep: Path,
    constrained: bool,
    batch_size: int,
    progress: Progress,
) -> Side:
    """The side of a model, which answers rows now or has answered them before.

    Args:
        model: Its folder or Hub id.
        rows: The file with the rows.
        task: The task; None for that of the model's training.
        keep: The folder for the answers; their file is named after the model, the rows, the task and the
            settings, so that others are never taken for them.
        constrained: Let the model write only what fits the task's schema.
        batch_size: Rows that are answered together.
        progress: Where progress is shown.

    Raises:
        ModelError: no such model.
        ConfigError: no task is given and the model does not say which it was trained on.
    """
    from mlx_distill.infer.analyze import Analyzer, chunk_size, find_model
    from mlx_distill.infer.analyze_file import model_digest
    from mlx_distill.models.hub import resolve
    from mlx_distill.runtime import peak_memory, reset_peak_memory

    source = find_model(model, task, progress)
    folder = Path(resolve(source.model))  # type: ignore[arg-type]
    settings = {"constrained": constrained, "batch_size": batch_size, "temperature": 0.0}
    digest_of_model = model_digest(folder)
    key = {
        "format": _FORMAT,
        "model": digest_of_model,
        "task": digest(to_mapping(source.task)),
        "settings": settings,
        "input": digest([rows.name, fingerprint(str(rows))]),
    }
    path = keep / f"{folder.name}-{digest(key)[:12]}.jsonl"
    if finished_lines(path, key) is None:
        with LineFile(path, key, chunk_size(batch_size)) as file:
            analyzer = Analyzer(source, constrain=constrained, batch_size=batch_size, progress=progress)
            reset_peak_memory()
            asked = read_path(rows, str(rows), ReadOptions())
            with progress.task(f"answer {folder.name}", unit="row", start=file.kept) as bar:
                remaining = islice(asked, file.kept, None)
                for predictions in analyzer.iter_chunks(
                    remaining, lambda count: bar.update(file.kept + count)
                ):
                    file.append(
                        json.dumps(_plain(prediction), ensure_ascii=False) for prediction in predictions
                    )
            file.finish({"peak_memory_bytes": peak_memory()})
    facts = finished_lines(path, key) or {}
    return Side(
        folder.name,
        str(model),
        "model",
        [row for _, row in read_jsonl(path)],
        source.task,
        str(folder),
        digest_of_model,
        settings,
        size_bytes=weights_on_disk(folder),
        peak_memory_bytes=facts.get("peak_memory_bytes"),
        run=folder.parent if (folder.parent / "data").is_dir() else None,
    )


def _plain(prediction: Any) -> dict[str, Any]:
    """A prediction as a line; half surrogate pairs, which UTF-8 cannot hold, become question marks."""
    values = asdict(prediction)
    values.pop("fields")
    return dict(json.loads(json.dumps(values).encode("utf-8", "replace")))
