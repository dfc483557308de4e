"""Compare two models on the same rows: which is better, by how much, how sure that is, and on which rows.

The difference is always B minus A. Nothing here imports mlx, except where a model has to answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.cases import change_counts, change_of, ids_by_change, label_agreement, make_case
from mlx_distill.evaluate.categories import parse_categories
from mlx_distill.evaluate.comparison_inputs import Paired, Reference, Side, pair_sides
from mlx_distill.evaluate.comparison_text import advice, sentence, text_lines, token_lines
from mlx_distill.evaluate.held_out import count_look, leaked_ids
from mlx_distill.evaluate.people_text import people_lines
from mlx_distill.evaluate.row_metrics import RowMetric, find_metric, row_clusters, row_metrics, values_of
from mlx_distill.metrics import present_fields
from mlx_distill.metrics.agreement import MIN_PROBABILITY
from mlx_distill.metrics.calibration import calibration_error, class_numbers
from mlx_distill.metrics.classification import MIN_ITEMS, confusion, group_by, latency, true_value
from mlx_distill.metrics.clusters import clustered_mean, share_estimate
from mlx_distill.metrics.intervals import Estimate, clip_ends, normal_quantile, rate
from mlx_distill.metrics.paired import compare_means, compare_paired, relative_margin, verdict
from mlx_distill.metrics.power import provable_margin, rows_needed
from mlx_distill.run_models import RUN_MODELS, model_phrase, model_title
from mlx_distill.storage import digest
from mlx_distill.tasks.task import Task

FORMAT = 1
PASSED = ("better", "non_inferior")
"""The verdicts with which a gate opens."""
_MARGIN = re.compile(r"(\d+(?:\.\d+)?)\s*(pts?|%)")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Margin:
    """How much worse B may be and still count as good as A.

    Attributes:
        text: As it was given: ``3pt`` or ``5%``.
        number: The number in it.
        relative: Whether it is a share of A's value; else it is in points.
    """

    text: str
    number: float
    relative: bool

    def value(self, metric: RowMetric, a_value: float | None) -> float:
        """The margin in units of a metric.

        Raises:
            DataError: a share of a value of 0.
        """
        return relative_margin(self.number / 100, a_value) if self.relative else self.number * metric.point


def parse_margin(text: str) -> Margin:
    """A margin from ``3pt`` (percentage points of a rate, points of a score) or ``5%`` (a share of A's
    value).

    Raises:
        ConfigError: it is neither, or not above 0.

    >>> parse_margin("3pt")
    Margin(text='3pt', number=3.0, relative=False)
    """
    match = _MARGIN.fullmatch(str(text).strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(
            f"margin {text}: neither points nor a share above 0",
            fix="write 3pt for 3 points, or 5% for a share of A's value",
        )
    return Margin(str(text).strip(), float(match[1]), match[2] == "%")


@dataclass(frozen=True)
class ModelComparison:
    """The result of :func:`compare`.

    Attributes:
        facts: Everything that was measured, as plain JSON values: what ``--json`` prints.
        cases: Each row with the truth, both answers and the change.
        task: The task that was measured.
        tokens: Of chosen rows, the probability that both models give to each piece of A's answer.
    """

    facts: Mapping[str, Any] = field(repr=False)
    cases: Sequence[Mapping[str, Any]] = field(repr=False)
    task: Task = field(repr=False)
    tokens: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """``better``, ``non_inferior``, ``worse`` or ``inconclusive``."""
        return str(self.facts["verdict"])

    @property
    def difference(self) -> Estimate:
        """B minus A with its paired interval."""
        return self.facts["difference"]

    @property
    def passed(self) -> bool:
        """Whether a gate opens: B is better, or not worse by more than the margin, on rows that neither model
        was trained on.
        """
        return self.verdict in PASSED and not self.facts["leaked"]

    def to_dict(self) -> dict[str, Any]:
        """The facts, without texts of rows; and the tokens of rows, where they were asked for."""
        return {**self.facts, "tokens": list(self.tokens)} if self.tokens else dict(self.facts)

    def lines(self) -> list[str]:
        """The result for the terminal."""
        return [*text_lines(self.facts), *people_lines(self.facts), *token_lines(self.tokens)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def compare_sides(
    a: Side,
    b: Side,
    *,
    task: Task | None = None,
    reference: Reference | None = None,
    metric: str | None = None,
    margin: Margin | None = None,
    set_name: str | None = None,
    confidence: float = 0.95,
) -> ModelComparison:
    """Compare two sides that have been read; see :func:`mlx_distill.comparisons.compare`."""
    paired = pair_sides(a, b, reference, set_name)
    task = task or a.task or b.task
    if task is None:
        raise ConfigError("the task of the answers is not known", fix="name it: --task TASK")
    chosen = find_metric(task, metric)
    _check_labels_alone(paired, chosen, task)
    clusters = row_clusters(paired.a, task)
    main = _measure(chosen, paired, clusters, confidence)
    if main is None:
        raise DataError(
            f"{a.source}: no row has a true answer for {chosen.title}",
            fix="give rows with true answers: --rows",
        )
    chosen = main["metric"]
    limit = margin.value(chosen, main["a"]["value"]) if margin else None
    changes = [change_of(x, y, chosen) for x, y in zip(main["values_a"], main["values_b"], strict=True)]
    rows = zip(paired.a, paired.b, changes, strict=True)
    categories = parse_categories(task)
    cases = [make_case(x, y, change, task, categories) for x, y, change in rows]
    names = _names(a, b)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "id": digest([a.sha, b.sha, paired.dataset_sha, chosen.name, margin and margin.text])[:16],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": task.name,
        "a": _side_facts(a, names[0], paired.a, main["a"], confidence),
        "b": _side_facts(b, names[1], paired.b, main["b"], confidence),
        "unit": "row" if clusters is None else "cluster",
        "cluster_key": task.cluster if clusters is not None else None,
        "without_truth": len(paired.a) - main["n"],
        "confidence": confidence,
        "margin": limit,
        "margin_text": margin.text if margin else None,
        **_result(main, chosen, limit),
        **_power(main, chosen, _scale(chosen, task, main), limit, confidence),
        "counts": change_counts(changes, chosen),
        "agreement": label_agreement(paired.a, paired.b, task, confidence),
        "score": _score_moves(paired, task),
        "metrics": _all_metrics(paired, task, chosen, clusters, confidence),
        "slices": _slices(paired, task, chosen, clusters, confidence),
        "confusions": _confusions(paired, task),
        "calibration": _calibration(paired, task),
        "notes": _row_notes(paired, task, clusters),
        "cases": ids_by_change({case["id"]: case["change"] for case in cases}),
    }
    facts |= _circumstances(a, b, paired)
    return ModelComparison(_concluded(facts), cases, task)


def _concluded(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with the sentence and the advice that follow from them."""
    if facts["a"]["json_valid"]["value"] == 0:
        facts["verdict"] = "inconclusive"  # to be as good as a model that answers nothing shows nothing
    return {**facts, "sentence": sentence(facts), "advice": advice(facts)}


def _circumstances(a: Side, b: Side, paired: Paired) -> dict[str, Any]:
    """Which rows these are, what was done with them before, and how they were answered."""
    runs = [side.run for side in (a, b) if side.run is not None]
    return {
        "dataset_sha": paired.dataset_sha,
        "split": paired.split,
        "repeats": 1,
        "serving": _common(a.settings, b.settings),
        "variables": list(paired.variables),
        "leaked": leaked_ids(paired.a, runs),
        "looked": count_look(runs, paired.dataset_sha, digest([a.sha, b.sha])[:16]),
    }


def _result(main: Mapping[str, Any], metric: RowMetric, margin: float | None) -> dict[str, Any]:
    """Counts, difference and verdict; ``first`` is A, which the test had second."""
    result, n = main["comparison"], main["n"]
    return {
        "metric": metric.name,
        "metric_title": metric.title,
        "metric_unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "n": n,
        "both": result["both"],
        "first_only": result["second_only"],
        "second_only": result["first_only"],
        "neither": result["neither"],
        "churn": (result["first_only"] + result["second_only"]) / n,
        "difference": main["difference"],
        "p": result["p_value"],
        "method": result["method"],
        "clusters": result["clusters"],
        "few_clusters": result["few_clusters"],
        "verdict": verdict(gain(main["difference"], metric.higher_is_better), margin),
    }


def _scale(metric: RowMetric, task: Task, main: Mapping[str, Any]) -> float:
    """The largest difference that two values of a metric can have, or at least have here."""
    if metric.unit == "rate":
        return 1.0
    low, high = task.score_scale
    values = [value for side in "ab" for value in main[f"values_{side}"] if value is not None]
    return max(high - low, max(values) - min(values))


def _names(a: Side, b: Side) -> list[dict[str, str]]:
    """The names of the sides in tables and inside a sentence; where they are the same, with the source."""
    suffixes = ["", ""] if a.name != b.name else [f" ({a.source})", f" ({b.source})"]
    if a.name == b.name and a.source == b.source:
        suffixes = [" (A)", " (B)"]
    known = [side.name in RUN_MODELS for side in (a, b)]
    return [
        {
            "name": (model_title(side.name) if is_known else side.name) + suffix,
            "phrase": (model_phrase(side.name) if is_known else side.name) + suffix,
        }
        for side, suffix, is_known in zip((a, b), suffixes, known, strict=True)
    ]


def _check_labels_alone(paired: Paired, metric: RowMetric, task: Task) -> None:
    """Refuse a metric over fields that an answer does not have, since only its label was scored."""
    if metric.name != "accuracy" and any(row.get("label_alone") for row in (*paired.a, *paired.b)):
        raise ConfigError(
            f"--metric {metric.name}: a file has labels alone, without answers",
            fix="leave --metric out, or let the model answer: mlx-distill analyze without --labels-only",
        )


def _row_notes(paired: Paired, task: Task, clusters: Sequence[Any] | None) -> list[str]:
    """What a reader has to know of the rows, as sentences."""
    if task.cluster and clusters is None:
        return [f"no row has the field {task.cluster!r}: rows are counted as independent"]
    return []


def _measure(
    metric: RowMetric, paired: Paired, clusters: Sequence[Any] | None, confidence: float
) -> dict[str, Any] | None:
    """A metric of both sides and its paired comparison; None where no row has a true answer for it."""
    first, second = values_of(metric, paired.a), values_of(metric, paired.b)
    kept = [i for i, (x, y) in enumerate(zip(first, second, strict=True)) if x is not None and y is not None]
    if not kept:
        return None
    x: list[Any] = [first[i] for i in kept]
    y: list[Any] = [second[i] for i in kept]
    groups = None if clusters is None else [clusters[i] for i in kept]
    if all(isinstance(value, bool) for value in (*x, *y)):
        metric = replace(metric, binary=True)
    test = compare_paired if metric.binary else compare_means
    result = test(y, x, clusters=groups, confidence=confidence)
    return {
        "metric": metric,
        "n": len(kept),
        "a": _estimate(x, metric, groups, confidence),
        "b": _estimate(y, metric, groups, confidence),
        "difference": dict(result["difference"]),
        "comparison": result,
        "values_a": first,
        "values_b": second,
        "squares": float(np.mean((np.asarray(y, dtype=float) - np.asarray(x, dtype=float)) ** 2)),
    }


def _estimate(
    values: Sequence[Any], metric: RowMetric, clusters: Sequence[Any] | None, confidence: float
) -> Estimate:
    """A side's own value: Wilson's interval of a rate, else that of a mean; both over clusters, if any."""
    if metric.binary:
        return _plain(share_estimate([bool(value) for value in values], clusters, confidence))
    spread, top = (1.0, 1.0) if metric.unit == "rate" else (None, math.inf)
    own = clustered_mean(
        [float(v) for v in values], clusters or range(len(values)), confidence, spread=spread
    )
    return _plain(clip_ends(own, (0.0, top)))


def _plain(estimate: Estimate) -> Estimate:
    """Without the number of clusters, which a comparison states once."""
    return {"value": estimate["value"], "low": estimate["low"], "high": estimate["high"], "n": estimate["n"]}


def gain(difference: Mapping[str, Any], higher_is_better: bool) -> Estimate:
    """A difference with the sign by which more is better."""
    if higher_is_better:
        return dict(difference)  # type: ignore[return-value]
    value, low, high = (None if difference[k] is None else -difference[k] for k in ("value", "high", "low"))
    return {"value": value, "low": low, "high": high, "n": difference["n"]}


def _power(
    main: Mapping[str, Any], metric: RowMetric, scale: float, margin: float | None, confidence: float
) -> dict[str, Any]:
    """What these rows can show, and how many would be needed; ``scale`` is the range of the metric."""
    n, result, difference = main["n"], main["comparison"], main["difference"]
    measured = (gain(difference, metric.higher_is_better)["value"] or 0.0) / scale
    discordance = main["squares"] / scale**2
    if result["clusters"] is not None and difference["low"] is not None:
        # Of independent rows with the same standard error.
        half = (difference["high"] - difference["low"]) / (2 * scale)
        discordance = n * (half / normal_quantile(confidence)) ** 2
    discordance = min(1.0, max(discordance, 2 / (n + 2), measured**2, abs(measured)))
    out: dict[str, Any] = {
        "discordance": discordance,
        "provable_margin": scale * provable_margin(discordance, n, confidence=confidence),
        "planned_n": None,
        "rows_needed": None,
    }
    if margin is not None:
        limit = margin / scale
        out["planned_n"] = rows_needed(discordance, margin=limit, confidence=confidence)
        if limit + measured > 0:  # if the true difference is the measured one
            out["rows_needed"] = rows_needed(
                discordance, margin=limit, difference=min(measured, 0.0), confidence=confidence
            )
    elif measured:
        out["rows_needed"] = rows_needed(discordance, difference=measured, confidence=confidence)
    return out


def _side_facts(
    side: Side, names: Mapping[str, str], rows: Sequence[Row], value: Estimate, confidence: float
) -> dict[str, Any]:
    valid = sum(row.get("answer") is not None for row in rows)
    return {
        **names,
        "kind": side.kind,
        "source": side.source,
        "version": side.version,
        "sha": side.sha,
        "value": value,
        "json_valid": rate(valid, len(rows), confidence),
        "serving": dict(side.settings),
        "size_bytes": side.size_bytes,
        "peak_memory_bytes": side.peak_memory_bytes,
        **latency(rows),
        "tokens": _mean_of(rows, "tokens"),
        "prompt_tokens": _mean_of(rows, "prompt_tokens"),
    }


def _mean_of(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key)]
    return sum(values) / len(values) if values else None


def _calibration(paired: Paired, task: Task) -> dict[str, dict[str, float]] | None:
    """How well the label probabilities of both sides fit the truth (``nll``, ``ece``, ``brier``), on the rows
    on which both have them; None where there are none.
    """
    pairs = [
        (x["label_probs"], y["label_probs"], true_value(x, task.label))
        for x, y in zip(paired.a, paired.b, strict=True)
        if task.label and x.get("label_probs") and y.get("label_probs")
    ]
    pairs = [pair for pair in pairs if pair[2] in task.labels]
    if not pairs:
        return None
    truth = class_numbers([label for _, _, label in pairs], task.labels)
    out: dict[str, dict[str, float]] = {}
    for i, side in enumerate("ab"):
        table = [[float(pair[i].get(name, 0.0)) for name in task.labels] for pair in pairs]
        log_probs = np.log(np.maximum(np.array(table), MIN_PROBABILITY))
        out[side] = {"n": len(pairs), **asdict(calibration_error(log_probs, truth))}
    return out


def _common(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """How both sides answered; None where that differs or is not known."""
    return {
        name: first.get(key) if first.get(key) == second.get(key) else None
        for name, key in (
            ("constrained", "constrained"),
            ("batch", "batch_size"),
            ("temperature", "temperature"),
        )
    }


def _score_moves(paired: Paired, task: Task) -> dict[str, Any] | None:
    """On how many rows B's score is nearer to the true one than A's, and on how many it is farther."""
    metric = row_metrics(task).get("score_error")
    if metric is None:
        return None
    pairs = zip(values_of(metric, paired.a), values_of(metric, paired.b), strict=True)
    moves = [move for x, y in pairs if (move := change_of(x, y, metric)) is not None]
    if not moves:
        return None
    n = len(moves)
    counts = {name: moves.count(name) for name in ("improved", "worsened")}
    return {"n": n, **counts, **{f"share_{name}": count / n for name, count in counts.items()}}


def _all_metrics(
    paired: Paired, task: Task, main: RowMetric, clusters: Sequence[Any] | None, confidence: float
) -> list[dict[str, Any]]:
    """Every metric with a value a row, the main one first."""
    if any(row.get("label_alone") for row in (*paired.a, *paired.b)):
        metrics = [main]
    else:
        metrics = sorted(row_metrics(task).values(), key=lambda metric: metric.name != main.name)
    out = []
    for metric in metrics:
        measured = _measure(metric, paired, clusters, confidence)
        if measured is not None:
            out.append(
                {
                    "metric": metric.name,
                    "title": metric.title,
                    "unit": metric.unit,
                    "higher_is_better": metric.higher_is_better,
                    **{key: measured[key] for key in ("n", "a", "b", "difference")},
                    "p": measured["comparison"]["p_value"],
                }
            )
    return out


def _slices(
    paired: Paired, task: Task, metric: RowMetric, clusters: Sequence[Any] | None, confidence: float
) -> dict[str, list[dict[str, Any]]]:
    """The main metric for each value of each slice field, the largest first; ``few`` below 30 rows."""
    positions = {row["id"]: i for i, row in enumerate(paired.a)}
    out: dict[str, list[dict[str, Any]]] = {}
    for name in present_fields(paired.a, task.slices):
        entries = []
        for value, members in group_by(paired.a, name).items():
            index = [positions[row["id"]] for row in members]
            part = Paired([paired.a[i] for i in index], [paired.b[i] for i in index], "", "", ())
            groups = None if clusters is None else [clusters[i] for i in index]
            measured = _measure(metric, part, groups, confidence)
            if measured is not None:
                few = measured["n"] < MIN_ITEMS
                kept = {key: measured[key] for key in ("n", "a", "b", "difference")}
                changed = [measured["comparison"][key] for key in ("first_only", "second_only")]
                fixed, broken = changed if metric.higher_is_better else changed[::-1]
                entries.append(
                    {
                        "value": value,
                        **kept,
                        "fixed": fixed,
                        "broken": broken,
                        "few": few,
                    }
                )
        if len(entries) > 1:  # one value says nothing that the whole does not
            out[name] = sorted(entries, key=lambda entry: (-entry["n"], entry["value"]))
    return out


def _confusions(paired: Paired, task: Task) -> dict[str, Any] | None:
    """The confusion matrices of both sides; None for a task without a label."""
    if not task.label:
        return None
    first, second = (confusion(rows, task.label, task.labels) for rows in (paired.a, paired.b))
    if not first["n"]:
        return None
    return {"a": first, "b": second}
