"""Confusion matrices, the sides of a binary decision, error rates by group, the labels that each model gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.charts import axis, nice_ticks, stacked, strip
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import (
    TableRow,
    legend,
    metric_titles,
    model_heading,
    number_cell,
    rate_cell,
    scroll,
    table,
)
from mlx_distill.run_models import RESULTS, STUDENTS, model_class, model_title
from mlx_distill.text import NONE, counted, integer, percent, signed_points, significant, words

Report = Mapping[str, Any]
_KINDS = (
    ("false_positive_rate", "false_positives", "negatives"),
    ("false_negative_rate", "false_negatives", "positives"),
)


def sides(report: Report) -> Html | None:
    """Precision, recall, F1 and both error rates, where the task has positive classes."""
    task, metrics = report["task_details"], report["metrics"]
    if not task["positive"]:
        return None
    named = metric_titles(task)
    heads = [(key, named[key]) for key in ("precision", "recall", "f1", *[key for key, _, _ in _KINDS])]
    rows: list[TableRow] = []
    for model, figures in metrics.items():
        cells: list[Any] = [
            rate_cell(figures.get(key), f"{model_title(model)}, {head}") for key, head in heads
        ]
        counts = figures["counts"]
        cells += [f"{counts['false_positives']:,} / {counts['false_negatives']:,}"]
        rows.append((model_heading(model), cells, model_class(model)))
    positive = ", ".join(map(words, task["positive"]))
    caption = f"Positive: {positive}. An answer that is not valid raises no flag: it misses a positive and passes a negative."
    return table(caption, ["Model", *[head for _, head in heads], "False + / −"], rows, class_="headline")


def groups(report: Report) -> Html | None:
    """False-positive and false-negative rates of each group, with the counts behind them."""
    metrics = {
        name: figures["by_group"] for name, figures in report["metrics"].items() if figures.get("by_group")
    }
    if not metrics:
        return None
    shown = [name for name in ("teacher", *RESULTS) if name in metrics] or list(metrics)
    first = metrics[shown[0]]
    note = (
        f"The error rates must not differ between values of “{words(first['field'])}”. Rates over fewer than {first['few_below']} rows are "
        "marked “few” and compared with nothing."
    )
    parts: list[Any] = [
        el("p", note, class_="note"),
        legend([(model_class(name), model_title(name)) for name in shown]),
    ]
    parts += [
        _group_table(metrics, shown, metric_titles(report["task_details"])[kind[0]], *kind) for kind in _KINDS
    ]
    return el("div", parts)


def _group_table(
    metrics: Mapping[str, Any], shown: list[str], title: str, kind: str, hits: str, items: str
) -> Html:
    rows: list[TableRow] = []
    found = [g for name in shown for g in metrics[name]["groups"].values() if g[kind]["n"]]
    ticks = nice_ticks(0.0, max([0.1, *(g[kind]["high"] for g in found)]))
    reach = min(1.0, ticks[-1])
    ticks = [x for x in ticks if x <= reach]
    first = metrics[shown[0]]
    for value in first["groups"]:
        entries = [(name, metrics[name]["groups"].get(value)) for name in shown]
        drawn = strip(
            [(model_class(name), model_title(name), e[kind] if e else None) for name, e in entries],
            0.0,
            reach,
            ticks=ticks,
        )
        cells: list[Any] = [drawn]
        for _, entry in entries:
            few = entry and kind in entry["few"]
            text = f"{entry[hits]} of {entry[items]}" if entry else ""
            shown_rate = percent(entry[kind]["value"]) if entry else NONE
            cells.append(
                el("span", number_cell(shown_rate, text), el("em", "few", class_="few") if few else None)
            )
        rows.append((value, cells, None))
    rows.append(("", [axis(0.0, reach, ticks), *[""] * len(shown)], "axis-row"))
    heads = [words(first["field"]).capitalize(), f"{title}, %", *[model_title(name) for name in shown]]
    gaps = [_gap(name, metrics[name]["gaps"][kind]) for name in shown if metrics[name]["gaps"][kind]] or [
        _no_gap(first, kind)
    ]
    return el("div", table(title, heads, rows, class_="dots groups"), el("ul", gaps, class_="plain"))


def _no_gap(figures: Mapping[str, Any], kind: str) -> Html:
    """How many rows a group has follows from the truth, so this holds for all models."""
    enough = [value for value, group in figures["groups"].items() if kind not in group["few"]]
    where = f"all groups but {', '.join(enough)}" if enough else "every group"
    return el(
        "li",
        f"Too few rows in {where} to speak of a gap."
        if len(figures["groups"]) > 1
        else "A single group has no gap.",
    )


def _gap(name: str, gap: Mapping[str, Any]) -> Html:
    ends = f"{signed_points(gap['low'])} to {signed_points(gap['high'])}"
    return el(
        "li",
        f"{model_title(name)}: widest gap ",
        el("b", f"{signed_points(gap['value'])} points"),
        f" [{ends}], {gap['highest']} over {gap['lowest']}.",
    )


def confusions(report: Report) -> Html:
    """Teacher against the truth, then each student against the teacher; the rest folded away."""
    metrics = report["metrics"]
    shown: list[Html | None] = []
    folded: list[Html | None] = []
    for name, figures in metrics.items():
        against_teacher = (
            _matrix(figures["teacher_confusion"], name, "teacher") if figures["teacher_confusion"] else None
        )
        against_truth = _matrix(figures["confusion"], name, "truth")
        (shown if name in STUDENTS and against_teacher else folded).append(against_teacher)
        (shown if name == "teacher" or "teacher" not in metrics else folded).append(against_truth)
    note = (
        "Rows: the reference; columns: what the model says. Shade: share of the row. The diagonal is agreement. Left out: rows whose "
        "reference has no label."
    )
    folded = [matrix for matrix in folded if matrix is not None]
    more = el(
        "details",
        el("summary", counted(len(folded), "more matrix")),
        el("div", folded, class_="matrices"),
    )
    return el(
        "div", el("p", note, class_="note"), el("div", shown, class_="matrices"), more if folded else None
    )


def _matrix(confusion: Mapping[str, Any], name: str, reference: str) -> Html:
    labels, counts = confusion["labels"], confusion["counts"]
    invalid = any(row[-1] for row in counts)
    heads = [words(label) for label in labels] + (["not valid"] if invalid else [])
    rows = []
    for i, label in enumerate(labels):
        total = sum(counts[i])
        cells = [
            _cell(counts[i][j], total, i == j, heads[j], words(label), reference) for j in range(len(heads))
        ]
        rows.append(
            el("tr", el("th", words(label), scope="row"), cells, el("td", f"{total:,}", class_="sum"))
        )
    hits = sum(counts[i][i] for i in range(len(labels)))
    title = f"{model_title(name)} against the {reference}"
    left_out = f", {confusion['left_out']:,} left out" if confusion["left_out"] else ""
    share = percent(hits / confusion["n"]) if confusion["n"] else NONE
    head = el(
        "tr",
        el("td", f"{reference} ↓", class_="corner"),
        [el("th", el("span", text), scope="col") for text in heads],
        el("th", el("span", "all"), scope="col"),
    )
    # A caption is no wider than its table, which is narrow where the classes are few.
    shown = el("figcaption", title, el("small", f"{share} of {confusion['n']:,} on the diagonal{left_out}"))
    caption = el("caption", title, class_="hidden")
    body = el("table", caption, el("thead", head), el("tbody", rows), class_="matrix")
    return el("figure", shown, scroll(body, title), class_="matrix-box")


def _cell(number: int, total: int, diagonal: bool, said: str, truth: str, reference: str) -> Html:
    share = number / total if total else 0.0
    hint = f"{number} of {total} rows with {truth} ({reference}) were called {said}: {percent(share)}"
    text = el("b", integer(number)) if number else el("span", "0", class_="zero")
    return el("td", text, title=hint, class_="yes" if diagonal else "no", style=f"--a:{share:.3f}")


def distributions(report: Report) -> Html | None:
    """How often each model gives each label, and how far its label probabilities are from the teacher’s."""
    metrics, labels = report["metrics"], report["task_details"]["labels"]
    classes = [f"l{i % 8}" for i in range(len(labels))]
    names = [words(label) for label in labels]
    rows: list[TableRow] = []
    truth = [sum(row) for row in next(iter(metrics.values()))["confusion"]["counts"]]
    if sum(truth):
        rows.append(
            (
                el("span", "Truth", class_="model"),
                [stacked(list(zip(classes, names, truth, strict=True)), "Truth"), NONE],
                None,
            )
        )
    for model, figures in metrics.items():
        counts = figures["confusion"]["counts"]
        parts = [
            (c, n, sum(row[j] for row in counts)) for j, (c, n) in enumerate(zip(classes, names, strict=True))
        ]
        parts.append(("invalid", "not valid", sum(row[-1] for row in counts)))
        kl = figures.get("label_kl_interval")
        known = kl and kl["value"] is not None
        cell = (
            number_cell(
                significant(kl["value"], 2), f"{significant(kl['low'], 2)}–{significant(kl['high'], 2)}"
            )
            if known
            else number_cell(NONE)
        )
        rows.append((model_heading(model), [stacked(parts, model_title(model)), cell], model_class(model)))
    caption = "Labels given on rows that have a truth; mean KL divergence (nats) from the teacher’s label probabilities"
    shown = legend([*zip(classes, names, strict=True), ("invalid", "not valid")])
    return el("div", shown, table(caption, ["", "Labels", "KL from teacher"], rows, class_="shares"))
