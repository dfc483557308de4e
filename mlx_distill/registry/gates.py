"""Gates: whether a version may replace what serves.

What was asked for, by an option or by the goals of the recipe, refuses unless it is shown to hold: also where
it is undecided or was not measured. What nobody asked for refuses only where it is shown to be bad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_distill.comparisons import compare
from mlx_distill.data.predictions import FILE_NAME, constrained_rows, read_predictions
from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.evaluate.compare import PASSED, parse_margin
from mlx_distill.evaluate.comparison_inputs import MAIN_SET
from mlx_distill.evaluate.goals import goal_state, goal_text
from mlx_distill.evaluate.groups import ERROR_RATES, NO_GROUP, compare_groups, group_errors
from mlx_distill.evaluate.held_out import leaked_ids
from mlx_distill.evaluate.latency import latency_quantile
from mlx_distill.ledger.database import Ledger
from mlx_distill.metrics.intervals import rate
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.progress import NullProgress
from mlx_distill.registry.about import evaluation_of, report_of
from mlx_distill.registry.comparisons import add_comparison
from mlx_distill.registry.records import Deployment, Version
from mlx_distill.registry.versions import get_version
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, interval, known_names, listed, percent, significant, words

State = Literal["passed", "failed", "undecided", "not_measured", "not_applicable", "no_limit"]
CHECKS = ("goals", "comparison", "groups", "invalid", "latency", "leaks")
DEFAULT_INVALID = 0.05
_OPEN = ("passed", "not_applicable")
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class GateLimits:
    """What the gates ask for.

    Attributes:
        margin: How much worse than what serves it may be: ``3pt`` or ``5%``.
        metric: Of the comparison; by default whether the label is right.
        set_name: The set of held-out rows; ``test`` by default.
        against: What it is compared with instead of what serves: a run or a file of predictions, under the
            root.
        constrained: Judge the answers under the grammar of the task.
        max_false_positive_rate, max_false_negative_rate: Of each group, from 0 to 1.
        max_invalid: The share of answers that do not fit the task, from 0 to 1.
        max_p95_s: The 95th percentile of the seconds a row.
        require: Checks that have to be measured and hold, of :data:`CHECKS`.
    """

    margin: str | None = None
    metric: str | None = None
    set_name: str | None = None
    against: str | None = None
    constrained: bool = False
    max_false_positive_rate: float | None = None
    max_false_negative_rate: float | None = None
    max_invalid: float | None = None
    max_p95_s: float | None = None
    require: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.margin is not None:
            parse_margin(self.margin)
        for name in self.require:
            if name not in CHECKS:
                raise ConfigError(f"no check {name!r}", fix=known_names(name, CHECKS, "checks"))
        for name in ("max_false_positive_rate", "max_false_negative_rate", "max_invalid"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name}: {value}", fix="give a share from 0 to 1")
        if self.max_p95_s is not None and self.max_p95_s <= 0:
            raise ConfigError(f"max_p95_s: {self.max_p95_s}", fix="give seconds above 0")


@dataclass(frozen=True)
class Check:
    """One thing that was judged.

    Attributes:
        name: One of :data:`CHECKS`.
        state: ``passed``, ``failed``, ``undecided``, ``not_measured``, ``not_applicable`` (there is nothing
            to judge), or ``no_limit`` (measured, and no limit was stated).
        asked: Whether it was asked for.
        sentence: What was found.
        facts: The figures.
    """

    name: str
    state: State
    asked: bool
    sentence: str
    facts: Mapping[str, Any]

    @property
    def refuses(self) -> bool:
        """Whether it keeps the gate shut."""
        return self.state == "failed" or (self.asked and self.state not in _OPEN)


@dataclass(frozen=True)
class Gate:
    """All checks of a version against what serves.

    Attributes:
        checks: In the order of :data:`CHECKS`.
        limits: What was asked for.
        against: What served, or None.
    """

    checks: Sequence[Check]
    limits: GateLimits
    against: str | None

    @property
    def passed(self) -> bool:
        """Whether no check refuses."""
        return not any(check.refuses for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As it is kept with a deployment."""
        checks = [{**asdict(check), "refuses": check.refuses} for check in self.checks]
        limits = {key: value for key, value in asdict(self.limits).items() if value not in (None, (), False)}
        return {"passed": self.passed, "checks": checks, "limits": limits, "against": self.against}


@dataclass(frozen=True)
class _Evidence:
    """A version's evaluation: the folder of the run, the model's name in it, and its rows."""

    run: Path
    model: str
    rows: Sequence[Mapping[str, Any]]
    served: Sequence[Mapping[str, Any]]  # as a server answers: under the grammar, where that was measured
    task: Task | None

    @property
    def spec(self) -> str:
        return f"{self.run}:{self.model}"


def judge(ledger: Ledger, version: Version, current: Deployment | None, limits: GateLimits) -> Gate:
    """Judge a version.

    Args:
        ledger: The ledger.
        version: What is to serve.
        current: What serves now, or None.
        limits: What is asked for.
    """
    evidence = _evidence(ledger, version, limits)
    before = None
    if current is not None and current.version not in (None, version.number):
        assert current.version is not None
        before = _evidence(ledger, get_version(ledger, version.model, current.version), limits)
    judges: Mapping[str, Callable[[_Evidence], tuple[State, str, Mapping[str, Any]]]] = {
        "goals": lambda own: _goals(version, own),
        "comparison": lambda own: _comparison(ledger, own, before, current, version, limits),
        "groups": lambda own: _groups(own, before, limits),
        "invalid": lambda own: _invalid(own, limits),
        "latency": lambda own: _latency(own, limits),
        "leaks": _leaks,
    }
    checks = []
    for name, check in judges.items():
        if evidence is None:
            result: tuple[State, str, Mapping[str, Any]] = (
                "not_measured",
                "not measured: no evaluation of this content is known",
                {},
            )
        else:
            result = check(evidence)
        state, sentence, facts = result
        asked = _asked(name, limits) or (name == "goals" and bool(facts.get("goals")))
        if asked and state == "no_limit":  # measured, as was asked
            state = "passed"
        checks.append(Check(name, state, asked, sentence, facts))
    return Gate(tuple(checks), limits, current.serves if current is not None else None)


def _asked(name: str, limits: GateLimits) -> bool:
    stated = {
        "comparison": (limits.margin, limits.metric, limits.against),
        "groups": (limits.max_false_positive_rate, limits.max_false_negative_rate),
        "invalid": (limits.max_invalid,),
        "latency": (limits.max_p95_s,),
    }
    return name in limits.require or any(value is not None for value in stated.get(name, ()))


def _evidence(ledger: Ledger, version: Version, limits: GateLimits) -> _Evidence | None:
    """The evaluation in the version's run, while that still has this content, else the kept one."""
    places = [version.source_run, version.kept]
    for run in [ledger.root.inside(place) for place in places if place is not None]:
        folder = evaluation_of(run, str(version.info["folder"]), version.info["content"])
        if folder is None:
            continue
        header, rows = read_predictions(folder / FILE_NAME)
        wanted = limits.set_name or MAIN_SET
        rows = [row for row in rows if row["set"] == wanted]
        if not rows:
            return None
        served = constrained_rows(rows) if header["constrained"] else rows
        trained_on = read_trained_on(ledger.root.inside(version.path))
        task = trained_on.task if trained_on else None
        return _Evidence(run, folder.name, served if limits.constrained else rows, served, task)
    return None


def _goals(version: Version, own: _Evidence) -> tuple[State, str, Mapping[str, Any]]:
    report = report_of(own.run, str(version.info["folder"]))
    if report is None:
        return "not_measured", "not measured: the run has no report of this model", {}
    goals = [dict(goal) for goal in report.get("goals") or () if goal["model"] == own.model]
    if not goals:
        return "not_measured", "not measured: the recipe has no goals for this model", {}
    facts = {"goals": goals}
    missed = [goal for goal in goals if not goal["met"]]
    if not missed:
        return "passed", f"{counted(len(goals), 'goal')} met", facts
    states = {goal["state"] for goal in missed}
    state: State = "not_measured" if "not_measured" in states else "undecided"
    text = f"{len(missed)} of {counted(len(goals), 'goal')} not met: {'; '.join(map(goal_text, missed))}"
    return ("failed" if "missed" in states else state), text, facts


def _comparison(
    ledger: Ledger,
    own: _Evidence,
    before: _Evidence | None,
    current: Deployment | None,
    version: Version,
    limits: GateLimits,
) -> tuple[State, str, Mapping[str, Any]]:
    if limits.against is not None:
        other = str(ledger.root.inside(limits.against))
    elif current is None:
        return "not_applicable", "nothing serves yet", {}
    elif current.version == version.number:
        return "not_applicable", "it serves already", {}
    elif before is None:
        return "not_measured", f"not measured: {current.serves} has no known answers to these rows", {}
    else:
        other = before.spec
    names = {"a": limits.against or (current.serves if current else ""), "b": version.name}
    try:
        result = compare(
            other,
            own.spec,
            names=[names["a"] or None, names["b"]],
            margin=limits.margin,
            metric=limits.metric,
            set_name=limits.set_name,
            constrained=limits.constrained,
            progress=NullProgress(),
        )
    except DistillError as error:
        return "not_measured", f"not measured: {error}", {}
    keys = ("id", "verdict", "difference", "margin", "margin_text", "metric", "sentence", "p_value")
    facts = {key: result.facts[key] for key in keys if key in result.facts}
    facts["comparison"] = add_comparison(ledger, result, *({"name": names[side]} for side in "ab"))
    verdict = result.verdict
    state: State = "passed" if verdict in PASSED else "failed" if verdict == "worse" else "undecided"
    return state, str(result.facts["sentence"]), facts


def _groups(
    own: _Evidence, before: _Evidence | None, limits: GateLimits
) -> tuple[State, str, Mapping[str, Any]]:
    task = own.task
    if task is None or not (task.group and task.label and task.positive):
        return "not_measured", "not measured: the task names no group with positive classes", {}
    options = {"cluster": task.cluster, "confidence": _CONFIDENCE}
    errors = group_errors(own.rows, task.label, task.positive, task.group, **options)  # type: ignore[arg-type]
    groups = {name: group for name, group in errors["groups"].items() if name != NO_GROUP}
    rates = {name: {r.name: group[r.name] for r in ERROR_RATES} for name, group in groups.items()}
    facts: dict[str, Any] = {"groups": rates, "few": {n: g["few"] for n, g in groups.items() if g["few"]}}
    if not groups:
        return "not_measured", "not measured: no row has a group", facts
    stated = {
        "false_positive_rate": limits.max_false_positive_rate,
        "false_negative_rate": limits.max_false_negative_rate,
    }
    if any(limit is not None for limit in stated.values()):
        return _group_limits(groups, stated, facts)
    if before is None:
        return "no_limit", f"{counted(len(groups), 'group')} measured, no limit stated", facts
    changes = compare_groups(before.rows, own.rows, task.label, task.positive, task.group, **options)  # type: ignore[arg-type]
    worse = [
        f"{words(rate_name)} of {group} {percent(change['before'])} before, {percent(change['after'])} now"
        for rate_name, by_group in changes.items()
        for group, change in by_group.items()
        if (change["adjusted_p"] or 1) < 1 - _CONFIDENCE and change["after"] > change["before"]
    ]
    facts["changes"] = changes
    if worse:
        return "failed", f"worse than what serves: {'; '.join(worse)}", facts
    if facts["few"]:
        return "undecided", f"few rows of {listed(list(facts['few']))}; no group shown to be worse", facts
    return "no_limit", f"no group of {len(groups)} shown to be worse than with what serves", facts


def _group_limits(
    groups: Mapping[str, Any], stated: Mapping[str, float | None], facts: Mapping[str, Any]
) -> tuple[State, str, Mapping[str, Any]]:
    states: dict[str, State] = {}
    for name, group in groups.items():
        for rate_name, limit in stated.items():
            if limit is None:
                continue
            measured = group[rate_name]
            goal = goal_state(measured, "at_most", limit)
            text = f"{words(rate_name)} of {name} {percent(measured['value'])} [{interval(measured)}]"
            states[text] = {"met": "passed", "missed": "failed"}.get(goal, goal)  # type: ignore[assignment]
    order: tuple[State, ...] = ("failed", "not_measured", "undecided", "passed")
    worst = next(state for state in order if state in states.values())
    shown = [text for text, state in states.items() if state == worst]
    asked = listed(
        [f"{words(name)} at most {percent(value)}" for name, value in stated.items() if value is not None]
    )
    return worst, f"{words(worst)}: {'; '.join(shown)}; asked for {asked} in each group", facts


def _invalid(own: _Evidence, limits: GateLimits) -> tuple[State, str, Mapping[str, Any]]:
    bad = sum(row["answer"] is None for row in own.served)
    share = rate(bad, len(own.served), _CONFIDENCE)
    limit = DEFAULT_INVALID if limits.max_invalid is None else limits.max_invalid
    state = _limit_state(share, limit)
    found = f"{bad} of {len(own.served)} answers do not fit the task ({interval(share)} %)"
    text = f"{found}, at most {percent(limit)}"
    return state, text, {"invalid": dict(share), "limit": limit}


def _latency(own: _Evidence, limits: GateLimits) -> tuple[State, str, Mapping[str, Any]]:
    p95 = latency_quantile(own.rows, 0.95, _CONFIDENCE)
    facts = {"p95_s": dict(p95), "limit": limits.max_p95_s}
    if p95["value"] is None:
        return "not_measured", "not measured: the answers have no times", facts
    text = f"95 % of the rows in {significant(p95['value'], 2)} s or less, when the run evaluated it"
    if limits.max_p95_s is None:
        return "no_limit", f"{text}; no limit stated", facts
    # The value, not the end of its interval: 20 rows and less leave the upper end open.
    state: State = "passed" if p95["value"] <= limits.max_p95_s else "failed"
    return state, f"{text}; at most {significant(limits.max_p95_s, 3)} s", facts


def _leaks(own: _Evidence) -> tuple[State, str, Mapping[str, Any]]:
    leaked = leaked_ids(own.rows, [own.run])
    if leaked is None:
        return "not_measured", "not measured: the training rows are not known", {}
    if leaked:
        some = listed(leaked[:5]) + (", ..." if len(leaked) > 5 else "")
        return (
            "failed",
            f"{counted(len(leaked), 'held-out row')} in the training rows: {some}",
            {"ids": leaked[:50]},
        )
    return "passed", f"none of {counted(len(own.rows), 'held-out row')} is a training row", {}


def _limit_state(measured: Mapping[str, Any], limit: float) -> State:
    states: Mapping[str, State] = {"met": "passed", "missed": "failed", "undecided": "undecided"}
    return states.get(goal_state(measured, "at_most", limit), "not_measured")
