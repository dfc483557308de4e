"""A comparison in words: its sentence, what to do where it shows nothing, and the lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.text import MINUS, NONE, counted, listed, p_value, significant, size, words

Facts = Mapping[str, Any]
_VERDICTS = {
    "better": "{b} is better than {a}",
    "non_inferior": "{b} is as good as {a} within {margin}",
    "worse": "{b} is worse than {a}",
    "inconclusive": "it is not shown that {b} is as good as {a} within {margin}",
}
_LOST = 0.2  # of probability: spans that are marked
WORN_AFTER = 20
"""Comparisons on the same held-out rows after which they are worn: the best of many is good by chance too."""


def shown_value(value: float | None, unit: str) -> str:
    """A value of a metric: a rate in percent, a score as it is.

    >>> shown_value(0.9134, "rate"), shown_value(4.25, "points")
    ('91.3 %', '4.25')
    """
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if unit == "rate" else f"{value:.2f}"


def shown_points(value: float | None, unit: str, *, signed: bool = True) -> str:
    """A difference in points: percentage points of a rate, points of a score.

    >>> shown_points(-0.0094, "rate"), shown_points(0.03, "rate", signed=False)
    ('−0.9', '3.0')
    """
    if value is None:
        return NONE
    points = 100 * value if unit == "rate" else value
    text = f"{abs(points):.1f}" if unit == "rate" else f"{abs(points):.2f}"
    if not signed or float(text) == 0:
        return text
    return f"{MINUS if points < 0 else '+'}{text}"


def shown_interval(estimate: Mapping[str, Any], unit: str) -> str:
    """The interval of a difference: ``-2.4 to +0.6``."""
    return f"{shown_points(estimate['low'], unit)} to {shown_points(estimate['high'], unit)}"


def shown_margin(facts: Facts) -> str:
    """The margin in words, with its size in points where it was given as a share."""
    points = _trimmed(shown_points(facts["margin"], facts["metric_unit"], signed=False))
    text = f"{points} point{'' if points == '1' else 's'}"
    given = facts["margin_text"] or ""
    return f"{text} ({given} of A’s value)" if given.endswith("%") else text


def _trimmed(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


def sentence(facts: Facts) -> str:
    """The answer in one sentence, with the difference, its interval and the number of rows."""
    unit = facts["metric_unit"]
    if facts["a"]["json_valid"]["value"] == 0:
        invalid = [facts[side]["phrase"] for side in "ab" if facts[side]["json_valid"]["value"] == 0]
        return f"Nothing is shown: no answer of {listed(invalid)} fits the task."
    names = {side: facts[side]["phrase"] for side in "ab"}
    text = _VERDICTS[facts["verdict"]].format(**names, margin=shown_margin(facts) if facts["margin"] else "")
    if facts["verdict"] == "inconclusive" and not facts["margin"]:
        text = f"it is not shown whether {names['b']} is better or worse than {names['a']}"
    gap = facts["difference"]
    figures = f"{facts['metric_title']} {shown_points(gap['value'], unit)}, {shown_interval(gap, unit)}"
    level = f"{shown_value(facts['confidence'], 'rate').replace('.0', '')} interval, n = {gap['n']:,}"
    first = facts["b"]["phrase"]
    if not text.startswith(first) or first.startswith("the "):  # the name of a file stays as it is
        text = text[0].upper() + text[1:]
    return f"{text} ({figures}, {level})."


def advice(facts: Facts) -> str | None:
    """What to do where nothing is shown, or where B is worse; None else."""
    if facts["verdict"] == "worse":
        return _where_worse(facts)
    if facts["verdict"] != "inconclusive":
        return None
    if facts["a"]["json_valid"]["value"] == 0:
        return "Read some of the answers, look at the prompt, and compare constrained answers."
    unit, n = facts["metric_unit"], facts["n"]
    a, b = (facts[side]["phrase"] for side in "ab")
    provable = _points(facts["provable_margin"], unit)
    if facts["margin"] is None:
        more = ""
        if facts["rows_needed"] and facts["rows_needed"] > n:
            more = (
                f"; if the true difference is the measured one, about {facts['rows_needed']:,} rows in all "
                "would show it (with a probability of 80 %)"
            )
        return (
            f"The interval holds 0. Ask whether {b} is as good as {a} within a margin (such as 3pt): these "
            f"rows can show that within {provable} at the least{more}."
        )
    margin = shown_margin(facts)
    if facts["planned_n"] > n:
        more = facts["planned_n"] - n
        return (
            f"Collect about {more:,} more rows ({facts['planned_n']:,} in all): that many show equally good "
            f"models to be so within {margin} with a probability of 80 %. These {n:,} rows can show "
            f"{provable} at the least."
        )
    if facts["rows_needed"]:
        more = max(0, facts["rows_needed"] - n)
        return (
            f"The measured difference is near the margin of {margin}. If it is the true one, about "
            f"{counted(more, 'more row')} would decide; else {_better(b)}, and look at the broken rows."
        )
    return (
        f"The measured difference is outside the margin of {margin}, and more rows are unlikely to change "
        f"that: look at the broken rows, and {_better(b)}."
    )


def _where_worse(facts: Facts) -> str:
    """Where most rows broke: the slice with the most broken rows beyond its share of all of them."""
    broken, b = facts["first_only" if facts["higher_is_better"] else "second_only"], facts["b"]["phrase"]
    entries: list[tuple[float, str, Facts]] = [
        (entry["broken"] - broken * entry["n"] / facts["n"], name, entry)
        for name, of_field in facts["slices"].items()
        for entry in of_field
        if not entry["few"] and entry["n"] < facts["n"]
    ]
    excess, name, entry = max(entries, key=lambda one: one[0], default=(0.0, "", {}))
    where = f"Look at the {counted(broken, 'broken row')}"
    if excess > 0:
        where += (
            f", first at those with {words(name)} {entry['value']} ({entry['broken']:,} of its "
            f"{counted(entry['n'], 'row')} broke)"
        )
    return f"{where}, and {_better(b)}."


def _better(phrase: str) -> str:
    """What makes the second model better, as an order."""
    is_quantized = "quantized" in phrase.split()
    return "train the student longer, or quantize it less" if is_quantized else f"train {phrase} longer"


def _points(value: float | None, unit: str) -> str:
    return f"{shown_points(value, unit, signed=False)} points"


def looked_note(facts: Facts) -> str | None:
    """That the held-out rows are worn; None where they are not, or where nobody counted."""
    times = facts["looked"]["times"]
    if times is None or times <= WORN_AFTER:
        return None
    return (
        f"These held-out rows were looked at {times} times: they are worn, since the best of many models is "
        "good on them by chance too. Confirm the result on fresh rows."
    )


def leaked_note(facts: Facts) -> str | None:
    """That rows were trained on; None where none was, or where that is not known."""
    if not facts["leaked"]:
        return None
    count = len(facts["leaked"])
    return (
        f"{counted(count, 'row')} of these {facts['n']:,} {'was' if count == 1 else 'were'} trained on, such "
        f"as {facts['leaked'][0]}: the figures are too good, and a gate stays shut. Compare on other rows."
    )


def text_lines(facts: Facts) -> list[str]:
    """The comparison for the terminal."""
    unit, counts, cases = facts["metric_unit"], facts["counts"], facts["cases"]
    lines = [facts["sentence"]]
    if facts["advice"]:
        lines.append(facts["advice"])
    lines.append("")
    width = max(len(facts[side]["name"]) for side in "ab")
    for side in "ab":
        lines.append(_side_line(side, facts[side], unit, width))
    lines.append("")
    if "fixed" in counts:
        lines.append(
            f"fixed {counts['fixed']:,}, broken {counts['broken']:,}, both right {counts['both_right']:,}, "
            f"both wrong {counts['both_wrong']:,}; churn {shown_value(facts['churn'], 'rate')}"
        )
    else:
        lines.append(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for name in ("fixed", "broken"):
        if cases[name]:
            rest = f" and {len(cases[name]) - 8:,} more" if len(cases[name]) > 8 else ""
            lines.append(f"  {name}: {', '.join(cases[name][:8])}{rest}")
    lines += _notes(facts)
    return lines


def _side_line(side: str, figures: Facts, unit: str, width: int) -> str:
    value = figures["value"]
    low, high = (shown_value(value[end], unit).removesuffix(" %") for end in ("low", "high"))
    line = (
        f"{side.upper()}  {figures['name']:<{width}}  {shown_value(value['value'], unit)} [{low} to {high}]"
    )
    line += f", {shown_value(figures['json_valid']['value'], 'rate')} valid"
    if figures["latency_s"]:
        line += f", {significant(figures['latency_s'], 2)} s a row"
    if figures["size_bytes"]:
        line += f", {size(figures['size_bytes'])}"
    return line


def _notes(facts: Facts) -> list[str]:
    lines = [f"method: {facts['method']}, {p_value(facts['p'])}"]
    if facts["clusters"]:
        lines[0] += f", {facts['clusters']:,} clusters by {facts['cluster_key']}"
        if facts["few_clusters"]:
            lines.append("note: fewer than 20 clusters: the interval may be too narrow")
    if facts["provable_margin"] is not None:
        lines.append(
            f"these rows can show two equally good models to be so within "
            f"{_points(facts['provable_margin'], facts['metric_unit'])} at the least"
        )
    if facts["without_truth"]:
        lines.append(f"note: {counted(facts['without_truth'], 'row')} without a true answer left out")
    lines += [f"note: {text}" for text in (*facts["variables"], *facts["notes"])]
    lines += [f"note: {text}" for text in (looked_note(facts), leaked_note(facts)) if text]
    return lines


def token_lines(tokens: Sequence[Mapping[str, Any]]) -> list[str]:
    """The token view for the terminal: one line a span, the ones that B lost most marked."""
    lines: list[str] = []
    for one in tokens:
        lines += ["", f"{one['id']}: probability of each piece of A's answer", "     A      B"]
        for span in one["spans"]:
            mark = "<" if span["a"] - span["b"] > _LOST else ">" if span["b"] - span["a"] > _LOST else " "
            lines.append(
                f" {span['a']:.3f}  {span['b']:.3f} {mark} {json.dumps(span['text'], ensure_ascii=False)}"
            )
    return lines
