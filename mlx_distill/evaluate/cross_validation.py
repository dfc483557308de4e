"""What a cross-validation says: the answers of all folds pooled, models compared on them, the learning curve.

Each row is a test row of exactly one fold, so the pooled answers are one answer to each row by a model that
has not seen it. Intervals and tests are those of the pooled rows; the standard deviation over folds, divided
by the root of their number, is no standard error, since any two folds share most of their training rows
(Bengio and Grandvalet 2004, https://www.jmlr.org/papers/v5/grandvalet04a.html).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.data.dedup import hash64, words
from mlx_distill.errors import DataError
from mlx_distill.metrics.answers import similarity
from mlx_distill.metrics.classification import Row, predicted_label, true_value
from mlx_distill.metrics.clusters import share_estimate
from mlx_distill.metrics.cross_validation import nadeau_bengio
from mlx_distill.metrics.paired import Comparison, compare_means, compare_paired, verdict
from mlx_distill.run_models import model_phrase
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task

_FIX = "remove the folder of this fold, and run the same command again"


def check_fold(data: Path, task: Task) -> None:
    """Check that no test row of a fold is among the rows that it trains or validates on.

    Compared are, in the written files, the hash of the normalised text that the model is asked, the id, and
    the value of the task's ``cluster`` field.

    Args:
        data: The fold's prepared rows: ``train.jsonl``, ``valid.jsonl``, ``test.jsonl``.
        task: Names the field.

    Raises:
        DataError: a row in common, with its id.
    """
    seen = {mark for split in ("train", "valid") for _, marks in _marks(data, split, task) for mark in marks}
    for id, marks in _marks(data, "test", task):
        if common := [mark for mark in marks if mark in seen]:
            kind, value = common[0]
            raise DataError(
                f"{data}: the test row {id!r} has the {kind} of a training row ({value})", fix=_FIX
            )


def check_partition(folds: Iterable[Path], task: Task) -> int:
    """Check that every row is a test row of one fold; return the number of rows.

    Args:
        folds: The prepared rows of each fold.
        task: Of the rows.

    Raises:
        DataError: a row that is tested twice, or folds over different rows.
    """
    tested: dict[str, Path] = {}
    everything: set[str] = set()
    for data in folds:
        ids = {split: [id for id, _ in _marks(data, split, task)] for split in ("train", "valid", "test")}
        for id in ids["test"]:
            if id in tested:
                raise DataError(f"{data}: the row {id!r} is a test row of {tested[id]} too", fix=_FIX)
            tested[id] = data
        rows = {id for split in ids.values() for id in split}
        if everything and rows != everything:
            differing = sorted(rows ^ everything)[0]
            raise DataError(
                f"{data}: other rows than those of the first fold, such as {differing!r}", fix=_FIX
            )
        everything = rows
    if missing := sorted(everything - tested.keys()):
        raise DataError(f"{len(missing)} rows are tested in no fold, the first is {missing[0]!r}", fix=_FIX)
    return len(tested)


def _marks(data: Path, split: str, task: Task) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Of each row of a split its id, and what no row of another split may have too."""
    for _, row in read_jsonl(data / f"{split}.jsonl"):
        asked = "\n".join(turn["content"] for turn in row["messages"] if turn["role"] in ("user", "tool"))
        marks = [("id", row["id"]), ("text", hash64(" ".join(words(asked, punctuation=True))))]
        name = row["fields"].get(task.cluster) if task.cluster else None
        yield row["id"], marks + ([(str(task.cluster), str(name))] if name not in (None, "") else [])


def pooled_figures(
    models: Mapping[str, Sequence[Row]],
    task: Task,
    train_rows: Sequence[int],
    *,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The figure of each model over the pooled rows, its folds, and every two models compared.

    Args:
        models: Model name to its predictions, each with the number of its ``fold``; all on the same rows.
        task: Its label's accuracy is the figure, or without a label the similarity of answers.
        train_rows: The number of training rows of each fold.
        confidence: Level of the intervals.

    Returns:
        ``figures``: model to ``estimate`` (with the number of ``clusters`` where the task has a ``cluster``)
        and ``folds`` (of each ``fold`` its estimate); ``comparisons``: of every two models
        ``a`` and ``b`` the ``pooled`` comparison (b minus a) with its ``verdict``, and the interval over
        folds as ``corrected``.

    Raises:
        DataError: models that answered different rows.
    """
    check_same_rows(models)
    scored = {name: _scored(rows, task) for name, rows in models.items()}
    figures = {
        name: {
            "estimate": _estimate(rows, task, confidence),
            "folds": [
                {"fold": fold, **_estimate([r for r in rows if r["fold"] == fold], None, confidence)}
                for fold in range(1, len(train_rows) + 1)
            ],
        }
        for name, rows in scored.items()
    }
    comparisons = [
        {
            "a": a,
            "b": b,
            **_compare(scored[a], scored[b], figures[a], figures[b], task, train_rows, confidence),
        }
        for a, b in combinations(scored, 2)
    ]
    return {"figures": figures, "comparisons": comparisons}


def check_same_rows(models: Mapping[str, Sequence[Row]]) -> None:
    """Refuse predictions of models on different rows."""
    named = {name: {row["id"] for row in rows} for name, rows in models.items()}
    first = next(iter(named), None)
    for name, ids in named.items():
        if first is not None and ids != named[first]:
            raise DataError(
                f"{model_phrase(first)} and {model_phrase(name)} answered different rows, such as "
                f"{sorted(ids ^ named[first])[0]!r}",
                fix="run the same command again",
            )


def _scored(rows: Sequence[Row], task: Task) -> list[dict[str, Any]]:
    """The rows that have a truth, with ``correct``: 1 or 0 by the label, or the similarity of the answers."""
    out = []
    for row in rows:
        if task.label:
            truth = true_value(row, task.label)
            value = None if truth is None else float(predicted_label(row) == truth)
        else:
            tolerances = {task.score: task.score_tolerance} if task.score else {}
            value = (
                similarity(row.get("answer"), row["truth"], task.schema["properties"], tolerances)
                if row.get("truth") is not None
                else None
            )
        if value is not None:
            out.append({**row, "correct": value})
    return sorted(out, key=lambda row: str(row["id"]))


def _estimate(rows: Sequence[Row], task: Task | None, confidence: float) -> dict[str, Any]:
    """The mean of ``correct`` with its interval; over clusters their number too."""
    clusters = m.clusters_of(rows, task.cluster if task else None)
    return {**share_estimate([row["correct"] for row in rows], clusters, confidence)}


def _compare(
    a: Sequence[Row],
    b: Sequence[Row],
    figure_a: Mapping[str, Any],
    figure_b: Mapping[str, Any],
    task: Task,
    train_rows: Sequence[int],
    confidence: float,
) -> dict[str, Any]:
    """Model b minus model a: paired over the pooled rows, and over folds."""
    pooled = _paired(b, a, task, confidence)
    by_fold = [
        x["value"] - y["value"]
        for x, y in zip(figure_b["folds"], figure_a["folds"], strict=True)
        if x["value"] is not None and y["value"] is not None
    ]
    folds = len(train_rows)
    corrected = nadeau_bengio(
        by_fold,
        test_rows=sum(fold["n"] for fold in figure_a["folds"]) / folds,
        train_rows=sum(train_rows) / folds,
        confidence=confidence,
    )
    return {
        "pooled": dict(pooled),
        "verdict": verdict(pooled["difference"], None),
        "corrected": dict(corrected),
        "differences": by_fold,
    }


def _paired(first: Sequence[Row], second: Sequence[Row], task: Task, confidence: float) -> Comparison:
    """The first model minus the second on the same rows."""
    values = [[row["correct"] for row in rows] for rows in (first, second)]
    clusters = m.clusters_of(first, task.cluster)
    if task.label:
        hits = [[value == 1.0 for value in own] for own in values]
        return compare_paired(*hits, clusters=clusters, confidence=confidence)
    return compare_means(*values, clusters=clusters, confidence=confidence)


def learning_curve(
    points: Sequence[tuple[float, int, Sequence[Row]]], task: Task, *, confidence: float = 0.95
) -> dict[str, Any]:
    """The figure of a model against the rows that it was trained on.

    Args:
        points: (share, training rows, predictions) by rising share; all on the same test rows.
        task: Says what is right.
        confidence: Level of the intervals.

    Returns:
        ``points``: ``share``, ``rows`` and the ``estimate`` of each; ``steps``: from each point to the next
        the paired ``difference``; ``sentence``: what the curve shows of more rows.
    """
    scored = [(share, count, _scored(rows, task)) for share, count, rows in points]
    shown = [
        {"share": share, "rows": count, "estimate": _estimate(rows, task, confidence)}
        for share, count, rows in scored
    ]
    steps = []
    for (_, few, before), (_, many, after) in pairwise(scored):
        compared = _paired(after, before, task, confidence)
        steps.append({"from": few, "to": many, "difference": compared["difference"]})
    return {"points": shown, "steps": steps, "sentence": _curve_sentence(steps)}


def _curve_sentence(steps: Sequence[Mapping[str, Any]]) -> str:
    """What the last step shows; nothing is extrapolated."""
    if not steps:
        return ""
    last = steps[-1]
    low, high = last["difference"]["low"], last["difference"]["high"]
    span = f"from {last['from']:,} to {last['to']:,} training rows"
    if low is None or high is None:
        return f"Too few test rows to see a difference {span}."
    if low > 0:
        return f"The curve still rises {span}: more rows of this kind are worth a try."
    if high < 0:
        return f"The curve falls {span}: look at the rows and the training before adding more."
    return (
        f"No difference is shown {span}; one of up to {100 * max(high, -low):.1f} points would not have been "
        "seen. The curve does not say that more rows help, nor that they do not."
    )
