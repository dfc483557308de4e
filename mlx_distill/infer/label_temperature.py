"""The temperature that calibrates a model's distribution over the labels, kept in the model's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mlx_distill.errors import DataError
from mlx_distill.metrics.calibration import (
    CalibrationError,
    calibration_error,
    class_numbers,
    fit_temperature,
)
from mlx_distill.models.folder import LABEL_TEMPERATURE
from mlx_distill.storage import digest, read_json, write_json
from mlx_distill.tasks.task import Task

FORMAT = 1
SMALLEST = 1e-30
"""Probabilities are at least this: a float32 of 0 has no logarithm."""


@dataclass(frozen=True)
class LabelTemperature:
    """What ``label_temperature.json`` says.

    Attributes:
        temperature: By which log-probabilities of the labels are divided; None where none was fitted.
        rows: The validation rows with a true label.
        before: Likelihood and calibration error of these rows at temperature 1.
        after: The same at ``temperature``; None without one. The report has both for the held-out rows.
        normalize: The kind of score that it is for; see :func:`~mlx_distill.infer.classify.classify`.
        labels: The classes.
        asked: A hash of the task's prompts, schema and label.
        weights: A hash of the model's weights.
        reason: Why there is no temperature.
    """

    temperature: float | None
    rows: int
    before: CalibrationError | None
    after: CalibrationError | None
    normalize: str
    labels: tuple[str, ...]
    asked: str
    weights: str
    reason: str | None = None


def fit_label_temperature(
    probabilities: Sequence[Mapping[str, float] | None],
    truth: Sequence[str | None],
    task: Task,
    folder: Path,
    normalize: str = "none",
) -> LabelTemperature:
    """Fit a temperature to a model's distributions over the labels.

    Args:
        probabilities: Of each row; None for a row that was not scored.
        truth: The true label of each row; rows without one are left out.
        task: Its labels are the classes.
        folder: Of the model, whose weights it is for.
        normalize: How the labels were scored.
    """
    numbers = class_numbers(truth, task.labels)
    used = [i for i, row in enumerate(probabilities) if row is not None and numbers[i] >= 0]
    log_probs = log_table([probabilities[i] or {} for i in used], task.labels)
    numbers = numbers[used]
    temperature, reason = None, None
    try:
        temperature = fit_temperature(log_probs, numbers)
    except DataError as error:
        reason = error.message
    return LabelTemperature(
        temperature=temperature,
        rows=len(used),
        before=calibration_error(log_probs, numbers) if used else None,
        after=calibration_error(log_probs, numbers, temperature) if temperature else None,
        normalize=normalize,
        labels=task.labels,
        asked=what_is_asked(task),
        weights=weights_hash(folder),
        reason=reason,
    )


def log_table(rows: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Float[np.ndarray, "n c"]:
    """Distributions over the labels as a table of log-probabilities."""
    table = np.array([[row[label] for label in labels] for row in rows], dtype=np.float64)
    return np.log(np.maximum(table.reshape(len(rows), len(labels)), SMALLEST))


def write_label_temperature(folder: Path, fitted: LabelTemperature) -> None:
    """Keep it in a model's folder."""
    write_json(folder / LABEL_TEMPERATURE, {"format": FORMAT, **asdict(fitted)})


def read_label_temperature(folder: str | Path) -> LabelTemperature | None:
    """What a model's folder has, None without the file.

    Raises:
        DataError: a file of another format.
    """
    path = Path(folder) / LABEL_TEMPERATURE
    if not path.is_file():
        return None
    raw: dict[str, Any] = read_json(path)
    if raw.pop("format", None) != FORMAT:
        raise DataError(f"{path}: not format {FORMAT}", fix="remove it, or make the model again")
    for key in ("before", "after"):
        raw[key] = CalibrationError(**raw[key]) if raw[key] else None
    return LabelTemperature(**{**raw, "labels": tuple(raw["labels"])})


def usable_temperature(
    fitted: LabelTemperature | None, folder: str | Path, task: Task, normalize: str
) -> tuple[float | None, str | None]:
    """The temperature for these scores; None and the reason where the folder has none for them."""
    if fitted is None:
        return None, f"the model's folder has no {LABEL_TEMPERATURE}"
    if fitted.temperature is None:
        return None, fitted.reason
    if fitted.asked != what_is_asked(task):
        return None, "its temperature is for another task or prompt"
    if fitted.normalize != normalize:
        return None, f"its temperature is for normalize={fitted.normalize!r}"
    if fitted.weights != weights_hash(folder):
        return None, "its weights have changed since its temperature was fitted"
    return fitted.temperature, None


def what_is_asked(task: Task) -> str:
    """A hash of what a model is asked and may answer."""
    return digest([task.system, task.user, dict(task.schema), list(task.schema["properties"]), task.label])


def weights_hash(folder: str | Path, blocks: int = 16, block: int = 64 << 10) -> str:
    """A hash of names, sizes and evenly spaced parts of the weights in a folder: every training and
    quantization changes it, and it takes no longer for a large model.
    """
    out = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            for start in np.linspace(0, max(0, size - block), blocks, dtype=np.int64).tolist():
                file.seek(start)
                hashed.update(file.read(block))
        out.append([path.name, size, hashed.hexdigest()])
    return digest(out)
