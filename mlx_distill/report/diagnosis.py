"""What is wrong with a run's result, why, and what to change: from the figures of its report alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mlx_distill.report.tables import Report, main_metrics, metric_titles
from mlx_distill.run_models import RESULTS, model_phrase, run_model
from mlx_distill.text import listed, percent, significant, words

FEW_VALID = 0.5
"""Below this share of valid answers a model is diagnosed."""
GOOD = 0.9
"""A rate from which on "no better than before" is no defect."""
GAP = 0.2
"""Accuracy by distribution minus accuracy by text from which on the text is diagnosed."""
_TRAIN_LONGER = {
    "teacher": "train it longer or faster: teach.epochs or teach.steps, teach.learning_rate",
    "student": "train it longer or faster: distill.epochs or distill.steps, distill.learning_rate",
    "quantized": "quantize less: quantize.mode: affine8 or mixed4",
}

Finding = dict[str, str]
"""``problem``, ``reason`` and ``fix``, one sentence each."""


def diagnose(report: Report) -> list[Finding]:
    """The findings on a report, the most basic first; none where nothing is wrong.

    Args:
        report: What :func:`mlx_distill.report.collect.build_report` returns; of it ``metrics``, ``majority``,
            ``curves``, ``teacher_answers`` and ``task_details`` are read.
    """
    invalid = {name for name in report["metrics"] if _few_valid(report, name)}
    return [
        *_targets(report),
        *_invalid(report),
        *(finding for name in ("teacher", *RESULTS) for finding in _text(report, name)),
        *_learnt_nothing(report, "teacher", "teacher_before", invalid),
        *_learnt_nothing(report, "student", "student_before", invalid),
        *_all_zero(report, invalid),
    ]


def _value(report: Report, model: str, metric: str) -> float | None:
    """The value of a metric of a model; None where it was not measured."""
    estimate = (report["metrics"].get(model) or {}).get(metric)
    return estimate.get("value") if isinstance(estimate, Mapping) else estimate


def _finding(problem: str, reason: str, fix: str) -> Finding:
    return {"problem": problem[0].upper() + problem[1:], "reason": reason[0].upper() + reason[1:], "fix": fix}


def _targets(report: Report) -> Iterator[Finding]:
    """The targets hold few answers of the teacher: its gate was passed by force."""
    answers = report.get("teacher_answers")
    if not answers or answers["valid"] >= FEW_VALID * answers["rows"]:
        return
    kind, reason = max(answers["reasons"].items(), key=lambda item: item[1]["count"])
    yield _finding(
        f"only {answers['valid']:,} of {answers['rows']:,} answers of the teacher on training rows fit the "
        "task, so the student learnt the data’s own text on the others",
        f"most of the others: {kind}, such as row {reason['id']}: {reason['error']}",
        _TRAIN_LONGER["teacher"],
    )


def _few_valid(report: Report, model: str) -> bool:
    share = _value(report, model, "json_valid")
    return share is not None and share < FEW_VALID and run_model(model).trained


def _invalid(report: Report) -> Iterator[Finding]:
    """Models whose answers are mostly invalid, each with the most frequent reason."""
    for name in ("teacher", *RESULTS):
        if not _few_valid(report, name):
            continue
        example = report["metrics"][name].get("invalid") or {}
        fix = _TRAIN_LONGER[name]
        if name == "quantized" and _few_valid(report, "student"):
            fix = _TRAIN_LONGER["student"]  # it was invalid before it was quantized
        if str(example.get("error", "")).startswith("cut after"):
            fix += "; or raise max_answer_tokens of the task"
        why = "no reason was recorded"
        if example:
            why = f"most often {example['reason']}, such as row {example['id']}: {example['error']}"
        share = percent(_value(report, name, "json_valid"))
        yield _finding(
            f"the answers of {model_phrase(name)} are mostly invalid: {share} fit the task, and an invalid "
            "answer counts as wrong in every column",
            why,
            fix,
        )


def _text(report: Report, model: str) -> Iterator[Finding]:
    """The label is right where it is chosen among the classes, and wrong in the generated text."""
    text, chosen = (_value(report, model, key) for key in ("accuracy", "accuracy_by_distribution"))
    majority = (report.get("majority") or {}).get("value") or 0.0
    if text is None or chosen is None or chosen - text < GAP or chosen <= majority:
        return
    label, knob = words(report["task_details"]["label"]), "teach" if model == "teacher" else "distill"
    fix = f"train the text longer: {knob}.epochs"
    if model != "teacher":
        fix += ", or a higher distill.text_weight"
    yield _finding(
        f"{model_phrase(model)} has {percent(chosen)} of the rows right by the distribution over the classes "
        f"and {percent(text)} by its text",
        f"it knows the {label}, and does not spell it: what it writes is no class, or no answer",
        f"{fix}; label_probs of analyze hold the right {label} already",
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
        yield _finding(
            f"{who} is no better than before {trained}",
            f"{title}: {percent(value)} after it and {percent(old)} before",
            _TRAIN_LONGER[model],
        )
    elif own is not None and majority.get("value") and own <= majority["value"] and own < GOOD:
        yield _finding(
            f"{who} is no better than the answer {words(majority['label'])} to every row",
            f"its accuracy is {percent(own)}, and {percent(majority['value'])} of the held-out rows are of "
            "that class",
            f"{_TRAIN_LONGER[model]}; or more training rows of the other classes",
        )
    elif len(losses) > 1 and losses[-1] >= losses[0] and (value is None or value < GOOD):
        yield _finding(
            f"the validation loss of {who} did not fall",
            f"it was {significant(losses[0], 3)} at the first validation and {significant(losses[-1], 3)} "
            "at the last",
            f"{_TRAIN_LONGER[model]} (lower, where the training loss rose)",
        )


def _all_zero(report: Report, invalid: set[str]) -> Iterator[Finding]:
    """Columns in which every trained model has 0 %, although answers are valid."""
    names = [name for name in report["metrics"] if run_model(name).trained]
    if not names or invalid.issuperset(names):
        return
    titles = metric_titles(report["task_details"])
    zero = [titles[key] for key in main_metrics(report["task_details"]) if _zero(report, names, key)]
    if zero:
        yield _finding(
            f"every model has 0 % in {listed(zero)}",
            "valid answers, and none equals its reference",
            "compare the answers of the held-out rows with those of the training rows (data/test.jsonl, "
            "data/train.jsonl), and the examples under Disagreements",
        )


def _zero(report: Report, names: Sequence[str], key: str) -> bool:
    values = [_value(report, name, key) for name in names]
    known = [value for value in values if value is not None]
    return bool(known) and not any(known)
