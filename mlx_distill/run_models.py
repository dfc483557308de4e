"""The models of a run: which there are, what they are called, and which folders they need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_distill.text import listed, words


@dataclass(frozen=True)
class RunModel:
    """A model that a run can measure.

    Attributes:
        name: Its name in recipes, in ``report.json`` and under ``evaluations/``.
        title: Its name in tables.
        phrase: Its name inside a sentence.
        folder: The folder of the run that holds it.
        base: The folder of the base model that it needs besides, for an adapter; None for a whole model.
        role: ``control`` is a student trained for comparison alone.
        trained: False for a model as it was before the training of this run.
        control: The key under ``controls`` in the recipe that asks for it.
        note: How it was trained, where the title does not say so.
    """

    name: str
    title: str
    phrase: str
    folder: str
    base: str | None
    role: Literal["teacher", "student", "control"]
    trained: bool = True
    control: str | None = None
    note: str = ""


RUN_MODELS: Mapping[str, RunModel] = {
    model.name: model
    for model in (
        RunModel(
            "teacher_before",
            "Teacher before",
            "the teacher before tuning",
            "teacher_base",
            None,
            "teacher",
            trained=False,
        ),
        RunModel("teacher", "Teacher", "the teacher", "teacher", "teacher_base", "teacher"),
        RunModel(
            "student_before",
            "Student before",
            "the student before distillation",
            "student_base",
            None,
            "student",
            trained=False,
        ),
        RunModel("student", "Student", "the student", "student", "student_base", "student"),
        RunModel("quantized", "Quantized", "the quantized student", "quantized", None, "student"),
        RunModel(
            "student_labels",
            "Control: labels",
            "the control student (labels)",
            "student_labels",
            "student_base",
            "control",
            control="labels",
            note="trained on the rows’ own answers alone",
        ),
        RunModel(
            "student_text",
            "Control: text",
            "the control student (text)",
            "student_text",
            "student_base",
            "control",
            control="text",
            note="trained on the teacher’s text alone",
        ),
        RunModel(
            "student_labels_hard",
            "Hard labels (rows)",
            "the fair control student (labels)",
            "student_labels_hard",
            "student_base",
            "control",
            control="labels_hard",
            note="fair control: trained as the student is, on the rows’ own answers and labels",
        ),
        RunModel(
            "student_teacher_hard",
            "Hard labels (teacher)",
            "the fair control student (teacher)",
            "student_teacher_hard",
            "student_base",
            "control",
            control="teacher_hard",
            note="fair control: trained as the student is, on the teacher’s text and most probable label",
        ),
    )
}

CONTROLS = tuple(model for model in RUN_MODELS.values() if model.role == "control")
"""The students trained for comparison alone."""
STUDENTS = tuple(name for name, model in RUN_MODELS.items() if model.role == "student")
"""The student before the training, after it, and quantized."""
RESULTS = tuple(name for name in STUDENTS if RUN_MODELS[name].trained)
"""The models that a run is made for: the student and the quantized student."""


def run_model(name: str) -> RunModel:
    """The model of that name; a name that is not in :data:`RUN_MODELS` is a control in a folder of its name.

    >>> run_model("teacher").base, run_model("other").role
    ('teacher_base', 'control')
    """
    title = words(name)
    control = RunModel(name, f"Control: {title}", f"the control student ({title})", name, None, "control")
    return RUN_MODELS.get(name, control)


def model_title(name: str) -> str:
    """A model's name in tables.

    >>> model_title("quantized"), model_title("student_labels")
    ('Quantized', 'Control: labels')
    """
    return run_model(name).title


def model_phrase(name: str) -> str:
    """A model's name inside a sentence.

    >>> model_phrase("student_before"), model_phrase("student_text")
    ('the student before distillation', 'the control student (text)')
    """
    return run_model(name).phrase


def model_class(name: str) -> str:
    """The CSS class with a model's colour."""
    return "m-control" if run_model(name).role == "control" else f"m-{name.replace('_', '-')}"


def is_dequantized(settings: Mapping[str, Any]) -> bool | None:
    """Whether a model was evaluated with its quantized weights dequantized; None where that is not recorded.

    Args:
        settings: The settings of its evaluation in ``report.json``; older reports call the key ``unpack``.
    """
    return settings.get("dequantize", settings.get("unpack"))


def dequantization_note(evaluations: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why speed and memory of a run's models do not compare; None where all computed alike.

    Args:
        evaluations: The settings of each model's evaluation; see :func:`is_dequantized`.

    >>> print(dequantization_note({"teacher": {"dequantize": True}, "quantized": {"dequantize": False}}))
    The quantized student computed with quantized weights, the teacher with dequantized ones: times, speeds
    and memory peaks of the two do not compare.
    >>> dequantization_note({"teacher": {"dequantize": True}, "student": {"dequantize": True}})
    """
    quantized, dequantized = (
        [model_phrase(name) for name, settings in evaluations.items() if is_dequantized(settings) is value]
        for value in (False, True)
    )
    if not quantized or not dequantized:
        return None
    first, second = listed(quantized), listed(dequantized)
    if len(dequantized) > 1 and len(quantized) + len(dequantized) == len(evaluations):
        second = "all others"
    return (
        f"{first[0].upper()}{first[1:]} computed with quantized weights, {second} with dequantized ones: "
        "times, speeds and memory peaks of the two do not compare."
    )


def fold_name(fold: int, folds: int, share: float = 1.0) -> str:
    """The folder of the run of a fold, in that of its cross-validation.

    >>> fold_name(2, 5), fold_name(1, 5, 0.25)
    ('fold-2-of-5', 'fold-1-of-5-share-25')
    """
    return f"fold-{fold}-of-{folds}" + (f"-share-{share * 100:.0f}" if share < 1 else "")


def validation_of(run: str) -> str | None:
    """The folder of the cross-validation that a run is a fold of; None of any other run.

    >>> validation_of("runs/music-validation/fold-2-of-5"), validation_of("runs/music")
    ('runs/music-validation', None)
    """
    folder, _, name = run.rpartition("/")
    return (folder or ".") if re.fullmatch(r"fold-\d+-of-\d+(-share-\d+)?", name) else None
