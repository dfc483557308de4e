"""The models of a run: their names, titles, folders and roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.text import listed, words

MODELS = {
    "teacher": "Teacher",
    "teacher_before": "Teacher before",
    "student_before": "Student before",
    "student": "Student",
    "quantized": "Quantized",
}


_CONTROLS = {
    "labels": "trained on the rows’ own answers alone",
    "text": "trained on the teacher’s text alone",
}


def model_name(name: str) -> str:
    """A model's name in tables.

    >>> model_name("quantized"), model_name("student_labels")
    ('Quantized', 'Control: labels')
    """
    if name in MODELS:
        return MODELS[name]
    return f"Control: {_control(name)}"


def the_model(name: str) -> str:
    """A model in the middle of a sentence.

    >>> the_model("student_before"), the_model("student_text")
    ('the student before distillation', 'the control student (text)')
    """
    if name == "student_before":
        return "the student before distillation"
    if name == "quantized":
        return "the quantized student"
    if name == "teacher_before":
        return "the teacher before tuning"
    if name in MODELS:
        return "the " + MODELS[name].lower()
    return f"the control student ({_control(name)})"


def _control(name: str) -> str:
    return words(name.removeprefix("student_").removeprefix("control_"))


def control_note(name: str) -> str:
    """How a control was trained, where the name tells."""
    return _CONTROLS.get(_control(name), "")


def model_class(name: str) -> str:
    """The CSS class with a model's colour."""
    return f"m-{name.replace('_', '-')}" if name in MODELS else "m-control"


def packing_note(evaluations: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why speeds and memory of a run's models do not compare; None where all computed alike.

    Args:
        evaluations: The settings of each model's evaluation; ``unpack`` says whether its packed weights were
            unpacked first.

    >>> packing_note({"teacher": {"unpack": True}, "quantized": {"unpack": False}})
    'The quantized student computed with packed weights, the teacher with unpacked ones: times, paces and peaks of the two do not compare.'
    >>> packing_note({"teacher": {"unpack": True}, "student": {"unpack": True}})
    """
    packed, unpacked = (
        [the_model(name) for name, entry in evaluations.items() if entry.get("unpack") is kind]
        for kind in (False, True)
    )
    if not packed or not unpacked:
        return None
    first, rest = listed(packed), listed(unpacked)
    if len(unpacked) > 1 and len(packed) + len(unpacked) == len(evaluations):
        rest = "all others"
    return (
        f"{first[0].upper()}{first[1:]} computed with packed weights, {rest} with unpacked ones: "
        "times, paces and peaks of the two do not compare."
    )
