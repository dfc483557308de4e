"""What a number of rows can show, before or after the run: margins, and rows needed.

The *discordance* is the share of rows on which exactly one of two models is right (``(b + c) / n``). It and
not the accuracy determines how narrow the paired interval is.
"""

from __future__ import annotations

import math

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.intervals import normal_quantile


def provable_margin(discordance: float, n: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest margin within which ``n`` rows show two equally good models to be equal, with this power.

    ``(z_confidence + z_power) sqrt(discordance / n)``: 2.80 at 95 % and 80 %. A discordance below
    ``2 / (n + 2)`` counts as that: the Bonett-Price interval never knows a smaller one.

    Args:
        discordance: Share of rows on which exactly one model is right, 0 to 1; measured, or assumed.
        n: Number of rows.
        power: Probability that the verdict is then ``non_inferior`` (or ``better``).
        confidence: Level of the interval.

    Returns:
        The margin as a difference of rates: 0.05 for 5 points.

    Raises:
        ConfigError: a power or level that is not between 0 and 1, or no rows.
        DataError: a discordance that is not between 0 and 1.

    >>> round(provable_margin(0.10, 320), 4), round(provable_margin(0.10, 1000), 4)
    (0.0495, 0.028)
    """
    if n < 1:
        raise ConfigError(f"{n} rows", fix="a margin needs at least one")
    shown = max(_share(discordance), 2 / (n + 2))
    return _quantiles(power, confidence) * math.sqrt(shown / n)


def rows_needed(
    discordance: float,
    *,
    margin: float | None = None,
    difference: float | None = None,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """How many rows a verdict needs.

    * ``margin``: ``non_inferior`` within it, where both models are equally good:
      ``(z_confidence + z_power)^2 discordance / margin^2``.
    * ``difference``: ``better`` (or ``worse``), where that is the true difference ``d``:
      ``(z_confidence sqrt(discordance) + z_power sqrt(discordance - d^2))^2 / d^2``.
    * Both: ``non_inferior`` within the margin where ``B - A`` is truly ``d``:
      ``(z_confidence + z_power)^2 (discordance - d^2) / (margin + d)^2``.

    Args:
        discordance: Share of rows on which exactly one model is right, 0 to 1.
        margin: As a difference of rates: 0.03 for 3 points.
        difference: The true difference ``B - A`` that is assumed.
        power: Probability of the verdict.
        confidence: Level of the interval.

    Raises:
        ConfigError: neither margin nor difference, or a margin that is not positive, or a power or level that
            is not between 0 and 1.
        DataError: a discordance that is not between 0 and 1 or below the difference; a difference of 0; or B
            is worse by the margin or more, which no number of rows shows to be as good.

    >>> rows_needed(0.10, difference=0.02), rows_needed(0.10, margin=0.03)
    (1960, 873)

    Connor (1987), "Sample size for testing differences in proportions for the paired-sample design".
    """
    psi, both = _share(discordance), _quantiles(power, confidence)
    if margin is not None and not margin > 0:
        raise ConfigError(f"a margin of {margin}", fix="give a margin above 0, such as 0.03 for 3 points")
    d = 0.0 if difference is None else float(difference)
    if not abs(d) <= psi:  # NaN too
        raise DataError(
            f"a difference of {d} with models that differ on {psi:.3g} of the rows",
            fix="a difference is at most the discordance",
        )
    if margin is not None:
        if margin + d <= 0:
            raise DataError(
                f"B is worse by {-d:.3g}, the margin is {margin:.3g}: no number of rows shows it as good",
                fix="give a wider margin, or train B on",
            )
        n = both**2 * (psi - d * d) / (margin + d) ** 2
    elif difference is None:
        raise ConfigError("rows for what?", fix="give a margin, a difference, or both")
    elif d == 0:
        raise DataError("no number of rows shows a difference of 0", fix="give a margin instead")
    else:
        z, z_power = normal_quantile(confidence), both - normal_quantile(confidence)
        n = (z * math.sqrt(psi) + z_power * math.sqrt(psi - d * d)) ** 2 / (d * d)
    return max(1, math.ceil(n - 1e-9))


def _share(discordance: float) -> float:
    if not 0.0 <= discordance <= 1.0:
        raise DataError(f"a discordance of {discordance}", fix="it is a share of the rows, 0 to 1")
    return float(discordance)


def _quantiles(power: float, confidence: float) -> float:
    from scipy.special import ndtri

    for name, value in (("power", power), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"a {name} of {value}", fix="give one between 0 and 1")
    return normal_quantile(confidence) + float(ndtri(power))
