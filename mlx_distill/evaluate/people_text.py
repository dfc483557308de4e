"""Costs, ratings and a judge's preference in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.text import NONE, counted, p_value, signed_number, significant


def people_lines(facts: Mapping[str, Any]) -> list[str]:
    """Costs, ratings and the judge for the terminal."""
    lines = cost_lines(facts["costs"]) if facts.get("costs") else []
    if ratings := facts.get("ratings"):
        lines += [
            f"people: B wins {ratings['win']:,}, ties {ratings['tie']:,}, loses {ratings['loss']:,} of "
            f"{counted(ratings['rows'], 'row')}, {p_value(ratings['p'])}; "
            + ", ".join(_rated(side, ratings["figures"][side]) for side in "ab")
        ]
        lines += [_raters(pair) for pair in ratings["agreement"]]
    if judge := facts.get("judge"):
        share = judge["share"]
        lines.append(
            f"judge: B preferred on {100 * share['value']:.1f} % [{_percents(share)}] of the rows, a tie "
            f"counted half, corrected by {counted(judge['checked'], 'row')} that people judged (the judge "
            f"alone: {100 * judge['raw']:.1f} %; it agrees with people on "
            f"{100 * judge['agreement']['value']:.0f} % and contradicts itself on "
            f"{100 * judge['position']['value']:.0f} % when the answers change places)"
        )
    return lines


def _percents(estimate: Mapping[str, Any]) -> str:
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def _rated(side: str, figures: Mapping[str, Any]) -> str:
    spread = NONE if figures["sd"] is None else f"{figures['sd']:.2f}"
    stars = 100 * figures["gold_stars"]["value"]
    return f"{side.upper()} {figures['mean']['value']:.2f} (SD {spread}, {stars:.0f} % gold stars)"


def _raters(pair: Mapping[str, Any]) -> str:
    shown = [NONE if pair[key]["value"] is None else f"{pair[key]['value']:.2f}" for key in ("kappa", "ac1")]
    return (
        f"  {' and '.join(pair['raters'])}: the same rating on {100 * pair['same']['value']:.0f} % of "
        f"{counted(pair['answers'], 'answer')}, kappa {shown[0]}, AC1 {shown[1]}"
    )


def cost_lines(costs: Mapping[str, Any]) -> list[str]:
    """What calls cost, when that is paid back, and what errors cost, for the terminal."""
    currency, lines = costs["currency"], []
    for name, own in costs["models"].items():
        if own["call"] is None:
            lines.append(f"cost of {_named(name)}: its speed was not measured")
            continue
        call = own["call"]
        tokens = call["million_tokens"]
        per_million = f", {significant(tokens, 3)} a million tokens" if tokens is not None else ""
        lines.append(
            f"cost of {_named(name)}: {significant(call['total'], 3)} {currency} a call{per_million} (prices "
            f"of {costs['date']})"
        )
        lines += [
            f"  {system}: {significant(price, 3)} {currency} a call"
            for system, price in own["replaced"].items()
            if price is not None
        ]
    if errors := costs.get("errors"):
        lines.append(error_line(errors))
    return lines


def error_line(errors: Mapping[str, Any]) -> str:
    """What the errors of B cost more than A's."""
    gap = errors["difference"]
    ends = [NONE if gap[end] is None else signed_number(gap[end]) for end in ("value", "low", "high")]
    calls = counted(errors["calls"], "call")
    return (
        f"errors of B cost {ends[0]} {errors['currency']} [{ends[1]} to {ends[2]}] against A's over {calls}"
    )


def _named(name: str) -> str:
    return name.upper() if name in ("a", "b") else name.replace("_", " ")
