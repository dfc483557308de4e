"""Agreement of two raters beyond chance: Cohen's kappa and Gwet's AC1.

Show both beside the raw agreement: where nearly all items have one label, kappa falls towards 0 although the
raters nearly always agree; AC1 does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.intervals import Estimate, normal_quantile, wilson

Weights = Literal["linear", "quadratic"]


def cohen_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    categories: Sequence[Hashable] | None = None,
    weights: Weights | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Cohen's kappa of two raters: ``(a - e) / (1 - e)``.

    ``a`` is the share of items on which they agree and ``e = sum_k p_k q_k`` that of two raters who draw from
    their own label frequencies. With weights, categories that are near each other agree in part:
    ``1 - |i - j| / (Q - 1)``, or its square. The interval is ``kappa +- z SE`` with the SE of Fleiss, Cohen
    and Everitt; where the raters always agree it is Wilson's interval of ``a``, mapped.

    Args:
        first: The first rater's label of each item; None where there is none, which leaves the item out.
        second: The second rater's, in the same order.
        categories: All labels there are, for weights in ascending order; None for those that occur, sorted.
        weights: None for labels without an order; ``linear`` or ``quadratic`` for ratings.
        confidence: Level of the interval.

    Returns:
        Kappa over the ``n`` items that both rated. It is None where both gave one and the same label to all:
        then chance explains everything.

    Raises:
        DataError: lengths differ, or a label is none of the categories.

    >>> round(cohen_kappa([1, 1, 0, 0, 1], [1, 0, 0, 0, 1])["value"], 4)
    0.6154

    Cohen (1960), "A coefficient of agreement for nominal scales"; Fleiss, Cohen and Everitt (1969), "Large
    sample standard errors of kappa and weighted kappa".
    """
    p, n = _table(first, second, categories)
    w = _weights(p.shape[0], weights)
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    agreement, chance = float((w * p).sum()), float(rows @ w @ columns)
    if n == 0 or 1 - chance < 1e-12:
        return {"value": None, "low": None, "high": None, "n": n}
    kappa = (agreement - chance) / (1 - chance)
    expected = (w @ columns)[:, None] + (w.T @ rows)[None, :]
    spread = float((p * (w - expected * (1 - kappa)) ** 2).sum()) - (kappa - chance * (1 - kappa)) ** 2
    return _estimate(kappa, agreement, chance, spread / (1 - chance) ** 2, n, confidence)


def gwet_ac1(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    categories: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Gwet's AC1 of two raters: ``(a - e) / (1 - e)`` with ``e = sum_k m_k (1 - m_k) / (Q - 1)``.

    ``a`` is the share of items on which they agree, ``m_k`` the mean of the two raters' frequencies of
    category ``k`` and ``Q`` the number of categories. The interval is ``AC1 +- z SE`` with Gwet's SE for a
    sample of items; where the raters always agree it is Wilson's interval of ``a``, mapped.

    Args:
        first: The first rater's label of each item; None where there is none, which leaves the item out.
        second: The second rater's, in the same order.
        categories: All labels there are; None for those that occur.
        confidence: Level of the interval.

    Returns:
        AC1 over the ``n`` items that both rated; None with fewer than two categories: name all of them.

    Raises:
        DataError: lengths differ, or a label is none of the categories.

    >>> skewed = [[1] * 18 + [0, 1], [1] * 18 + [1, 0]]
    >>> round(gwet_ac1(*skewed)["value"], 3), round(cohen_kappa(*skewed)["value"], 3)
    (0.89, -0.053)

    Gwet (2008), "Computing inter-rater reliability and its variance in the presence of high agreement".
    """
    p, n = _table(first, second, categories)
    size = p.shape[0]
    if n == 0 or size < 2:
        return {"value": None, "low": None, "high": None, "n": n}
    m = (p.sum(axis=1) + p.sum(axis=0)) / 2
    agreement, chance = float(np.trace(p)), float((m * (1 - m)).sum()) / (size - 1)
    value = (agreement - chance) / (1 - chance)
    on_diagonal = float((np.diag(p) * (1 - m)).sum()) / (size - 1)
    pairs = 1 - (m[:, None] + m[None, :]) / 2
    squares = float((p * pairs**2).sum()) / (size - 1) ** 2
    spread = (
        agreement * (1 - agreement)
        - 4 * (1 - value) * (on_diagonal - agreement * chance)
        + 4 * (1 - value) ** 2 * (squares - chance**2)
    )
    return _estimate(value, agreement, chance, spread / (1 - chance) ** 2, n, confidence)


def _table(
    first: Sequence[Hashable], second: Sequence[Hashable], categories: Sequence[Hashable] | None
) -> tuple[Float[np.ndarray, "q q"], int]:
    """Shares of the items by both labels, and the number of items that both rated."""
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} items of the first rater and {len(second)} of the second",
            fix="give both raters' labels of the same items, None where one is missing",
        )
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if not (_missing(a) or _missing(b))]
    if categories is None:
        labels: set[Any] = {label for pair in pairs for label in pair}
        # Numbers keep their order, which weights need.
        by_value = all(isinstance(label, (int, float)) for label in labels)
        categories = sorted(labels) if by_value else sorted(labels, key=str)
    index = {label: i for i, label in enumerate(categories)}
    counts = np.zeros((len(index), len(index)))
    for a, b in pairs:
        if a not in index or b not in index:
            unknown = a if a not in index else b
            raise DataError(f"label {unknown!r} is none of the categories", fix="add it to them")
        counts[index[a], index[b]] += 1
    return counts / max(1, len(pairs)), len(pairs)


def _missing(label: Hashable) -> bool:
    return label is None or label != label


def _weights(size: int, weights: Weights | None) -> Float[np.ndarray, "q q"]:
    if weights not in (None, "linear", "quadratic"):
        raise ConfigError(f"weights {weights!r}", fix="give linear, quadratic or None")
    if weights is None or size < 2:
        return np.eye(size)
    steps = np.abs(np.subtract.outer(np.arange(size), np.arange(size))) / (size - 1)
    return 1 - steps ** (1 if weights == "linear" else 2)


def _estimate(
    value: float, agreement: float, chance: float, variance: float, n: int, confidence: float
) -> Estimate:
    if 1 - agreement < 1e-12:
        low, high = ((end - chance) / (1 - chance) for end in wilson(n, n, confidence))
    else:
        half = normal_quantile(confidence) * float(np.sqrt(max(0.0, variance) / n))
        low, high = value - half, value + half
    return {"value": value, "low": max(-1.0, low), "high": min(1.0, high), "n": n}
