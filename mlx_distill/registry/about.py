"""What is known of a model when it is added: where it comes from, its data, its figures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_distill.config import asset_name
from mlx_distill.data.evaluation_files import CHAT_LOSSES
from mlx_distill.data.predictions import FILE_NAME
from mlx_distill.errors import DistillError
from mlx_distill.evaluate.comparison_inputs import EVALUATIONS
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.registry.contents import Contents
from mlx_distill.registry.figures import UNITS, make_figure
from mlx_distill.report.summary import read_report
from mlx_distill.run_models import run_model
from mlx_distill.storage import Manifest, read_manifest


def describe(contents: Contents, run: Path | None) -> dict[str, Any]:
    """The facts of a version, as they are kept with it.

    Args:
        contents: The model.
        run: The folder of its run; None of a model of no run.
    """
    folder = contents.folder
    parents = _ancestors(folder, contents.base)
    own = parents.get(folder.name)
    trained_on = read_trained_on(folder)
    data = parents.get("data")
    sizes = [entry["size"] for entry in contents.files.values()]
    return {
        "format": 2,
        "folder": folder.name,
        "base": contents.base.name if contents.base else None,
        "content": contents.content,
        "base_model": _base_model(parents),
        "recipe": own.recorded.get("recipe") if own else None,
        "task": trained_on.task.name if trained_on and trained_on.task else None,
        "rows": dict(data.recorded["rows"]) if data and "rows" in data.recorded else None,
        "trained": own.recorded.get("finished") if own else None,
        "metrics": _figures(folder, run, own),
        "versions": dict(own.recorded.get("versions") or {}) if own else {},
        "machine": dict(own.recorded.get("machine") or {}) if own else {},
        "lineage": [_step(name, manifest) for name, manifest in parents.items()],
        "bytes": sum(sizes),
        "files": {name: dict(entry) for name, entry in contents.files.items()},
    }


def _ancestors(folder: Path, base: Path | None) -> dict[str, Manifest]:
    """Manifests of a model, its base and what they were made from, nearest first, as far as they are still in
    the run with the same content.
    """
    found: dict[str, Manifest] = {}
    queue: list[tuple[Path, str | None]] = [(folder, None)]
    if base is not None:
        queue.append((base, None))
    for path, content in queue:
        manifest = read_manifest(path)
        if manifest is None or path.name in found or content not in (None, manifest.content):
            continue
        found[path.name] = manifest
        queue += [(path.parent / name, parent) for name, parent in manifest.parents.items()]
    return found


def _step(name: str, manifest: Manifest) -> dict[str, Any]:
    """One line of a version's lineage."""
    return {
        "folder": name,
        "stage": manifest.stage,
        "key": manifest.key,
        "content": manifest.content,
        "source": _source(manifest),
        "commit": manifest.recorded.get("commit"),
        "finished": manifest.recorded.get("finished"),
        "parents": dict(manifest.parents),
    }


def _source(manifest: Manifest) -> str | None:
    """What a stage was converted from, if it was."""
    source = manifest.recorded.get("source")
    return asset_name(str(source)) if source else None


def _base_model(parents: Mapping[str, Manifest]) -> str | None:
    """The checkpoint that the training began from: that of the student, else of the teacher."""
    for name in ("student_base", "teacher_base", *parents):
        source = _source(parents[name]) if name in parents else None
        if source:
            return source
    return None


def evaluation_of(run: Path, folder: str, content: str | None, file_name: str = FILE_NAME) -> Path | None:
    """The evaluation of a run's model, where its answers are those of this content; None where there is none,
    or where the model was made again since.

    Args:
        run: The run's folder.
        folder: The model's folder in it.
        content: The hash of the model's content.
        file_name: What the evaluation has written: answers, or the losses of chats without a task.
    """
    for file in sorted((run / EVALUATIONS).glob(f"*/{file_name}")):
        evaluation = file.parent
        manifest = read_manifest(evaluation)
        if manifest is None or content is None or run_model(evaluation.name).folder != folder:
            continue
        if manifest.parents.get(folder) == content:
            return evaluation
    return None


def report_of(run: Path, folder: str) -> Mapping[str, Any] | None:
    """The report of a run, where it is of the model that lies in one of its folders now."""
    with suppress(DistillError, KeyError, TypeError, AttributeError):
        report, manifest = read_report(run).report, read_manifest(run / folder)
        keys = {stage["folder"]: stage["key"] for stage in report["provenance"]["stages"]}
        return report if manifest is not None and keys.get(folder) == manifest.key else None
    return None


def _figures(folder: Path, run: Path | None, own: Manifest | None) -> dict[str, Any]:
    """The figures of the run's report, where it is of this model."""
    if run is None or own is None:
        return {}
    found = (evaluation_of(run, folder.name, own.content, name) for name in (FILE_NAME, CHAT_LOSSES))
    evaluation, report = next(filter(None, found), None), report_of(run, folder.name)
    if evaluation is None or report is None:
        return {}
    figures = report["metrics"].get(evaluation.name) or {}
    pairs = ((name, figures.get(f"{name}_interval", figures.get(name))) for name in UNITS)
    made = {name: make_figure(name, value) for name, value in pairs if value is not None}
    return {name: figure for name, figure in made.items() if figure["value"] is not None}
