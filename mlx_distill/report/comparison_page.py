"""The page of a comparison: one HTML file. Its only script, which shows the cases 50 at a time, is allowed by
its hash in the content security policy.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mlx_distill.evaluate.cases import word_diff
from mlx_distill.evaluate.comparison_text import (
    leaked_note,
    looked_note,
    shown_interval,
    shown_margin,
    shown_points,
    shown_value,
)
from mlx_distill.evaluate.people_text import cost_lines, people_lines
from mlx_distill.report.environment import FOLDER, render
from mlx_distill.report.svg import element
from mlx_distill.text import (
    NONE,
    counted,
    duration,
    interval,
    percent,
    significant,
    size,
    value_text,
    words,
)

Facts = Mapping[str, Any]
Case = Mapping[str, Any]
WITHOUT_SCRIPT = 50
"""Cases that are shown without JavaScript."""
_STATES = {"better": "good", "non_inferior": "good", "worse": "bad", "inconclusive": "open"}
# Key, title, class of the tiles; the first two are those of the keys f and b.
_TILES = {
    "fixed": ("fixed", "good"),
    "broken": ("broken", "bad"),
    "both_wrong": ("both wrong", ""),
    "both_right": ("both right", ""),
    "improved": ("improved", "good"),
    "worsened": ("worsened", "bad"),
    "same": ("same", ""),
}
_CHANGES = {
    "fixed": ("good", "▲"),
    "improved": ("good", "▲"),
    "broken": ("bad", "▼"),
    "worsened": ("bad", "▼"),
}
_ORDER = ("broken", "worsened", "fixed", "improved", "both_wrong", "same", "both_right", None)
_DIFFERENCE = Markup(
    '<div class="difference"><b>{}</b> <small>{}</small> <span class="word">{}</span>{}</div>'
)
_MOST_DIFFS = 2000  # cases whose texts are compared word by word
_LONGEST_DIFF = 4000


def render_comparison(
    facts: Facts,
    cases: Sequence[Case],
    *,
    with_rows: bool = False,
    tokens: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of a comparison.

    Args:
        facts: ``ModelComparison.facts``.
        cases: ``ModelComparison.cases``.
        with_rows: Show titles, inputs and whole answers too, not only ids and labels.
        tokens: Of :func:`mlx_distill.evaluate.token_view.token_view`, for chosen rows.

    Returns:
        A complete HTML document.
    """
    view = comparison_view(facts, cases, with_rows=with_rows, tokens=tokens)
    return render("comparison.html.j2", c=facts, view=view)


def comparison_view(
    facts: Facts,
    cases: Sequence[Case],
    *,
    with_rows: bool = False,
    tokens: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What the template ``comparison.html.j2`` shows besides the facts, as ``view``."""
    ordered = sorted(cases, key=lambda case: _ORDER.index(case["change"]))
    shown = [_case(case, facts, with_rows and i < _MOST_DIFFS, with_rows) for i, case in enumerate(ordered)]
    view: dict[str, Any] = {
        "script_hash": script_hash(),
        "state": _STATES[facts["verdict"]],
        "created": facts["created"][:16].replace("T", " ") + " UTC",
        "notes": _notes(facts),
        "margin": shown_margin(facts) if facts["margin"] else None,
        "metrics": _metric_tables(facts),
        "tiles": _tiles(facts),
        "churn": _churn(facts),
        "labels": facts["confusions"]["a"]["labels"] if facts["confusions"] else [],
        "without_script": f"Without JavaScript the first {min(WITHOUT_SCRIPT, len(shown))} of "
        f"{counted(len(shown), 'row')} are shown, the broken ones first; all figures are complete.",
        "first": shown[:WITHOUT_SCRIPT],
        "more": shown[WITHOUT_SCRIPT:],
        "ids": facts["cases"],
        "slices": [_slice_table(name, rows, facts) for name, rows in facts["slices"].items()],
        "both": _both(facts),
        "tokens": [_tokens(one) for one in tokens],
        "people": people_lines({**facts, "costs": None}),
        "costs": cost_lines(facts["costs"]) if facts.get("costs") else [],
        "method": _method(facts),
        "version": _version(),
    }
    view["sections"] = _sections(facts, view)
    return view


def script_hash() -> str:
    """The hash by which the content security policy allows the page's script."""
    script = (FOLDER / "comparison.js").read_bytes()
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode()


def _version() -> str:
    from mlx_distill import __version__

    return __version__


def _sections(facts: Facts, view: Facts) -> list[tuple[str, str]]:
    shown = {
        "metrics": "Metrics",
        "counts": "Changes",
        "cases": "Cases",
        "slices": "Slices" if view["slices"] else None,
        "confusion": "Confusion" if facts["confusions"] else None,
        "cost": "Speed and size",
        "people": "People" if view["people"] else None,
        "costs": "Costs" if view["costs"] else None,
        "tokens": "Tokens" if view["tokens"] else None,
        "method": "Method",
    }
    return [(id, name) for id, name in shown.items() if name]


def _notes(facts: Facts) -> list[str]:
    differs = [f"Also different between the two: {text}." for text in facts["variables"]]
    notes = [f"{text[0].upper()}{text[1:]}." for text in facts["notes"]]
    if facts["without_truth"]:
        notes.append(f"{counted(facts['without_truth'], 'row')} without a true answer left out.")
    return [*differs, *notes, *(text for text in (leaked_note(facts), looked_note(facts)) if text)]


def _tiles(facts: Facts) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "title": title,
            "class": class_,
            "count": facts["counts"][key],
            "share": facts["counts"][key] / facts["n"],
        }
        for key, (title, class_) in _TILES.items()
        if key in facts["counts"]
    ]


def _metric_tables(facts: Facts) -> list[dict[str, Any]]:
    """The forest plot: one table for each unit, since differences of different units have no common axis."""
    captions = {"rate": "In percent and percentage points", "points": "On the task’s scale, in points"}
    tables = []
    for unit, caption in captions.items():
        entries = [entry for entry in facts["metrics"] if entry["unit"] == unit]
        limit = _limit([entry["difference"] for entry in entries], facts["margin"] or 0.0, unit)
        rows = [
            _row(
                entry["title"], entry, limit, facts["margin"] if entry["metric"] == facts["metric"] else None
            )
            for entry in entries
        ]
        if rows:
            tables.append({"caption": caption, "rows": rows})
    return tables


def _limit(differences: Sequence[Facts], margin: float, unit: str) -> float:
    """The end of the axis of differences."""
    ends = [abs(d[end]) for d in differences for end in ("low", "high") if d[end] is not None]
    return 1.15 * max([*ends, margin, 0.01 if unit == "rate" else 0.5])


def _row(title: str, entry: Facts, limit: float, margin: float | None) -> dict[str, Any]:
    """A row of a forest plot."""
    unit, gap = entry["unit"], entry["difference"]
    sign = 1.0 if entry["higher_is_better"] else -1.0
    low, high = gap["low"], gap["high"]
    clear = 0.0 if low is None or low <= 0 <= high else sign * (1.0 if low > 0 else -1.0)
    state = "better" if clear > 0 else "worse" if clear < 0 else "open"
    word = {"better": "▲ B is better", "worse": "▼ B is worse", "open": "not apart"}[state]
    return {
        "title": title,
        "state": state,
        "n": entry["n"],
        "a": _estimate(entry["a"], unit),
        "b": _estimate(entry["b"], unit),
        "difference": _DIFFERENCE.format(
            shown_points(gap["value"], unit),
            shown_interval(gap, unit),
            word,
            _strip(gap, limit, sign, margin, title),
        ),
    }


def _estimate(estimate: Facts, unit: str) -> Markup:
    value = shown_value(estimate["value"], unit)
    if estimate["low"] is None:
        return Markup("<b>{}</b>").format(value)
    low, high = (shown_value(estimate[end], unit).removesuffix(" %") for end in ("low", "high"))
    return Markup("<span><b>{}</b> <small>{}–{}</small></span>").format(value, low, high)


def _strip(gap: Facts, limit: float, sign: float, margin: float | None, title: str) -> Markup:
    """A difference and its interval on an axis on whose right B is better."""
    if gap["value"] is None:
        return Markup("")

    def at(value: float) -> str:
        return f"{50 + 50 * max(-1.0, min(1.0, sign * value / limit)):.2f}%"

    low, high = (gap["value"] if gap[end] is None else gap[end] for end in ("low", "high"))
    lines = [element("line", x1="50%", x2="50%", y1=0, y2=18, class_="zero")]
    if margin is not None:
        place = f"{50 - 50 * min(1.0, margin / limit):.2f}%"
        lines.append(element("line", x1=place, x2=place, y1=0, y2=18, class_="margin"))
    return element(
        "svg",
        element("title", f"{title}: the difference and its interval"),
        lines,
        element("line", x1=at(low), x2=at(high), y1=9, y2=9, class_="range"),
        element("circle", cx=at(gap["value"]), cy=9, r=4.5, class_="dot"),
        class_="strip",
        width="100%",
        height=18,
        role="img",
    )


def _slice_table(name: str, entries: Sequence[Facts], facts: Facts) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    few: list[dict[str, Any]] = []
    enough = [e["difference"] for e in entries if not e["few"]] or [e["difference"] for e in entries]
    shared = {"unit": facts["metric_unit"], "higher_is_better": facts["higher_is_better"]}
    limit = _limit(enough, 0.0, facts["metric_unit"])
    for entry in entries:
        row = _row(str(entry["value"]), {**entry, **shared}, limit, None)
        row["changes"] = f"+{entry['fixed']} −{entry['broken']}"
        (few if entry["few"] else rows).append(row)
    return {"field": name, "rows": rows, "few": few}


def _churn(facts: Facts) -> str:
    """On how many rows the two differ in being right, and in their labels."""
    sentences = []
    if "fixed" in facts["counts"]:
        sentences.append(f"The two differ in being right on {percent(facts['churn'])} of the rows (churn).")
    if same := facts.get("agreement"):  # not in comparisons that were kept by earlier versions
        sentences.append(f"They give the same label on {percent(same['value'])} ({interval(same)}).")
    return " ".join(sentences)


def _case(case: Case, facts: Facts, with_diff: bool, with_rows: bool) -> dict[str, Any]:
    truth = case["truth"]
    class_, sign = _CHANGES.get(case["change"], ("", ""))
    errors = [side["error_class"] for side in (case["b"], case["a"]) if side["error_class"]]
    return {
        "id": case["id"],
        "title": case["title"] if with_rows else None,
        "change": case["change"] or "",
        "state": class_,
        "sign": sign,
        "word": words(case["change"] or "no truth"),
        "truth": truth["label"] or "",
        "truth_text": _said(truth["label"], truth["score"]),
        "a": _side(case["a"], truth["label"]),
        "b": _side(case["b"], truth["label"]),
        "error": errors[0] if errors else "",
        "detail": _detail(case, with_diff) if with_rows else None,
    }


def _said(label: str | None, score: float | None) -> str:
    parts = [words(label)] if label else []
    return " ".join([*parts, f"{score:g}"] if score is not None else parts) or NONE


def _side(side: Case, truth: str | None) -> dict[str, Any]:
    probabilities = side["label_probs"]
    share = probabilities.get(truth) if probabilities and truth else None
    return {
        "label": side["label"] or ("invalid" if side["error"] else ""),
        "text": "invalid" if side["error"] else _said(side["label"], side["score"]),
        "state": "wrong" if side["error_class"] else "",
        "share": None if share is None else f"{share:.2f}",
    }


def _detail(case: Case, with_diff: bool) -> dict[str, Any]:
    """Input and whole answers; B's as the words that differ from A's."""
    first, second = (_whole(case[name]) for name in "ab")
    is_short = max(len(first), len(second)) <= _LONGEST_DIFF
    diff = word_diff(first, second) if with_diff and is_short and first != second else [("=", second)]
    return {"input": case["input"], "truth": value_text(case["truth"]["answer"]), "a": first, "b": diff}


def _whole(side: Case) -> str:
    return f"invalid ({side['error']}): {side['text']}" if side["error"] else value_text(side["answer"])


def _tokens(one: Facts) -> dict[str, Any]:
    """The spans of one text; the shade is the probability that B lost or gained against A."""
    spans = [
        {
            "text": span["text"],
            "a": f"{span['a']:.3f}",
            "b": f"{span['b']:.3f}",
            "shade": f"{abs(span['a'] - span['b']):.2f}",
            "class": "lost" if span["b"] < span["a"] else "gained",
        }
        for span in one["spans"]
    ]
    return {"id": one["id"], "spans": spans}


def _both(facts: Facts) -> list[tuple[str, str, str]]:
    """Reliability, speed and size of both sides; what neither has is left out."""
    shown = {
        "Fits the task": lambda side: percent(side["json_valid"]["value"]),
        "Median time of a row": lambda side: duration(side["latency_s"], page=True),
        "95th percentile": lambda side: duration(side["latency_p95_s"], page=True),
        "Rows per minute": lambda side: _number(side["items_per_minute"]),
        "Tokens of a prompt": lambda side: _number(side["prompt_tokens"]),
        "Tokens of an answer": lambda side: _number(side["tokens"]),
        "Weights on disk": lambda side: size(side["size_bytes"], page=True),
        "Peak memory": lambda side: size(side["peak_memory_bytes"], page=True),
    }
    rows = [(name, show(facts["a"]), show(facts["b"])) for name, show in shown.items()]
    names = {"nll": "Label log loss", "ece": "Calibration error", "brier": "Brier score"}
    for key, name in names.items() if facts["calibration"] else ():
        first, second = (f"{facts['calibration'][side][key]:.3f}" for side in "ab")
        rows.insert(1, (name, first, second))
    return [row for row in rows if set(row[1:]) != {NONE}]


def _number(value: float | None) -> str:
    return NONE if value is None else significant(value, 3)


def _method(facts: Facts) -> list[tuple[str, dict[str, Any]]]:
    looked = facts["looked"]["times"]
    test = {
        "interval and test": facts["method"],
        "level": percent(facts["confidence"], 0),
        "p-value": f"{facts['p']:.4f}",
        "unit": facts["unit"]
        + (f" ({facts['cluster_key']}, {facts['clusters']})" if facts["clusters"] else ""),
        "margin": f"{shown_margin(facts)}" if facts["margin"] else "none given",
        "least margin that these rows can show": _points(facts["provable_margin"], facts["metric_unit"]),
        "rows that the margin needs": f"{facts['planned_n']:,}" if facts["planned_n"] else NONE,
        "power of both": "80 %",
        "repeats": facts["repeats"],
        "looks at these rows": looked if looked is not None else "not counted",
        "rows that were trained on": "not known" if facts["leaked"] is None else len(facts["leaked"]),
    }
    origin = {"comparison": facts["id"], "rows": facts["dataset_sha"][:16], "set": facts["split"]}
    for name in "ab":
        side = facts[name]
        origin[f"{name.upper()}: source"] = side["source"]
        origin[f"{name.upper()}: hash"] = side["sha"][:16]
        for key, value in side["serving"].items():
            if value is not None:
                origin[f"{name.upper()}: {words(key)}"] = value
    return [("Statistics", test), ("Origin", origin)]


def _points(value: float | None, unit: str) -> str:
    return NONE if value is None else f"{shown_points(value, unit, signed=False)} points"
