"""What people, a judge and prices add to a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.compare import ModelComparison
from mlx_distill.evaluate.costs import Prices, costs_of, error_cost, read_prices
from mlx_distill.evaluate.judge import judge_pairs, judged, read_judgements
from mlx_distill.evaluate.ratings import Rating, compare_ratings, read_ratings
from mlx_distill.progress import Progress
from mlx_distill.tasks.answer import dump_answer


@dataclass(frozen=True)
class Extras:
    """What :func:`read_extras` has read: prices, ratings, and a judge with people's judgements."""

    prices: Prices | None
    ratings: Sequence[Rating] | None
    judge: str | None
    judgements: Mapping[str, str]


def read_extras(
    costs: str | Path | None,
    ratings: str | Path | None,
    judge: str | Path | None,
    judgements: str | Path | None,
) -> Extras:
    """Read the files that a comparison names besides its models, before any model answers.

    Raises:
        ConfigError: a judge without people's judgements, or these without a judge; see
            :func:`mlx_distill.evaluate.costs.read_prices`.
        DataError: see :func:`mlx_distill.evaluate.ratings.read_ratings` and
            :func:`mlx_distill.evaluate.judge.read_judgements`.
    """
    if judge is not None and judgements is None:
        raise ConfigError(
            "--judge: how far the judge is right is not known",
            fix="add --judgements FILE: id and better (a, b, tie) of a random sample of the rows, by people",
        )
    if judgements is not None and judge is None:
        raise ConfigError("--judgements: no judge", fix="add --judge MODEL")
    return Extras(
        None if costs is None else read_prices(costs),
        None if ratings is None else read_ratings(ratings),
        None if judge is None else resolve_asset(str(judge)),
        {} if judgements is None else read_judgements(judgements),
    )


def add_extras(
    result: ModelComparison, extras: Extras, *, batch_size: int = 16, progress: Progress | None = None
) -> ModelComparison:
    """The comparison with ``costs``, ``ratings`` and ``judge`` among its facts, as far as they were given."""
    if extras.prices is not None:
        result = _add_costs(result, extras.prices)
    if extras.ratings is not None:
        result = _add_ratings(result, extras.ratings)
    if extras.judge is not None:
        result = _add_judge(result, extras.judge, extras.judgements, batch_size, progress)
    return result


def _add_costs(result: ModelComparison, prices: Prices) -> ModelComparison:
    """What a call of both costs, and what B's errors cost more than A's."""
    costs = costs_of(prices, {side: result.facts[side] for side in "ab"})
    a, b = ([_as_row(case, side) for case in result.cases] for side in "ab")
    clusters = [case["cluster"] for case in result.cases] if result.facts["cluster_key"] else None
    confidence = result.facts["confidence"]
    costs["errors"] = error_cost(a, b, result.task, prices, clusters=clusters, confidence=confidence)
    return replace(result, facts={**result.facts, "costs": costs})


def _as_row(case: Mapping[str, Any], side: str) -> dict[str, Any]:
    """A case of one side as the metrics read predictions."""
    return {"truth": case["truth"]["answer"], "label": case[side]["label"], "answer": case[side]["answer"]}


def _add_ratings(result: ModelComparison, ratings: Sequence[Rating]) -> ModelComparison:
    """What people say of both; they call the models ``a`` and ``b``, or as the comparison does."""
    known, facts = {rating.model for rating in ratings}, result.facts
    names = [facts[side]["name"] if facts[side]["name"] in known else side for side in "ab"]
    compared = compare_ratings(ratings, *names, confidence=facts["confidence"])
    return replace(result, facts={**facts, "ratings": compared})


def _add_judge(
    result: ModelComparison,
    model: str,
    human: Mapping[str, str],
    batch_size: int,
    progress: Progress | None,
) -> ModelComparison:
    """What a judge says of the answers; only rows whose answers differ are asked, equal ones are ties."""
    pairs = [
        {"id": case["id"], "question": case["input"], **{side: _text(case[side], result) for side in "ab"}}
        for case in result.cases
    ]
    differing = [pair for pair in pairs if pair["a"] != pair["b"]]
    said = judge_pairs(model, differing, batch_size=batch_size, progress=progress) if differing else {}
    same = {"forward": "tie", "exchanged": "tie", "better": "tie", "error": None}
    whole = {pair["id"]: said.get(pair["id"], same) for pair in pairs}
    facts = {"model": model, **judged(whole, human, confidence=result.facts["confidence"])}
    return replace(result, facts={**result.facts, "judge": facts})


def _text(side: Mapping[str, Any], result: ModelComparison) -> str:
    return side["text"] or "" if side["answer"] is None else dump_answer(side["answer"], result.task.schema)
