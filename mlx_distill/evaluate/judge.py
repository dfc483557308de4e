"""A model as judge of two models' answers, in both positions, corrected by people's judgements.

A judge prefers the answer that stands first or last, or the longer one, and nobody knows how much without
people. So each pair is asked twice with its answers exchanged, and the result is not shown without people's
judgements of a random sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.files import ReadOptions, read_each
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.corrected import prediction_powered
from mlx_distill.metrics.intervals import rate
from mlx_distill.progress import Progress
from mlx_distill.tasks.task import Task, load_task

JUDGE_TASK = "judge"
SCORES = {"a": 0.0, "tie": 0.5, "b": 1.0}
"""What a judgement counts for B."""
_SIDES = {"a": "first", "b": "second", "tie": "tie"}


def read_judgements(path: str | Path) -> dict[str, str]:
    """People's judgements by row: a table with ``id`` and ``better`` (``a``, ``b`` or ``tie``).

    Raises:
        DataError: no such file, a missing or unknown value, or a row twice: with the place.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file", fix="give a table with id and better (a, b or tie)")
    out: dict[str, str] = {}
    for where, row in read_each(path, str(path), ReadOptions()):
        if isinstance(row, DataError):
            raise row
        name, better = row.get("id"), str(row.get("better", "")).strip().lower()
        if name in (None, "") or better not in SCORES:
            raise DataError(
                f"{where}: id {name!r}, better {better!r}", fix="each row needs id, and a, b or tie"
            )
        if str(name) in out:
            raise DataError(f"{where}: row {name!r} twice", fix="keep one judgement a row")
        out[str(name)] = better
    return out


def judge_items(
    pairs: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The questions to the judge: each pair twice, the second time with its answers exchanged.

    Args:
        pairs: ``id``, ``question``, and the texts ``a`` and ``b``.
    """
    out = []
    for pair in pairs:
        for first, second in (("a", "b"), ("b", "a")):
            texts = {"question": pair["question"], "first": pair[first], "second": pair[second]}
            # The marks around a text must not occur in it.
            out.append(
                {name: str(text or "–").replace("<", "‹").replace(">", "›") for name, text in texts.items()}
            )
    return out


def judge_pairs(
    model: str | Path | tuple[Any, Any],
    pairs: Sequence[Mapping[str, Any]],
    *,
    task: str | Task = JUDGE_TASK,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, dict[str, str | None]]:
    """Ask a model which of two answers is better, with both orders of the answers.

    Args:
        model: What :func:`mlx_distill.classify` takes.
        pairs: See :func:`judge_items`.
        task: The judge's task, with the fields ``question``, ``first``, ``second`` and the classes ``first``,
            ``second``, ``tie``.
        batch_size: Questions at a time.
        progress: Where progress is shown.

    Returns:
        By row: ``forward`` and ``exchanged`` (``a``, ``b``, ``tie``; None with an ``error`` where the judge
        could not be asked), and ``better``: their common judgement, ``tie`` where they contradict each other.

    Raises:
        ConfigError: the task has other classes.
    """
    from mlx_distill.infer.classify import classify

    judge = task if isinstance(task, Task) else load_task(task)
    if sorted(judge.labels) != sorted(_SIDES.values()):
        raise ConfigError(
            f"the judge's task {judge.name!r} has the classes {', '.join(judge.labels)}",
            fix="its label needs first, second and tie",
        )
    answers = classify(model, judge, judge_items(pairs), batch_size=batch_size, progress=progress)
    out: dict[str, dict[str, str | None]] = {}
    for pair, forward, exchanged in zip(pairs, answers[::2], answers[1::2], strict=True):
        one = {"first": "a", "second": "b", "tie": "tie"}.get(str(forward.label))
        other = {"first": "b", "second": "a", "tie": "tie"}.get(str(exchanged.label))
        known = None not in (one, other)
        out[str(pair["id"])] = {
            "forward": one,
            "exchanged": other,
            "better": (one if one == other else "tie") if known else None,
            "error": forward.error or exchanged.error,
        }
    return out


def judged(
    judgements: Mapping[str, Mapping[str, str | None]], human: Mapping[str, str], *, confidence: float = 0.95
) -> dict[str, Any]:
    """B's share of wins by the judge, corrected by people's judgements of a sample.

    A win counts 1, a tie 1/2. ``share`` is the estimate of
    :func:`mlx_distill.metrics.corrected.prediction_powered`: the judge's mean over the rows that no person
    judged, plus the mean of what people say more than the judge on the rows that they did.

    Args:
        judgements: What :func:`judge_pairs` returns.
        human: People's judgements of a random sample of the same rows.
        confidence: Level of the interval.

    Returns:
        ``share`` (above 1/2: B is preferred), ``raw`` (the judge alone), ``human`` and ``agreement`` (of
        judge and people, on the same rows), ``position`` (share of rows on which the judge contradicts
        itself when the answers are exchanged), ``rows``, ``checked``, ``not_judged``.

    Raises:
        DataError: fewer than two rows with people's judgements, or none without.
    """
    known = {name: str(entry["better"]) for name, entry in judgements.items() if entry["better"]}
    checked = [name for name in known if name in human]
    rest = [name for name in known if name not in human]
    if len(checked) < 2 or not rest:
        raise DataError(
            f"people judged {len(checked)} of the judge's {len(known)} rows",
            fix="let people judge a random sample of the rows, 50 or more, and the judge all of them",
        )
    values = {name: SCORES[better] for name, better in known.items()}
    people = [SCORES[human[name]] for name in checked]
    share = prediction_powered(
        [values[name] for name in rest], [values[name] for name in checked], people, confidence=confidence
    )
    flips = sum(judgements[name]["forward"] != judgements[name]["exchanged"] for name in known)
    return {
        "share": share,
        "raw": sum(values.values()) / len(values),
        "human": sum(people) / len(people),
        "agreement": rate(sum(known[name] == human[name] for name in checked), len(checked), confidence),
        "position": rate(flips, len(known), confidence),
        "rows": len(known),
        "checked": len(checked),
        "not_judged": len(judgements) - len(known),
    }
