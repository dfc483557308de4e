"""What is wrong with a run's result, why, and what to change: from the figures of its report alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_distill.distill.answer_check import NOT_KEPT
from mlx_distill.recipe import length_options
from mlx_distill.report.tables import Report, main_metrics, metric_titles
from mlx_distill.run_models import RESULTS, model_phrase, run_model
from mlx_distill.tasks.answer import THINKING
from mlx_distill.text import listed, percent, significant, visible, words

FEW_VALID = 0.5
"""Below this share of valid answers a model is diagnosed."""
GOOD = 0.9
"""A rate from which on "no better than before" is no defect."""
GAP = 0.2
"""Accuracy by distribution minus accuracy by text from which on the text is diagnosed."""
_SECTIONS = {"teacher": "teach", "student": "distill"}

Finding = dict[str, str]
"""``problem``, ``reason`` and ``fix``, one sentence each."""


def diagnose(report: Report) -> list[Finding]:
    """The findings on a report, the most basic first; none where nothing is wrong.

    Args:
        report: What :func:`mlx_distill.report.collect.build_report` returns; of it ``metrics``, ``majority``,
            ``curves``, ``teacher_answers`` and ``task_details`` are read.
    """
    invalid = {name for name in report["metrics"] if _few_valid(report, name)}
    teacher = list(_learnt_nothing(report, "teacher", "teacher_before", invalid))
    student = list(_learnt_nothing(report, "student", "student_before", invalid))
    named = invalid | {name for name in report["metrics"] if _knows_label(report, name)}
    # What the student has is also what its quantized copy has.
    named |= ({"teacher"} if teacher else set()) | ({"student", "quantized"} if student else set())
    return [
        *_targets(report),
        *_invalid(report),
        *_text(report, invalid),
        *teacher,
        *student,
        *_all_zero(report, named),
    ]


def _value(report: Report, model: str, metric: str) -> float | None:
    """The value of a metric of a model; None where it was not measured."""
    estimate = (report["metrics"].get(model) or {}).get(metric)
    return estimate.get("value") if isinstance(estimate, Mapping) else estimate


def finding(problem: str, reason: str, fix: str) -> Finding:
    """An entry of the diagnosis, as plain text that begins with capitals."""
    problem, reason = (text[0].upper() + text[1:] for text in (problem, reason))
    return {"problem": visible(problem), "reason": visible(reason), "fix": visible(fix)}


def _train_longer(report: Report, model: str) -> str:
    """The fix for a model that has learnt too little, with the options that have an effect in its recipe."""
    if model == "quantized":
        return "quantize less: quantize.mode: affine8 or mixed4"
    return f"train it longer or faster: {_length(report, model)}, {_SECTIONS[model]}.learning_rate"


def _length(report: Report, model: str) -> str:
    section = _SECTIONS["teacher" if model == "teacher" else "student"]
    recipe = (report.get("provenance") or {}).get("recipe") or {}
    return length_options(section, (recipe.get(section) or {}).get("steps"))


def _of_models(names: Sequence[str]) -> tuple[str, str]:
    """The models as the subject of a sentence, and its "has" or "have"."""
    return listed([model_phrase(name) for name in names]), "has" if len(names) == 1 else "have"


def _targets(report: Report) -> Iterator[Finding]:
    """The targets hold few answers of the teacher: its gate was passed by force."""
    answers = report.get("teacher_answers")
    if not answers or answers["valid"] >= FEW_VALID * answers["rows"]:
        return
    unfit = {kind: reason for kind, reason in answers["reasons"].items() if kind != NOT_KEPT}
    kind, reason = max(unfit.items(), key=lambda item: item[1]["count"])
    error = str(reason["error"]).removeprefix(f"{kind}: ")
    again, left_out = answers.get("valid_again"), answers.get("left_out")  # the latter of one that thinks
    others = "did not learn from the others" if left_out else "learnt the data’s own text on the others"
    if again:
        rest = "nothing of the rest" if left_out else "the data’s own text on the rest"
        others = f"learnt other samples of {again:,} of the others and {rest}"
    yield finding(
        f"only {answers['valid']:,} of {answers['rows']:,} answers of the teacher on training rows fit the "
        f"task, so the student {others}",
        f"most of the others: {kind}, such as row {reason['id']}: {error}",
        _train_longer(report, "teacher"),
    )


def _few_valid(report: Report, model: str) -> bool:
    share = _value(report, model, "json_valid")
    return share is not None and share < FEW_VALID and run_model(model).trained


def _invalid(report: Report) -> Iterator[Finding]:
    """Models whose answers are mostly invalid, each with the most frequent reason; the student and its
    quantized copy, which was invalid before it was quantized, are one finding.
    """
    for names in _groups([name for name in ("teacher", *RESULTS) if _few_valid(report, name)]):
        first = names[0]
        fix = _train_longer(report, first)
        examples = {name: report["metrics"][name].get("invalid") or {} for name in names}
        errors = [str(example.get("error", "")) for example in examples.values()]
        if any(error.endswith(THINKING) for error in errors):
            fix += "; or raise targets.max_thinking_tokens, if right answers need more thinking"
        elif any(error.startswith("cut after") for error in errors):
            fix += "; or raise max_answer_tokens of the task, if right answers are longer"
        fix += _constrained(report, names)
        if known := [name for name in names if _knows_label(report, name)]:
            label = words(report["task_details"]["label"])
            shares = listed([percent(_value(report, name, "accuracy_by_distribution")) for name in known])
            fix += f"; label_probs of analyze have the right {label} first in {shares} of the rows already"
        yield finding(
            f"the answers of {_of_models(names)[0]} are mostly invalid: "
            f"{listed([percent(_value(report, name, 'json_valid')) for name in names])} fit the task, and an "
            "invalid answer counts as wrong in every column",
            _invalid_reason(report, examples),
            fix,
        )


def _constrained(report: Report, names: Sequence[str]) -> str:
    """What the grammar of the task changes, where more answers fit under it."""
    shares = [_value(report, name, "json_valid_constrained") for name in names]
    if not all(share is not None and share >= FEW_VALID for share in shares):
        return ""
    metric = main_metrics(report["task_details"])[0]
    title = metric_titles(report["task_details"])[metric]
    right = [_value(report, name, f"{metric}_constrained") for name in names]
    fit, correct = (listed([percent(value) for value in values]) for values in (shares, right))
    return f"; analyze constrains answers to the task: {fit} of them fit then, with {title} {correct}"


def _groups(names: Sequence[str]) -> list[list[str]]:
    """The teacher alone, the student and its quantized copy together."""
    results = [name for name in names if name in RESULTS]
    return [[name] for name in names if name not in RESULTS] + ([results] if results else [])


def _invalid_reason(report: Report, examples: Mapping[str, Mapping[str, Any]]) -> str:
    """Why answers are invalid: the most frequent reason of each model, once where it is the same."""
    texts: dict[str, str] = {}
    for name, example in examples.items():
        if example and example["reason"] not in texts:
            of_model = f" of {model_phrase(name)}" if texts else ""
            texts[example["reason"]] = (
                f"most often{of_model}, as in row {example['id']}: {example['error']}"
                f"{_other_form(report, str(example['error']))}"
            )
    return "; ".join(texts.values()) or "no reason was recorded"


def _other_form(report: Report, error: str) -> str:
    """What several fields that the task does not have mean."""
    properties = report["task_details"].get("properties") or ()
    fields = re.findall(r"'([^']*)'", error) if error.startswith("Additional properties") else []
    if len(fields) < 2 or set(fields) & set(properties):
        return ""
    return "; it still answers in the form of another task"


def _knows_label(report: Report, model: str) -> bool:
    """Whether the label chosen among the classes is right clearly more often than the most frequent class."""
    chosen = (report["metrics"].get(model) or {}).get("accuracy_by_distribution") or {}
    text = _value(report, model, "accuracy")
    if text is None or chosen.get("value") is None or chosen["value"] - text < GAP:
        return False
    return chosen["low"] > ((report.get("majority") or {}).get("value") or 0.0)


def _text(report: Report, invalid: set[str]) -> Iterator[Finding]:
    """The label is right where it is chosen among the classes, and wrong in the generated text."""
    known = [name for name in ("teacher", *RESULTS) if name not in invalid and _knows_label(report, name)]
    for names in _groups(known):
        who, have = _of_models(names)
        chosen, text = (
            listed([percent(_value(report, name, key)) for name in names])
            for key in ("accuracy_by_distribution", "accuracy")
        )
        label = words(report["task_details"]["label"])
        fix = f"train the text longer: {_length(report, names[0])}"
        if names[0] != "teacher":
            fix += ", or a higher distill.text_weight"
        yield finding(
            f"{who} {have} {chosen} of the rows right by the distribution over the classes and {text} by the "
            "text",
            f"the {label} is known and not spelled: what is written is no class, or no answer",
            f"{fix}; label_probs of analyze have the right {label} first in {chosen} of the rows already",
        )


def _learnt_nothing(report: Report, model: str, before: str, invalid: set[str]) -> Iterator[Finding]:
    """A trained model that is no better than before, than the most frequent class, or whose validation loss
    did not fall.
    """
    if model in invalid or model not in report["metrics"]:
        return
    accuracy, agreement = main_metrics(report["task_details"])
    metric = agreement if model == "student" and _value(report, model, agreement) is not None else accuracy
    value, old = _value(report, model, metric), _value(report, before, metric)
    majority, own = report.get("majority") or {}, _value(report, model, accuracy)
    title, who = metric_titles(report["task_details"])[metric], model_phrase(model)
    losses = ((report["curves"].get(model) or {}).get("valid_loss") or {}).get("value") or []
    if value is not None and old is not None and value <= old and value < GOOD:
        trained = "fine-tuning" if model == "teacher" else "distillation"
        yield finding(
            f"{who} is no better than before {trained}",
            f"{title}: {percent(value)} after it and {percent(old)} before",
            _train_longer(report, model),
        )
    elif own is not None and majority.get("value") and own <= majority["value"] and own < GOOD:
        yield finding(
            f"{who} is no better than the answer {words(majority['label'])} to every row",
            f"its accuracy is {percent(own)}, and {percent(majority['value'])} of the held-out rows are of "
            "that class",
            f"{_train_longer(report, model)}; or more training rows of the other classes",
        )
    elif len(losses) > 1 and losses[-1] >= losses[0] and (value is None or value < GOOD):
        yield finding(
            f"the validation loss of {who} did not fall",
            f"it was {significant(losses[0], 3)} at the first validation and {significant(losses[-1], 3)} "
            "at the last",
            f"{_train_longer(report, model)} (lower, where the training loss rose)",
        )


def _all_zero(report: Report, named: set[str]) -> Iterator[Finding]:
    """Columns in which every trained model with valid answers has 0 %, and no other finding says why."""
    trained = [name for name in report["metrics"] if run_model(name).trained]
    names = [name for name in trained if name not in named]
    titles = metric_titles(report["task_details"])
    zero = [titles[key] for key in main_metrics(report["task_details"]) if _zero(report, names, key)]
    if zero:
        who, have = ("every model", "has") if names == trained else _of_models(names)
        yield finding(
            f"{who} {have} 0 % in {listed(zero)}",
            "valid answers, and none equals its reference",
            "compare the answers of the held-out rows with those of the training rows (data/test.jsonl, "
            "data/train.jsonl), and the examples under Disagreements",
        )


def _zero(report: Report, names: Sequence[str], key: str) -> bool:
    values = [_value(report, name, key) for name in names]
    known = [value for value in values if value is not None]
    return bool(known) and not any(known)
