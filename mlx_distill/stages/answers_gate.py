"""The gate behind the targets stage: enough of the teacher's own answers must fit the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.distill.answer_check import FACT, NOT_KEPT
from mlx_distill.errors import ConfigError, QualityGateError
from mlx_distill.recipe import Recipe, length_options
from mlx_distill.tasks.answer import CUT, NOT_JSON, THINKING
from mlx_distill.tasks.grammar import check_schema
from mlx_distill.tasks.task import Task
from mlx_distill.text import percent, shortened


def valid_share(recorded: Mapping[str, Any]) -> float | None:
    """The share of the teacher's answers that fit the task; None where the stage has not counted them.

    Args:
        recorded: What the targets stage left in its manifest.
    """
    answers = recorded.get(FACT)
    return answers["valid"] / answers["rows"] if answers and answers["rows"] else None


def gate_text(recipe: Recipe, recorded: Mapping[str, Any] | None = None) -> str | None:
    """What the gate asks for, and with the facts of a finished stage what it found; None without a gate."""
    limit = recipe.targets.min_valid
    if recipe.targets.text == "data" or not limit:
        return None
    text = f"at least {percent(limit, 0)} of the teacher's answers fit the task (targets.min_valid)"
    share = valid_share(recorded or {})
    if share is None:
        return text
    return f"{text}: {'passed' if share >= limit else 'FAILED'} with {percent(share)}"


def gate_error(
    recipe: Recipe, task: Task, recorded: Mapping[str, Any], teach: Mapping[str, Any] | None = None
) -> QualityGateError | None:
    """The error of a teacher of whose answers too few fit the task, or None.

    Args:
        recipe: ``targets.min_valid`` is the limit.
        task: The task of the run.
        recorded: What the targets stage left in its manifest.
        teach: What the teach stage left in its.
    """
    share, limit = valid_share(recorded), recipe.targets.min_valid
    if share is None or share >= limit:
        return None
    answers = recorded[FACT]
    unfit = {kind: reason for kind, reason in answers["reasons"].items() if kind != NOT_KEPT}
    kind, reason = max(unfit.items(), key=lambda item: item[1]["count"])
    message = (
        f"targets: {answers['valid']:,} of {answers['rows']:,} answers of the teacher fit the task "
        f"({percent(share)}; targets.min_valid is {percent(limit, 0)}). Mostly: {kind} "
        f"({reason['count']:,}), such as row {reason['id']}: {reason['error']}; its text: "
        f"{shortened(reason['text'], 120) or '(empty)'}"
    )
    steps = f" (it had {teach['steps']:,} steps)" if teach and teach.get("steps") else ""
    options = length_options("teach", recipe.teach.steps)
    longer = f"train the teacher longer{steps}: {options}, teach.learning_rate"
    fix = f"{_fix(kind, reason, task, longer)}; --force (in Python force=True) goes on with these targets"
    return QualityGateError(message, fix=fix, facts={"share": share, "min_valid": limit, **answers})


def _fix(kind: str, reason: Mapping[str, Any], task: Task, longer: str) -> str:
    """What to change, by the most frequent reason."""
    if kind == THINKING:
        return f"raise targets.max_thinking_tokens; {longer}; or set targets.thinking: none"
    if kind == CUT:
        if 2 * reason.get("data_longer", 0) >= reason["count"]:
            return (
                f"raise max_answer_tokens of the task, which is {task.max_answer_tokens}: the rows' own "
                f"answers have up to {reason['data_tokens']} tokens"
            )
        if 2 * reason.get("data_fits", 0) >= reason["count"]:  # the teacher does not stop where they do
            return longer
        return f"{longer}; or raise max_answer_tokens of the task, which is {task.max_answer_tokens}"
    parses = _PARSES if _has_grammar(task) else ""
    if kind == NOT_JSON:
        return f"{longer}; or let the student learn the rows' own answers: targets.text: data{parses}"
    return f"{longer}; or correct the task's schema, if this answer should fit; or targets.text: data{parses}"


_PARSES = (
    ". Constrained decoding, as in analyze, would make these answers parse, and not right: the targets are "
    "what the teacher writes freely"
)


def _has_grammar(task: Task) -> bool:
    try:
        check_schema(task.schema)
    except ConfigError:
        return False
    return True
