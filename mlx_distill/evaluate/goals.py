"""Goals of a recipe: limits for figures of a report, judged by the ends of their intervals.

A value that is over its limit by chance is not shown to be over it: a goal is met where the whole interval is
on the right side of its limit, missed where the whole interval is on the wrong side, and undecided between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlx_distill.errors import ConfigError, QualityGateError
from mlx_distill.evaluate.registry import task_metrics
from mlx_distill.evaluate.suite import TEACHER, evaluate_models
from mlx_distill.run_models import RUN_MODELS, model_title
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, known_names, listed, significant, words

State = Literal["met", "missed", "undecided", "not_measured"]

# Figures that other parts of an evaluation add to those of the suite, and sections of the report that have
# figures of each model.
OTHER_FIGURES = (
    "calibration",
    "first_token_s",
    "label_orders",
    "load_s",
    "model_memory_gb",
    "peak_memory_gb",
    "references",
    "repeats",
    "requests_per_second",
    "edge_cases",
)
CHAT_FIGURES = ("loss", "perplexity", "token_accuracy")
"""The figures of a model on chats without a task."""
_UNITS = {"_s": "s", "_gb": "GB"}
_PLAIN = (
    "loss",
    "perplexity",
    "items_per_minute",
    "tokens_per_second",
    "requests_per_second",
    "label_kl",
    "disagreements",
)


def check_goals(goals: Sequence[Any], task: Task) -> None:
    """Refuse goals that name an unknown model or figure, before anything runs.

    Args:
        goals: Those of a recipe.
        task: Its metrics and error categories can be named.

    Raises:
        ConfigError: an unknown model, or no such figure of this task.
    """
    figures = _possible_figures(task) if goals else {}
    for number, goal in enumerate(goals):
        where = f"goals[{number}]"
        if goal.model not in RUN_MODELS:
            raise ConfigError(
                f"{where}: no model {goal.model!r}",
                fix=known_names(goal.model, RUN_MODELS, "models of a run"),
            )
        root = goal.metric.partition(".")[0]
        if root in OTHER_FIGURES or _is_group_rate(goal.metric, task) or _lookup(figures, goal.metric)[0]:
            continue
        names = sorted({*figures["task_metrics"], *figures["error_categories"], *_named(figures)})
        raise ConfigError(
            f"{where}: no figure {goal.metric!r}",
            fix=known_names(goal.metric, [*names, *OTHER_FIGURES], "figures"),
        )


def _is_group_rate(metric: str, task: Task) -> bool:
    """Whether it is an error rate of one group, such as ``by_group.groups.women.false_positive_rate``. Which
    groups there are only the rows say.
    """
    root, _, rest = metric.partition(".groups.")
    rates = ("false_positive_rate", "false_negative_rate")
    return root == "by_group" and bool(task.group and task.positive) and rest.rpartition(".")[2] in rates


def _named(figures: Mapping[str, Any]) -> list[str]:
    """The figures that are numbers or estimates, or can be."""
    return [name for name, value in figures.items() if value is None or _is_figure(value)]


def _is_figure(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number or (isinstance(value, Mapping) and "value" in value)


def _possible_figures(task: Task) -> Mapping[str, Any]:
    """The figures of a task: those of one row that nobody answered."""
    if task.is_chats:
        return {**dict.fromkeys(CHAT_FIGURES), "task_metrics": {}, "error_categories": {}}
    row: dict[str, Any] = {
        "id": "",
        "truth": None,
        "answer": None,
        "error": "",
        "fields": {},
        "constrained": None,
    }
    result = evaluate_models({TEACHER: [row], "student": [row]}, task, constrained=["student"])
    figures: Mapping[str, Any] = next(iter(result["by_set"].values()))["student"]
    return figures


def _lookup(figures: Mapping[str, Any], metric: str) -> tuple[bool, Any]:
    """Whether there is a figure of that name, and the figure: a metric or an error category of the task, or
    a path such as ``fields.themes.f1``. Of a plain number its interval, where there is one.
    """
    own = (figures.get("task_metrics") or {}).get(metric)
    if own is not None:
        return True, own
    category = (figures.get("error_categories") or {}).get(metric)
    if category is not None:
        return True, category["rate"]
    if f"{metric}_interval" in figures:
        return True, figures[f"{metric}_interval"]
    value: Any = figures
    for part in metric.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return value is None or _is_figure(value), value if _is_figure(value) else None


def judge_goals(
    goals: Sequence[Mapping[str, Any]], report: Mapping[str, Any], task: Task
) -> list[dict[str, Any]]:
    """Judge goals by a report.

    Args:
        goals: ``{"model", "metric", "at_least" or "at_most"}``.
        report: Has ``metrics``: model to its figures; and sections with figures of each model.
        task: Its metrics have units.

    Returns:
        Each goal with ``measured``, an estimate or a number, None where the run did not measure it;
        ``state``: ``met``, ``missed``, ``undecided`` or ``not_measured``; ``met``; and ``unit``: ``share``,
        ``points``, ``s``, ``GB`` or ``number``.
    """
    out = []
    for goal in goals:
        bound = next((key for key in ("at_least", "at_most") if goal.get(key) is not None), None)
        if bound is None or "model" not in goal or "metric" not in goal:
            raise ConfigError(
                f"a goal needs model, metric and at_least or at_most, not {sorted(goal)}",
                fix="correct it in the recipe",
            )
        model, metric = goal["model"], goal["metric"]
        measured = _measured(report, model, metric)
        state = goal_state(measured, bound, goal[bound])
        out.append(
            {
                "model": model,
                "metric": metric,
                bound: goal[bound],
                "measured": measured,
                "state": state,
                "met": state == "met",
                "unit": _unit(metric, task),
            }
        )
    return out


def _measured(report: Mapping[str, Any], model: str, metric: str) -> Any:
    figures = report["metrics"].get(model) or {}
    found, value = _lookup(figures, metric)
    if not found and metric.startswith("by_group.groups."):  # the name of a group may have dots
        name, _, rate = metric.removeprefix("by_group.groups.").rpartition(".")
        found, value = _lookup(((figures.get("by_group") or {}).get("groups") or {}).get(name) or {}, rate)
    section, _, path = metric.partition(".")
    if not found and path and isinstance(report.get(section), Mapping):
        found, value = _lookup(report[section].get(model) or {}, path)
    return value if found else None


def goal_state(measured: Any, bound: str, limit: float) -> State:
    """The state of a goal.

    Args:
        measured: An estimate, or a number that is exact.
        bound: ``at_least`` or ``at_most``.
        limit: The limit.

    >>> estimate = {"value": 0.9, "low": 0.86, "high": 0.93, "n": 300}
    >>> [goal_state(estimate, "at_least", limit) for limit in (0.85, 0.9, 0.95)]
    ['met', 'undecided', 'missed']
    >>> goal_state({"value": None, "low": None, "high": None, "n": 0}, "at_most", 0.1)
    'not_measured'
    """
    if not isinstance(measured, Mapping):
        measured = {"value": measured, "low": measured, "high": measured}
    value, low, high = (measured.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "not_measured"
    low, high = (-float("inf") if low is None else low), (float("inf") if high is None else high)
    if bound == "at_least":
        return "met" if low >= limit else "missed" if high < limit else "undecided"
    return "met" if high <= limit else "missed" if low > limit else "undecided"


def _unit(metric: str, task: Task) -> str:
    """The unit of a figure."""
    for own in task_metrics(task):
        if own.name == metric:
            return {"seconds": "s"}.get(own.unit, own.unit)
    last = metric.rpartition(".")[2].removesuffix("_interval")
    if last.startswith("score_") and last != "score_deviation":  # that one is a share of the scale
        return "points"
    if last in _PLAIN:
        return "number"
    return next((unit for ending, unit in _UNITS.items() if last.endswith(ending)), "share")


def goal_text(goal: Mapping[str, Any]) -> str:
    """A judged goal in words, without its state.

    >>> goal_text({"model": "student", "metric": "accuracy", "at_least": 0.85, "unit": "share",
    ...            "measured": {"value": 0.9, "low": 0.86, "high": 0.93, "n": 300}})
    'Student: accuracy at least 85 %; measured 90.0 % [86.0 to 93.0], n = 300'
    """
    bound = "at_least" if "at_least" in goal else "at_most"
    unit = {"share": " %", "number": ""}.get(goal["unit"], f" {goal['unit']}")
    scale = 100 if goal["unit"] == "share" else 1

    def show(value: float | None) -> str:
        return "?" if value is None else significant(scale * value, 3)

    metric = words(goal["metric"].removesuffix("_s").removesuffix("_gb").replace(".", ", "))
    start = f"{model_title(goal['model'])}: {metric} {words(bound)} {round(scale * goal[bound], 9):g}{unit}"
    measured = goal["measured"]
    if measured is None or (isinstance(measured, Mapping) and measured.get("value") is None):
        return f"{start}; not measured"
    if not isinstance(measured, Mapping):
        return f"{start}; measured {show(measured)}{unit}"
    ends = f"[{show(measured.get('low'))} to {show(measured.get('high'))}]"
    count = f", n = {measured['n']:,}" if measured.get("n") else ""
    return f"{start}; measured {show(measured['value'])}{unit} {ends}{count}"


def require_goals(goals: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a judged goal is not met, for ``--gate``.

    Raises:
        QualityGateError: with the goals that are missed, undecided or not measured.
    """
    open_goals = [goal for goal in goals if not goal["met"]]
    if not open_goals:
        return
    counts = Counter(goal["state"] for goal in open_goals)
    fixes = {
        "missed": "see the errors and disagreements of the report",
        "undecided": "add held-out rows, so that the intervals become narrower",
        "not_measured": "let the run measure them, or take them out of the recipe",
    }
    states = [state for state in fixes if counts[state]]
    raise QualityGateError(
        f"{len(open_goals)} of {counted(len(goals), 'goal')} not met: "
        f"{listed([f'{counts[state]} {words(state)}' for state in states])}",
        fix="; ".join(f"{words(state)}: {fixes[state]}" for state in states),
        facts={"goals": list(goals)},
    )
