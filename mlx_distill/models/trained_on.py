"""What a model was trained on: its task and its system prompts, kept in its folder; and which model of a run
is the newest usable one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.config import to_mapping
from mlx_distill.errors import FileError, ModelError
from mlx_distill.run_models import RUN_MODELS, run_model
from mlx_distill.storage import check_folder, os_errors, read_json, read_manifest, write_json
from mlx_distill.tasks.task import Task, parse_task

TRAINED_ON = "trained_on.json"
_GOOD_SHARE = 0.9  # of valid answers, from which on a report has nothing to say of them
_MAX_PROMPTS = 8  # more than these, and the rows had prompts of their own


@dataclass(frozen=True)
class TrainedOn:
    """The task of a training, and the system prompts of its rows.

    Attributes:
        task: The task; None for chats of any kind.
        system_prompts: The distinct system prompts of the training rows, ``""`` for rows without one; None
            where they are not known, or are many.
    """

    task: Task | None
    system_prompts: tuple[str, ...] | None = None


def write_trained_on(folder: Path, task: Task, chats: Iterable[Mapping[str, Any]]) -> None:
    """Keep task and system prompts in a model's folder.

    Args:
        folder: Of the model.
        task: The task of the training.
        chats: The prepared training rows.
    """
    prompts: dict[str, None] = {}
    for chat in chats:
        first = chat["messages"][0]
        prompts[first["content"] if first["role"] == "system" else ""] = None
        if len(prompts) > _MAX_PROMPTS:
            break
    known = list(prompts) if len(prompts) <= _MAX_PROMPTS else None
    write_json(
        folder / TRAINED_ON, {"task": None if task.is_chats else to_mapping(task), "system_prompts": known}
    )


def replace_trained_on(source: Path, destination: Path) -> None:
    """Copy what the model of a folder was trained on, and remove what another one, such as its base, was."""
    with os_errors():
        (destination / TRAINED_ON).unlink(missing_ok=True)
        if (source / TRAINED_ON).is_file():
            shutil.copyfile(source / TRAINED_ON, destination / TRAINED_ON)


def read_trained_on(folder: str | Path) -> TrainedOn | None:
    """What the model in a folder was trained on, or None where the folder does not say."""
    path = Path(folder) / TRAINED_ON
    if path.is_file():
        raw = read_json(path)
        prompts = raw["system_prompts"]
        task = None if raw["task"] is None else parse_task(raw["task"], str(path))
        return TrainedOn(task, None if prompts is None else tuple(prompts))
    manifest = read_manifest(folder)  # earlier versions wrote no such file
    task = manifest.config.get("task") if manifest else None
    return TrainedOn(parse_task(task, f"{folder}/manifest.json")) if isinstance(task, Mapping) else None


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    path = Path(folder).expanduser()
    return any((path / name).exists() for name in ("config.json", "adapter_config.json"))


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds finished stages of a run, and no model of its own."""
    path = Path(folder).expanduser()
    if not path.is_dir() or is_model(path):
        return False
    return any((path / name / "manifest.json").is_file() for name in (*RUN_MODELS, "data", "student_base"))


def newest_model(run: str | Path, note: Callable[[str], None]) -> Path:
    """The folder of the last trained model of a run whose files are whole and which is of the same training
    as the models before it: the quantized student, else the student, else the teacher.

    Args:
        run: The run's folder.
        note: Is told which model it is, whether few of its answers were valid, and why a later one is
            not used.

    Raises:
        ModelError: the run has no such model.
    """
    run, absent = Path(run).expanduser(), list[str]()
    for name in ("quantized", "student", "teacher"):
        manifest = read_manifest(run / name)
        if manifest is None:
            absent.append(run_model(name).phrase.removeprefix("the "))
            continue
        problem = check_folder(run / name, manifest)
        for parent, content in manifest.parents.items():
            made_now = read_manifest(run / parent)
            if made_now is not None and made_now.content != content:
                problem = problem or f"{parent} was made again since"
        if problem is None:
            without = f", since the run has no {' and no '.join(absent)} yet" if absent else ""
            note(f"model: {run / name}, {run_model(name).phrase}{without}")
            share = _valid_share(run, name)
            if share is not None and share < _GOOD_SHARE:
                note(
                    f"note: by the run's report {share:.0%} of this model's unconstrained answers fitted the "
                    f"task: see {run / 'report.html'}"
                )
            return run / name
        note(f"{run / name} is passed over: {problem}")
    raise ModelError(
        f"{run}: no trained model in this run yet",
        fix=f"finish the run: mlx-distill run RECIPE --out {run}; or give the folder of a model",
    )


def _valid_share(run: Path, name: str) -> float | None:
    """The share of a model's answers that fitted the task when the run evaluated it; None where it has not,
    or the model was made again since.
    """
    with suppress(FileError, KeyError, TypeError):
        report, manifest = read_json(run / "report.json"), read_manifest(run / name)
        keys = {stage["folder"]: stage["key"] for stage in report["provenance"]["stages"]}
        if manifest is None or keys[name] != manifest.key:
            return None
        share = report["metrics"][name]["json_valid"]["value"]
        return None if share is None else float(share)
    return None


def prompt_notes(trained_on: TrainedOn | None, task: Task, system_prompts: Iterable[str]) -> list[str]:
    """Why a model may answer worse than it was measured: another task or another prompt than in training.

    Args:
        trained_on: What the model was trained on.
        task: What it is asked.
        system_prompts: That of each item, ``""`` for none; all are read.
    """
    known = trained_on.system_prompts if trained_on is not None else None
    items, others, example = 0, 0, ""
    for prompt in system_prompts:
        items += 1
        if known is not None and prompt not in known:
            others, example = others + 1, example if others else prompt
    if trained_on is None:
        return []
    notes, trained = [], trained_on.task
    if trained is None:
        notes.append(f"the model was trained on chats of any kind, not on the task {task.name!r}")
    elif dict(trained.schema) != dict(task.schema):
        notes.append(f"the model was trained to answer the task {trained.name!r}, not {task.name!r}")
    elif trained.user != task.user:
        notes.append(f"the task {task.name!r} asks with another user prompt than the model was trained on")
    if others and known is not None:
        notes.append(
            f"{others:,} of {items:,} items have another system prompt than the model was trained on: "
            f"{_quoted(example)}, not {_quoted(known[0])}"
        )
    return notes


def _quoted(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= 60 else text[:57] + "...") if text else "none"
