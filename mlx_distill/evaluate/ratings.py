"""People's ratings of answers: means, wins, gold stars, and how far the raters agree."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.data.files import ReadOptions, read_each
from mlx_distill.errors import DataError
from mlx_distill.metrics.clusters import clustered_mean
from mlx_distill.metrics.intervals import rate
from mlx_distill.metrics.paired import compare_means, mcnemar_mid_p
from mlx_distill.metrics.raters import cohen_kappa, gwet_ac1
from mlx_distill.text import known_names

LOWEST, HIGHEST = 1, 5
_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0", ""}


@dataclass(frozen=True)
class Rating:
    """One rater's rating of one model's answer to one row.

    Attributes:
        id: The row's id.
        model: Whose answer it is.
        rating: 1 (worst) to 5 (best).
        rater: Who rated; "" where the file does not say.
        gold_star: Whether the answer is as good as one that a person would write.
    """

    id: str
    model: str
    rating: int
    rater: str
    gold_star: bool


def read_ratings(path: str | Path) -> list[Rating]:
    """Read ratings from a table (CSV, JSONL, Parquet) with ``id``, ``model``, ``rating``, and if there are
    any ``rater`` and ``gold_star``.

    Without a column ``gold_star`` an answer with the highest rating has one.

    Raises:
        DataError: a missing column or value, a rating that is no whole number from 1 to 5, or the same rater,
            row and model twice: with the place.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file", fix="give a table with id, model, rating, rater")
    out, seen = [], set()
    for where, row in read_each(path, str(path), ReadOptions()):
        if isinstance(row, DataError):
            raise row
        rating = _rating(where, row)
        key = (rating.id, rating.model, rating.rater)
        if key in seen:
            by = f" by {rating.rater}" if rating.rater else ""
            raise DataError(
                f"{where}: a second rating of row {rating.id!r} and model {rating.model!r}{by}",
                fix="keep one; ratings of several people need the column rater",
            )
        seen.add(key)
        out.append(rating)
    if not out:
        raise DataError(f"{path}: no ratings", fix="give a table with id, model, rating, rater")
    return out


def _rating(where: str, row: Mapping[str, Any]) -> Rating:
    for name in ("id", "model", "rating"):
        if row.get(name) in (None, ""):
            raise DataError(f"{where}: no {name}", fix="each row needs id, model and rating")
    try:
        number = float(row["rating"])
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(row["rating"], bool) or not (number.is_integer() and LOWEST <= number <= HIGHEST):
        raise DataError(
            f"{where}: rating {row['rating']!r} is no whole number from {LOWEST} to {HIGHEST}",
            fix="correct it, or leave the row out",
        )
    star = row.get("gold_star")
    text = str(star).strip().lower()
    if star is not None and text not in _TRUE | _FALSE:
        raise DataError(f"{where}: gold_star {star!r} is neither true nor false", fix="write true or false")
    return Rating(
        str(row["id"]),
        str(row["model"]),
        int(number),
        str(row.get("rater") or ""),
        number == HIGHEST if star is None else text in _TRUE,
    )


def rating_figures(ratings: Sequence[Rating], *, confidence: float = 0.95) -> dict[str, dict[str, Any]]:
    """Mean, spread and gold stars of each model's ratings.

    Ratings of one row by several people are not independent, so a row is a cluster.

    Returns:
        By model: ``mean`` (an estimate), ``sd`` (None with fewer than two ratings), ``gold_stars`` (an
        estimate of the share), ``ratings``, ``rows``, ``counts`` (of ratings 1 to 5).
    """
    out = {}
    for model in dict.fromkeys(rating.model for rating in ratings):
        own = [rating for rating in ratings if rating.model == model]
        values, rows = [rating.rating for rating in own], [rating.id for rating in own]
        stars = sum(rating.gold_star for rating in own)
        several = len(set(rows)) < len(rows)
        gold = clustered_mean([float(r.gold_star) for r in own], rows, confidence) if several else None
        out[model] = {
            "mean": _plain(clustered_mean([float(value) for value in values], rows, confidence)),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "gold_stars": _plain(gold) if gold else rate(stars, len(own), confidence),
            "ratings": len(own),
            "rows": len(set(rows)),
            "counts": [values.count(value) for value in range(LOWEST, HIGHEST + 1)],
        }
    return out


def _plain(estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {key: estimate[key] for key in ("value", "low", "high", "n")}


def compare_ratings(ratings: Sequence[Rating], a: str, b: str, *, confidence: float = 0.95) -> dict[str, Any]:
    """Whether people prefer B's answers to A's, on the rows of which both were rated.

    A row's rating is the mean of its raters; B wins a row with the higher one. ``p`` is that of the sign test
    without the ties (:func:`mlx_distill.metrics.paired.mcnemar_mid_p`).

    Returns:
        ``win``, ``tie``, ``loss`` (rows), ``rows``, ``p``, ``difference`` (B minus A in ratings, an
        estimate), ``figures`` of both (:func:`rating_figures`) and ``agreement``
        (:func:`rater_agreement`).

    Raises:
        DataError: a model without ratings, or no row of which both were rated.
    """
    models = list(dict.fromkeys(rating.model for rating in ratings))
    for model in (a, b):
        if model not in models:
            raise DataError(
                f"no ratings of {model!r}", fix=known_names(model, models, "models of the ratings")
            )
    means = {model: _row_means(rating for rating in ratings if rating.model == model) for model in (a, b)}
    rows = [row for row in means[a] if row in means[b]]
    if not rows:
        raise DataError(
            f"no row of which both {a!r} and {b!r} were rated",
            fix="rate both models' answers to the same rows",
        )
    first, second = ([means[model][row] for row in rows] for model in (a, b))
    wins = sum(y > x for x, y in zip(first, second, strict=True))
    losses = sum(y < x for x, y in zip(first, second, strict=True))
    figures = rating_figures(ratings, confidence=confidence)
    return {
        "win": wins,
        "tie": len(rows) - wins - losses,
        "loss": losses,
        "rows": len(rows),
        "p": mcnemar_mid_p(wins, losses),
        "difference": dict(compare_means(second, first, confidence=confidence)["difference"]),
        "figures": {"a": figures[a], "b": figures[b]},
        "agreement": rater_agreement([r for r in ratings if r.model in (a, b)], confidence=confidence),
    }


def _row_means(ratings: Iterable[Rating]) -> dict[str, float]:
    values = defaultdict(list)
    for rating in ratings:
        values[rating.id].append(rating.rating)
    return {row: statistics.fmean(own) for row, own in values.items()}


def rater_agreement(ratings: Sequence[Rating], *, confidence: float = 0.95) -> list[dict[str, Any]]:
    """How far each two raters agree on the answers that both rated.

    Returns:
        For each pair of raters with a common answer: ``raters``, ``answers``, ``same`` (share of equal
        ratings), ``within_one``, ``kappa`` (quadratic weights, since ratings have an order), ``ac1``.
    """
    by_rater: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for rating in ratings:
        by_rater[rating.rater][rating.id, rating.model] = rating.rating
    scale, out = list(range(LOWEST, HIGHEST + 1)), []
    for one, other in itertools.combinations(sorted(by_rater), 2):
        common = [answer for answer in by_rater[one] if answer in by_rater[other]]
        if not common:
            continue
        x, y = ([by_rater[rater][answer] for answer in common] for rater in (one, other))
        gaps = [abs(i - j) for i, j in zip(x, y, strict=True)]
        out.append(
            {
                "raters": [one, other],
                "answers": len(common),
                "same": rate(gaps.count(0), len(gaps), confidence),
                "within_one": rate(sum(gap <= 1 for gap in gaps), len(gaps), confidence),
                "kappa": cohen_kappa(x, y, categories=scale, weights="quadratic", confidence=confidence),
                "ac1": gwet_ac1(x, y, categories=scale, confidence=confidence),
            }
        )
    return out
