"""Sections of the report: error rates, error rates by group, confusion matrices, label distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.report.charts import axis, nice_ticks, stacked, strip
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import (
    Report,
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


@dataclass(frozen=True)
class _ErrorRate:
    """A rate of errors and the keys of its counts."""

    name: str
    errors: str
    items: str


_ERROR_RATES = (
    _ErrorRate("false_positive_rate", "false_positives", "negatives"),
    _ErrorRate("false_negative_rate", "false_negatives", "positives"),
)


def binary_errors(report: Report) -> Html | None:
    """The section of precision, recall, F1 and error rates, where the task has positive classes."""
    task, metrics = report["task_details"], report["metrics"]
    if not task["positive"]:
        return None
    titles = metric_titles(task)
    keys = ("precision", "recall", "f1", *(rate.name for rate in _ERROR_RATES))
    rows: list[TableRow] = []
    for model, figures in metrics.items():
        cells: list[Any] = [
            rate_cell(figures.get(key), f"{model_title(model)}, {titles[key]}") for key in keys
        ]
        counts = figures["counts"]
        cells.append(f"{counts['false_positives']:,} / {counts['false_negatives']:,}")
        rows.append((model_heading(model), cells, model_class(model)))
    positive = ", ".join(map(words, task["positive"]))
    caption = f"Positive: {positive}. An invalid answer counts as a negative prediction."
    heads = ["Model", *[titles[key] for key in keys], "False + / −"]
    return table(caption, heads, rows, class_="headline")


def group_errors(report: Report) -> Html | None:
    """The section of false-positive and false-negative rates by group, with their counts."""
    groups = {
        name: figures["by_group"] for name, figures in report["metrics"].items() if figures.get("by_group")
    }
    if not groups:
        return None
    shown = [name for name in ("teacher", *RESULTS) if name in groups] or list(groups)
    groups = {name: groups[name] for name in shown}
    first = groups[shown[0]]
    note = (
        f"Error rates should be equal for all values of “{words(first['field'])}”. "
        f"Rates over fewer than {first['few_below']} rows are marked “few” and are not compared."
    )
    titles = metric_titles(report["task_details"])
    return el(
        "div",
        el("p", note, class_="note"),
        legend([(model_class(name), model_title(name)) for name in shown]),
        [_group_table(groups, rate, titles[rate.name]) for rate in _ERROR_RATES],
    )


def _group_table(groups: Mapping[str, Any], rate: _ErrorRate, title: str) -> Html:
    """One error rate by group: a line of intervals for each group, then each model's rate and counts.

    Args:
        groups: Model name to its ``by_group``.
        rate: The error rate.
        title: Its title.
    """
    first = next(iter(groups.values()))
    limit, ticks = _group_axis(groups, rate.name)
    rows: list[TableRow] = []
    for value in first["groups"]:
        entries = {name: entry["groups"].get(value) for name, entry in groups.items()}
        drawn = strip(
            [
                (model_class(name), model_title(name), entry[rate.name] if entry else None)
                for name, entry in entries.items()
            ],
            0.0,
            limit,
            ticks=ticks,
        )
        rows.append((value, [drawn, *[_group_cell(entry, rate) for entry in entries.values()]], None))
    rows.append(("", [axis(0.0, limit, ticks), *[""] * len(groups)], "axis-row"))
    heads = [words(first["field"]).capitalize(), f"{title}, %", *[model_title(name) for name in groups]]
    gaps = [(name, entry["gaps"][rate.name]) for name, entry in groups.items() if entry["gaps"][rate.name]]
    notes = [_gap(name, gap) for name, gap in gaps] or [_no_gap(first, rate.name)]
    return el("div", table(title, heads, rows, class_="dots groups"), el("ul", notes, class_="plain"))


def _group_axis(groups: Mapping[str, Any], rate_name: str) -> tuple[float, list[float]]:
    """The upper limit and the ticks of an axis that holds the intervals of all groups."""
    highs = [
        group[rate_name]["high"]
        for entry in groups.values()
        for group in entry["groups"].values()
        if group[rate_name]["n"]
    ]
    ticks = nice_ticks(0.0, max([0.1, *highs]))
    limit = min(1.0, ticks[-1])
    return limit, [x for x in ticks if x <= limit]


def _group_cell(entry: Mapping[str, Any] | None, rate: _ErrorRate) -> Html:
    if not entry:
        return el("span", number_cell(NONE))
    counts = f"{entry[rate.errors]} of {entry[rate.items]}"
    few = el("em", "few", class_="few") if rate.name in entry["few"] else None
    return el("span", number_cell(percent(entry[rate.name]["value"]), counts), few)


def _no_gap(figures: Mapping[str, Any], rate_name: str) -> Html:
    """Why no difference is given; the sizes of the groups depend on the true labels, not on the model."""
    if len(figures["groups"]) == 1:
        return el("li", "There is only one group.")
    enough = [value for value, group in figures["groups"].items() if rate_name not in group["few"]]
    where = f"all groups except {', '.join(enough)}" if enough else "every group"
    return el("li", f"Too few rows in {where} to compare.")


def _gap(name: str, gap: Mapping[str, Any]) -> Html:
    ends = f"{signed_points(gap['low'])} to {signed_points(gap['high'])}"
    return el(
        "li",
        f"{model_title(name)}: largest difference ",
        el("b", f"{signed_points(gap['value'])} points"),
        f" [{ends}], {gap['highest']} minus {gap['lowest']}.",
    )


def confusions(report: Report) -> Html | None:
    """The section of confusion matrices: the teacher against the truth, each student against the teacher.

    The others are folded. None for a task without a label.
    """
    if not report["task_details"]["label"]:
        return None
    metrics = report["metrics"]
    shown: list[Html] = []
    folded: list[Html] = []
    for name, figures in metrics.items():
        if figures["teacher_confusion"]:
            matrix = _matrix(figures["teacher_confusion"], name, "teacher")
            (shown if name in STUDENTS else folded).append(matrix)
        matrix = _matrix(figures["confusion"], name, "truth")
        (shown if name == "teacher" or "teacher" not in metrics else folded).append(matrix)
    note = (
        "Rows: the reference labels; columns: the model’s labels. Shade: share of the row. "
        "Rows without a reference label are left out."
    )
    more = None
    if folded:
        summary = el("summary", counted(len(folded), "more matrix"))
        more = el("details", summary, el("div", folded, class_="matrices"))
    return el("div", el("p", note, class_="note"), el("div", shown, class_="matrices"), more)


def _matrix(confusion: Mapping[str, Any], name: str, reference: str) -> Html:
    labels, counts = confusion["labels"], confusion["counts"]
    title = f"{model_title(name)} against the {reference}"
    correct = sum(counts[i][i] for i in range(len(labels)))
    share = percent(correct / confusion["n"]) if confusion["n"] else NONE
    left_out = f", {confusion['left_out']:,} left out" if confusion["left_out"] else ""
    # Outside the table: a caption would be no wider than the table, which is narrow for few classes.
    shown = el("figcaption", title, el("small", f"{share} of {confusion['n']:,} on the diagonal{left_out}"))
    caption = el("caption", title, class_="hidden")
    heads = [words(label) for label in labels]
    if any(row[-1] for row in counts):
        heads.append("invalid")
    columns = [el("th", el("span", text), scope="col") for text in [*heads, "all"]]
    head = el("tr", el("td", f"{reference} ↓", class_="corner"), columns)
    rows = [_matrix_row(i, words(labels[i]), counts[i], heads, reference) for i in range(len(labels))]
    body = el("table", caption, el("thead", head), el("tbody", rows), class_="matrix")
    return el("figure", shown, scroll(body, title), class_="matrix-box")


def _matrix_row(index: int, label: str, counts: Sequence[int], heads: Sequence[str], reference: str) -> Html:
    total = sum(counts)
    cells = []
    for j, predicted in enumerate(heads):
        share = counts[j] / total if total else 0.0
        hint = f"{counts[j]} of {total} rows with {label} ({reference}) were labelled {predicted}: "
        text = el("b", integer(counts[j])) if counts[j] else el("span", "0", class_="zero")
        class_ = "yes" if j == index else "no"
        cells.append(el("td", text, title=hint + percent(share), class_=class_, style=f"--a:{share:.3f}"))
    return el("tr", el("th", label, scope="row"), cells, el("td", f"{total:,}", class_="sum"))


def label_distributions(report: Report) -> Html | None:
    """The section of each model's label distribution, and of the KL divergence of its label probabilities."""
    metrics, labels = report["metrics"], report["task_details"]["labels"]
    if not labels:
        return None
    classes = [f"l{i % 8}" for i in range(len(labels))]
    names = [words(label) for label in labels]
    rows: list[TableRow] = []
    truth = [sum(row) for row in next(iter(metrics.values()))["confusion"]["counts"]]
    if sum(truth):
        bars = stacked(list(zip(classes, names, truth, strict=True)), "Truth")
        rows.append((el("span", "Truth", class_="model"), [bars, NONE], None))
    for model, figures in metrics.items():
        totals = [sum(column) for column in zip(*figures["confusion"]["counts"], strict=True)]
        parts = list(zip([*classes, "invalid"], [*names, "invalid"], totals, strict=True))
        cells = [stacked(parts, model_title(model)), _kl_cell(figures.get("label_kl_interval"))]
        rows.append((model_heading(model), cells, model_class(model)))
    caption = (
        "Labels of the rows that have a true label; "
        "mean KL divergence (nats) from the teacher’s label probabilities"
    )
    shown = legend([*zip(classes, names, strict=True), ("invalid", "invalid")])
    return el("div", shown, table(caption, ["", "Labels", "KL from teacher"], rows, class_="shares"))


def _kl_cell(kl: Mapping[str, Any] | None) -> Html:
    if not kl or kl["value"] is None:
        return number_cell(NONE)
    low, high = significant(kl["low"], 2), significant(kl["high"], 2)
    return number_cell(significant(kl["value"], 2), f"{low}–{high}")
