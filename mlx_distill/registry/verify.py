"""Whether a version is still what was added: its files, that it loads, and its answers to its golden rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_distill.errors import DistillError, ModelError
from mlx_distill.ledger.database import Ledger
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.registry.contents import check_files
from mlx_distill.registry.golden import answer_golden
from mlx_distill.registry.records import ARCHIVED, FAILED, READY, Version
from mlx_distill.runtime import machine, versions
from mlx_distill.tasks.task import Task

Level = Literal["text", "answer", "label", "valid", "different"]
_EQUAL = ("text", "answer", "label")
Answer = Callable[[Path, Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Verification:
    """What was found when a version was verified.

    Attributes:
        passed: Whether it may serve.
        sentence: What was found, in words.
        files: How many files have the hash that they were added with.
        damaged: Whether a file is missing or has changed.
        rows: Of each golden row its ``id`` and how the answer compares: the same ``text``, the same parsed
            ``answer``, the same ``label``, only ``valid``, or ``different``.
        same_machine: Whether the golden answers were made on this machine with these packages.
        seconds: It took.
    """

    passed: bool
    sentence: str
    files: int = 0
    damaged: bool = False
    rows: Sequence[Mapping[str, str]] = ()
    same_machine: bool | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As it is kept with a deployment."""
        return {**asdict(self), "rows": [dict(row) for row in self.rows]}


def verify_version(ledger: Ledger, version: Version, answer: Answer = answer_golden) -> Verification:
    """Hash every file of a version, load it, and compare its answers to its golden rows.

    The text of an answer need not be the same: the last digits of a logit differ between machines, and where
    two tokens are nearly tied another one is written. What has to be the same is the label; of a task without
    a label the answers have to fit the schema. Where they were made on this machine with these packages, at
    least one has to be equal too.

    A version whose files are damaged becomes ``FAILED``; one that is whole again becomes ``READY``.

    Args:
        ledger: The ledger.
        version: The version.
        answer: Loads the model in a folder and lets it answer golden rows.
    """
    start, files = time.monotonic(), version.info["files"]
    kept = ledger.root.inside(version.kept)
    if version.files_deleted is not None:
        return Verification(False, "its files were deleted")
    if problem := check_files(kept, files):
        _set_state(ledger, version, FAILED)
        return Verification(False, problem, damaged=True, seconds=time.monotonic() - start)
    golden = version.info["golden"]
    folder = ledger.root.inside(version.path)
    trained_on = read_trained_on(folder)
    try:
        answers = answer(folder, golden)
    except (DistillError, RuntimeError, ValueError, MemoryError) as error:
        text = f"it does not load or answer: {error}"
        return Verification(False, text, len(files), seconds=time.monotonic() - start)
    same = is_same_machine(version.info)
    rows, passed, sentence = compare_golden(golden, answers, trained_on.task if trained_on else None, same)
    if version.state == FAILED:
        _set_state(ledger, version, READY)
    sentence = f"{len(files)} files have their hashes; {sentence}"
    return Verification(passed, sentence, len(files), False, rows, same, time.monotonic() - start)


def is_same_machine(info: Mapping[str, Any]) -> bool:
    """Whether the golden rows were answered on this machine with these versions of the packages."""
    here = {"machine": machine(), "versions": versions()}
    return all(dict(info.get(key) or {}) == value for key, value in here.items())


def compare_golden(
    golden: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    task: Task | None,
    same_machine: bool,
) -> tuple[list[dict[str, str]], bool, str]:
    """Compare answers with the golden ones.

    Args:
        golden: Rows with ``id``, ``text``, ``answer`` and ``label``.
        answers: The same rows with the answers of now.
        task: Their task, or None.
        same_machine: Whether equal answers are expected.

    Returns:
        Each row's id and level, whether it passes, and a sentence.
    """
    levels = [_level(old, new, task) for old, new in zip(golden, answers, strict=True)]
    rows = [{"id": str(row["id"]), "same": level} for row, level in zip(golden, levels, strict=True)]
    equal = sum(level in _EQUAL for level in levels)
    counts = [f"{levels.count(level)} the same {level}" for level in _EQUAL if level in levels]
    counts += [f"{levels.count('valid')} another answer"] if "valid" in levels else []
    counts += [f"{levels.count('different')} a wrong one"] if "different" in levels else []
    sentence = f"of {len(levels)} golden rows {', '.join(counts)}"
    passed = bool(levels) and "different" not in levels and (equal > 0 or not same_machine)
    return rows, passed, sentence


def _level(old: Mapping[str, Any], new: Mapping[str, Any], task: Task | None) -> Level:
    if new["text"] == old["text"]:
        return "text"
    if old["answer"] is None:  # a model without a task, or one whose answers do not fit it
        return "valid" if new["text"].strip() else "different"
    if new["answer"] == old["answer"]:
        return "answer"
    if task is not None and task.label:
        return "label" if new["label"] is not None and new["label"] == old["label"] else "different"
    return "valid" if new["answer"] is not None else "different"


def require_verified(version: Version, verification: Verification) -> None:
    """Raise where a version is not what was added.

    Raises:
        ModelError: with what was found.
    """
    if verification.passed:
        return
    fix = "restore its files from a backup, or choose another version; what serves is unchanged"
    raise ModelError(f"{version.name}: {verification.sentence}", fix=fix)


def _set_state(ledger: Ledger, version: Version, state: str) -> None:
    with ledger.write() as db:
        db.execute(
            "UPDATE versions SET state = ? WHERE model = ? AND number = ? AND state <> ?",
            (state, version.model, version.number, ARCHIVED),
        )
