"""Export of a model with its model card, and the check that the export gives the trained model's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset
from mlx_distill.data.files import ReadOptions, read_path
from mlx_distill.errors import ConfigError, DataError, FileError
from mlx_distill.evaluate.artifact import (
    DEFAULT_ROWS,
    FILE_NAME,
    add_check,
    check_artifact,
    read_checks,
    require_same_answers,
    write_check,
)
from mlx_distill.infer.analyze import find_model
from mlx_distill.models.export import ExportReport, to_hf
from mlx_distill.models.peft import AdapterReport, to_peft
from mlx_distill.models.trained_on import is_run, newest_model
from mlx_distill.progress import Progress, make_progress
from mlx_distill.report.model_card import card_text, with_check
from mlx_distill.report.summary import read_report, write_report
from mlx_distill.storage import read_manifest, record_files, write_text
from mlx_distill.tasks.task import Task


@dataclass(frozen=True)
class _Asked:
    """What an exported model is asked: the rows with their places, and their task."""

    rows: list[tuple[str, Any]]
    task: Task


def export(
    model: str | Path,
    destination: str | Path,
    to: str = "hf",
    *,
    adapter: str = "merge",
    report: str | Path | None = None,
    check: int | None = None,
    rows: str | Path | None = None,
    task: str | Path | Task | None = None,
    progress: Progress | None = None,
) -> ExportReport | AdapterReport:
    """Write a model in the layout of Hugging Face or PEFT, with a model card, and check that the exported
    model gives the answers of the trained one.

    The check (:func:`~mlx_distill.evaluate.artifact.check_artifact`) is the result's ``artifact``,
    ``artifact.json`` in the exported folder and in the run's, and a sentence of the model card.

    Args:
        model: The folder of an MLX model or adapter, or of a run: its last trained model.
        destination: The folder to write.
        to: ``hf`` for a whole checkpoint, ``peft`` for an adapter.
        adapter: With ``hf``: ``merge`` the adapter into the weights, or ``keep`` it for PEFT beside the
            unchanged base.
        report: The run, or its ``report.json``, with figures for the card; by default the run that holds the
            model, where it has a report.
        check: Answer so many rows with each model of the chain; 0 checks nothing, and None means 50 where
            rows and task are known.
        rows: The file of these rows; by default the held-out rows of the run that holds the model.
        task: Their task; by default that of the training.
        progress: Where progress is shown; on standard error by default.

    Raises:
        ConfigError: ``to`` is none of the two, or the rows or the task of a check are not known.
        ModelError: not a model or an adapter, or one that the layout has no place for.
        FileError: a failed write, or a destination that holds something else.
        QualityGateError: the export is written and does not give the answers of the trained model; the error
            names the step at which they part.
    """
    written = write_export(
        model,
        destination,
        to,
        adapter=adapter,
        report=report,
        check=check,
        rows=rows,
        task=task,
        progress=progress,
    )
    require_same_answers(written.artifact)
    return written


def write_export(
    model: str | Path,
    destination: str | Path,
    to: str = "hf",
    *,
    adapter: str = "merge",
    report: str | Path | None = None,
    check: int | None = None,
    rows: str | Path | None = None,
    task: str | Path | Task | None = None,
    progress: Progress | None = None,
) -> ExportReport | AdapterReport:
    """:func:`export` that also returns where the check failed: see ``artifact["passed"]`` of the result."""
    if to not in ("hf", "peft"):
        raise ConfigError(f"to: {to!r} is not one of hf, peft", fix="choose one of them")
    progress = progress or make_progress()
    if is_run(model):
        model = newest_model(model, progress.note)
    asked = _asked(model, check, rows, task, progress)
    figures = read_report(report).report if report else _run_figures(Path(model).resolve(), progress)
    card = partial(card_text, report=figures)
    written: ExportReport | AdapterReport
    if to == "peft":
        written = to_peft(model, destination, card=partial(card, library="peft"))
    else:
        written = to_hf(model, destination, adapter=adapter, card=card, progress=progress)
    if isinstance(asked, str):
        if asked:
            progress.note(f"the export is not checked: {asked}")
        return written
    try:
        result = check_artifact(
            model, destination, asked.rows, asked.task, to=to, adapter=adapter, progress=progress
        )
    except DataError as error:
        if check is not None or rows is not None:  # somebody asked for it
            raise
        progress.note(f"the export is not checked: {error.message}")
        return written
    _keep(Path(destination), Path(model).resolve().parent, result, progress)
    return replace(written, artifact=result)


def _asked(
    model: str | Path,
    check: int | None,
    rows: str | Path | None,
    task: str | Path | Task | None,
    progress: Progress,
) -> _Asked | str:
    """The rows and the task of a check, found before anything is written; else why nothing is checked."""
    if check == 0:
        if rows is not None or task is not None:
            raise ConfigError("check: 0, with rows or a task", fix="leave them out, or check 1 row or more")
        return ""
    if check is not None and check < 0:
        raise ConfigError(f"check: {check}", fix="the number of rows; 0 checks nothing")
    wanted = check is not None or rows is not None or task is not None
    held_out = Path(model).resolve().parent / "data" / "test.jsonl"
    if rows is None and not held_out.is_file():
        if wanted:
            raise ConfigError(
                f"{model}: no run with held-out rows holds it, so its answers cannot be checked",
                fix="give a file with rows: --rows ROWS",
            )
        return "no held-out rows are known: --rows ROWS --task TASK"
    try:
        known = find_model(model, task, progress).task
    except ConfigError as error:
        if wanted:
            raise
        return str(error)
    file = held_out if rows is None else Path(resolve_asset(str(rows)))
    found = list(islice(read_path(file, str(file), ReadOptions()), check or DEFAULT_ROWS))
    return _Asked(found, known)


def _run_figures(model: Path, progress: Progress) -> Mapping[str, Any] | None:
    """The report of the run that holds a model; None where there is none, or where the model was made again
    since.
    """
    path, manifest = model.parent / "report.json", read_manifest(model)
    if not path.is_file():
        return None
    figures = read_report(path).report
    stages = (figures.get("provenance") or {}).get("stages") or ()
    keys = {stage["folder"]: stage["key"] for stage in stages}
    if manifest is None or not keys or keys.get(model.name) == manifest.key:
        return figures
    progress.note(
        f"the model card has no figures: {path} is not of {model.name} as it is now "
        "(to fix: run mlx-distill evaluate, or give --report)"
    )
    return None


def _keep(destination: Path, run: Path, check: Mapping[str, Any], progress: Progress) -> None:
    """Write a check beside the export, into its model card, into the run and into the run's report."""
    card = destination / "README.md"
    write_text(card, with_check(card.read_text(encoding="utf-8"), check))
    write_check(destination, [check], with_answers=False)
    record_files(destination, ["README.md", FILE_NAME])
    if not (run / "data" / "test.jsonl").is_file():
        return
    try:
        add_check(run, check)
        if (run / "report.json").is_file():
            report = read_report(run).report
            write_report(run, {**report, "artifact": {"checks": read_checks(run)}})
    except FileError as error:
        progress.note(f"the run does not keep the check of its export: {error}")
