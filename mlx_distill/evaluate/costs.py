"""What a call, a million tokens and a training cost, when that is paid back, and what errors cost.

Prices come from a YAML file of the user; nothing here knows a price. See docs/costs.md.
"""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_distill.config import from_mapping, option, read_yaml
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.row_metrics import row_clusters
from mlx_distill.metrics.classification import Row, predicted_label, true_value
from mlx_distill.metrics.intervals import Estimate
from mlx_distill.metrics.paired import compare_means
from mlx_distill.tasks.task import Task

_SECONDS_AN_HOUR = 3600.0
_JOULES_A_KWH = 3.6e6
_DAYS_A_YEAR = 365.25
_TEACHER = ("data", "teacher_base", "teacher")
_STUDENT = (*_TEACHER, "targets", "student_base", "student")
NEEDS: Mapping[str, Sequence[str]] = {
    "teacher": _TEACHER,
    "student": _STUDENT,
    "quantized": (*_STUDENT, "quantized"),
}
"""The stages whose work a run's model comes from. Evaluations and controls are not among them: without them
the model would be the same.
"""


@dataclass(frozen=True)
class HardwarePrice:
    """The machine that trains and answers."""

    price: float = option(help="what it cost", low=0.0)
    watts: float = option(help="what it draws while it works, in watts", low=0.0)
    electricity: float = option(help="price of a kilowatt-hour", low=0.0)
    lifetime_years: float = option(4.0, "years over which its price is spread", low=0.1)
    hours_per_day: float = option(24.0, "hours a day in which it works", low=0.1, high=24.0)
    name: str = option("", "what it is called")

    @property
    def a_second(self) -> tuple[float, float]:
        """Electricity and wear of one second of work."""
        hours = self.lifetime_years * _DAYS_A_YEAR * self.hours_per_day
        return self.watts * self.electricity / _JOULES_A_KWH, self.price / (hours * _SECONDS_AN_HOUR)


@dataclass(frozen=True)
class ReplacedSystem:
    """A system that the model may replace: an API by its tokens, or anything with a price a call."""

    name: str = option(help="what it is called")
    input: float | None = option(None, "price of a million tokens of prompts", low=0.0)
    output: float | None = option(None, "price of a million tokens of answers", low=0.0)
    a_call: float | None = option(None, "price of a call, where it is not counted by tokens", low=0.0)


@dataclass(frozen=True)
class ErrorPrice:
    """What an error costs whoever acts on the answer."""

    false_positive: float = option(0.0, "of a false positive", low=0.0)
    false_negative: float = option(0.0, "of a false negative", low=0.0)


@dataclass(frozen=True)
class Prices:
    """The content of a file of prices."""

    date: str = option(help="when the prices were looked up, as YYYY-MM-DD")
    currency: str = option(help="of all prices, such as EUR")
    hardware: HardwarePrice | None = option(None, "the machine that trains and answers")
    replaces: list[ReplacedSystem] = option([], "systems that the model may replace")
    label_a_row: float = option(0.0, "labelling of one row by people", low=0.0)
    spent: float = option(0.0, "what was paid once besides, such as an API's answers to train on", low=0.0)
    errors: ErrorPrice = option(ErrorPrice, "what errors cost")
    calls: int = option(0, "calls over which errors are valued, such as those of a month; 0: of one", low=0)


def read_prices(path: str | Path) -> Prices:
    """Read a file of prices.

    Raises:
        ConfigError: an unknown or missing key, a price below 0, a date that is none, a system with neither a
            price a call nor prices of tokens, or two of one name.
    """
    raw = read_yaml(path)
    if isinstance(raw.get("date"), datetime.date):  # YAML reads 2026-11-27 as a date
        raw = {**raw, "date": raw["date"].isoformat()}
    prices = from_mapping(Prices, raw, str(path))
    try:
        datetime.date.fromisoformat(prices.date)
    except ValueError:
        raise ConfigError(
            f"{path}: date: {prices.date!r} is no date", fix="write the day of the prices: 2026-11-27"
        ) from None
    names = [system.name for system in prices.replaces]
    for number, system in enumerate(prices.replaces):
        where = f"{path}: replaces[{number}]"
        if (system.a_call is None) == (system.input is None or system.output is None):
            raise ConfigError(
                f"{where}: {system.name!r} needs a price a call, or prices of input and output tokens",
                fix="give a_call; or input and output, each for a million tokens",
            )
        if names.count(system.name) > 1:
            raise ConfigError(f"{where}: {system.name!r} occurs twice", fix="give each a name of its own")
    return prices


def call_cost(seconds: float, hardware: HardwarePrice) -> dict[str, float]:
    """What a call costs on one's own machine: ``watts s / 3.6e6 electricity + price s / lifetime``.

    Args:
        seconds: How long the machine works for it.
        hardware: Its prices.

    Returns:
        ``electricity``, ``hardware`` (its wear) and ``total``, in the currency of the prices.

    >>> costs = call_cost(2.0, HardwarePrice(price=3500, watts=60, electricity=0.35))
    >>> {name: round(1e6 * value, 2) for name, value in costs.items()}  # in millionths
    {'electricity': 11.67, 'hardware': 55.45, 'total': 67.12}
    """
    electricity, wear = (seconds * price for price in hardware.a_second)
    return {"electricity": electricity, "hardware": wear, "total": electricity + wear}


def break_even(fixed: float, local_call: float, replaced_call: float) -> float | None:
    """Calls after which the fixed costs are paid back: ``fixed / (replaced - local)``; None for never.

    >>> break_even(120.0, 0.001, 0.004), break_even(120.0, 0.004, 0.004)
    (40000.0, None)
    """
    saved = replaced_call - local_call
    return fixed / saved if saved > 0 else None


def model_costs(figures: Mapping[str, Any], hardware: HardwarePrice) -> dict[str, Any] | None:
    """What a model's call and a million of its tokens cost; None where its speed was not measured.

    Args:
        figures: ``items_per_minute`` (or ``latency_s``, the seconds a call), ``tokens`` and
            ``prompt_tokens``, the mean of a call.
        hardware: The machine's prices.
    """
    rate = figures.get("items_per_minute")
    seconds = 60 / rate if rate else figures.get("latency_s")
    if not seconds:
        return None
    costs = call_cost(seconds, hardware)
    known = [figures.get(name) for name in ("prompt_tokens", "tokens")]
    tokens = None if None in known else sum(n for n in known if n is not None)
    return {
        "seconds": seconds,
        **costs,
        "million_tokens": 1e6 * costs["total"] / tokens if tokens else None,
        "kwh": seconds * hardware.watts / _JOULES_A_KWH,
    }


def replaced_cost(system: ReplacedSystem, figures: Mapping[str, Any]) -> float | None:
    """What a call of the replaced system costs, by the tokens of ours; None where these are not known.

    An API has its own tokenizer, so its count differs from ours by some tenths.
    """
    if system.a_call is not None:
        return system.a_call
    prompt, answer = figures.get("prompt_tokens"), figures.get("tokens")
    if prompt is None or answer is None or system.input is None or system.output is None:
        return None
    return (prompt * system.input + answer * system.output) / 1e6


def stage_seconds(training: Mapping[str, Any] | None, recorded: float | None) -> float | None:
    """The seconds that the machine worked for a stage: those of all parts of its training, also before an
    interruption; else what its manifest says.

    >>> stage_seconds({"seconds": 60.0}, 40.0), stage_seconds(None, 7.5), stage_seconds({}, None)
    (60.0, 7.5, None)
    """
    return (training or {}).get("seconds") or recorded


def costs_of(
    prices: Prices,
    models: Mapping[str, Mapping[str, Any]],
    *,
    stages: Mapping[str, float] | None = None,
    needs: Mapping[str, Sequence[str]] | None = None,
    labelled_rows: int = 0,
) -> dict[str, Any]:
    """The costs of models beside those of the systems that they may replace.

    Args:
        prices: What :func:`read_prices` returns.
        models: Figures of each model: see :func:`model_costs`.
        stages: Seconds of work of each stage, by name; see :func:`stage_seconds`.
        needs: The stages that each model comes from; of a model that is not in it, nothing is paid back.
        labelled_rows: Rows that people labelled.

    Returns:
        ``models`` (each with ``call``, see :func:`model_costs`; ``replaced``: the price of their call by
        name; ``fixed``: what it cost once; ``break_even``: calls by name, None for never), ``stages``,
        ``fixed`` (of all, with its parts), and the prices.
    """
    hardware = prices.hardware
    worked = {name: call_cost(s, hardware) for name, s in (stages or {}).items()} if hardware else {}
    parts = {
        "work": sum(cost["total"] for cost in worked.values()),
        "labelling": labelled_rows * prices.label_a_row,
        "spent": prices.spent,
    }
    out: dict[str, Any] = {}
    for name, figures in models.items():
        own = model_costs(figures, hardware) if hardware else None
        replaced = {system.name: replaced_cost(system, figures) for system in prices.replaces}
        needed = (needs or {}).get(name)
        fixed = None
        if needed is not None:
            made = sum(worked[one]["total"] for one in needed if one in worked)
            fixed = made + parts["labelling"] + parts["spent"]
        known = {key: cost for key, cost in replaced.items() if own and cost is not None}
        out[name] = {
            "call": own,
            "replaced": replaced,
            "fixed": fixed,
            "break_even": {
                key: break_even(fixed, own["total"], cost)
                for key, cost in known.items()
                if own and fixed is not None
            },
        }
    return {
        "date": prices.date,
        "currency": prices.currency,
        "hardware": asdict(hardware) if hardware else None,
        "models": out,
        "stages": {name: {"seconds": (stages or {})[name], **cost} for name, cost in worked.items()},
        "labelled_rows": labelled_rows,
        "fixed": {"total": sum(parts.values()), **parts},
    }


def run_costs(
    prices: Prices,
    report: Mapping[str, Any],
    rows: Mapping[str, Sequence[Row]],
    task: Task,
    pair: tuple[str, str] | None,
) -> dict[str, Any]:
    """The costs of a run's models, see :func:`costs_of`; and under ``errors`` what the errors of the final
    model cost more than those of the one that it replaces.

    Args:
        prices: What :func:`read_prices` returns.
        report: With ``metrics``, ``training`` and ``provenance`` (seconds of each stage), ``data`` and
            ``confidence``.
        rows: Predictions of each model on the rows of the report's main set.
        task: See :func:`error_cost`.
        pair: The model that is replaced, and the final one; None where only one was measured.
    """
    figures = {
        name: {
            **report["metrics"][name],
            **{key: _mean(own, key) for key in ("prompt_tokens", "tokens")},
        }
        for name, own in rows.items()
    }
    labelled = sum(((report["data"] or {}).get("rows") or {}).values())
    stages = _worked(report["training"], report["provenance"]["stages"])
    costs = costs_of(prices, figures, stages=stages, needs=NEEDS, labelled_rows=labelled)
    costs["errors"] = None
    if pair is not None:
        a, b = (rows[name] for name in pair)
        clusters = row_clusters(a, task)
        costs["errors"] = error_cost(a, b, task, prices, clusters=clusters, confidence=report["confidence"])
        costs["pair"] = list(pair)
    return costs


def _worked(
    trainings: Mapping[str, Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Seconds of the stages that made the models, and of the controls."""
    recorded = {
        stage["folder"]: stage["seconds"]
        for stage in stages
        if stage["folder"] in NEEDS["quantized"] or stage["folder"] in trainings
    }
    seconds = {
        name: stage_seconds(trainings.get(name), recorded.get(name)) for name in {**recorded, **trainings}
    }
    return {name: value for name, value in seconds.items() if value}


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key)]
    return sum(values) / len(values) if values else None


def error_cost(
    a: Sequence[Row],
    b: Sequence[Row],
    task: Task,
    prices: Prices,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """What B's errors cost more than A's on the same rows: the paired difference of the errors' prices.

    Each row costs ``false_positive`` or ``false_negative`` where the answer is such an error, else 0; an
    invalid answer is the error that its row's truth allows. The mean of B minus A has the paired interval of
    :func:`mlx_distill.metrics.paired.compare_means`, and is given for ``calls`` calls.

    Args:
        a, b: Predictions on the same rows, in the same order; rows without a true label are left out.
        task: Names the label and its positive classes.
        prices: With ``errors`` and ``calls``.
        clusters: The cluster of each row.
        confidence: Level of the interval.

    Returns:
        ``difference`` (for ``calls`` calls; negative: B saves), ``a`` and ``b`` (means of a call), ``calls``;
        None where no error has a price.

    Raises:
        ConfigError: errors have a price, and the task has no positive classes.
    """
    if not (prices.errors.false_positive or prices.errors.false_negative):
        return None
    if not (task.label and task.positive):
        raise ConfigError(
            f"the task {task.name!r} has no positive classes, so no errors of the two kinds",
            fix="name them in the task: positive: [CLASS]",
        )
    kept = [i for i, row in enumerate(a) if true_value(row, task.label) is not None]
    if not kept:
        return None
    values = [[_row_cost(rows[i], task, prices.errors) for i in kept] for rows in (a, b)]
    groups = None if clusters is None else [clusters[i] for i in kept]
    result = compare_means(values[1], values[0], clusters=groups, confidence=confidence)
    calls = prices.calls or 1
    return {
        "calls": calls,
        "a": sum(values[0]) / len(kept),
        "b": sum(values[1]) / len(kept),
        "difference": _scaled(result["difference"], calls),
        "currency": prices.currency,
    }


def _row_cost(row: Row, task: Task, errors: ErrorPrice) -> float:
    truth = true_value(row, task.label or "") in task.positive
    answer = predicted_label(row)
    said = answer in task.positive if answer is not None else not truth
    if said == truth:
        return 0.0
    return errors.false_positive if said else errors.false_negative


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    return {
        "value": times(estimate["value"]),
        "low": times(estimate["low"]),
        "high": times(estimate["high"]),
        "n": estimate["n"],
    }
