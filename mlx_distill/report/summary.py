"""What a run returns: the report, where it lies, and how it looks in a terminal and a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.report.markup import el
from mlx_distill.report.page import render_html
from mlx_distill.run_models import model_title
from mlx_distill.storage import read_json, write_json, write_text
from mlx_distill.text import NONE, interval, percent, significant, words


@dataclass(frozen=True)
class RunReport:
    """The report of a run.

    ``path`` is ``report.json``; ``report`` its content. ``str()`` is a compact table for the terminal, and a
    notebook shows one too.
    """

    path: Path
    report: Mapping[str, Any] = field(repr=False)

    @property
    def html(self) -> Path:
        """The page for people, beside ``report.json``."""
        return self.path.with_suffix(".html")

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The figures of each model on the main held-out set; a rate is ``{"value", "low", "high", "n"}``."""
        return self.report["metrics"]

    def to_dict(self) -> dict[str, Any]:
        """The short form for ``--json``: paths, names and figures, without rows and curves."""
        short = {
            key: self.report[key]
            for key in ("name", "task", "created", "main_set", "sets", "goals", "metrics")
        }
        return {"report": str(self.path), "html": str(self.html), **short}

    def lines(self) -> list[str]:
        """The table for the terminal, then where the page is."""
        heads, rows = _cells(self.report)
        table = [["model", *heads], *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        text = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        total = self.report["sets"][self.report["main_set"]]
        return [
            f"{self.report['name']}: {total:,} held-out rows, {self.report['confidence']:.0%} intervals",
            "",
            *text,
            "",
            f"report: {self.html}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        heads, rows = _cells(self.report)
        left, cell = (
            "text-align:left;padding:.25em .9em .25em 0",
            "text-align:right;padding:.25em .9em .25em 0;font-variant-numeric:tabular-nums",
        )
        head = el("tr", el("th", "model", style=left), [el("th", text, style=cell) for text in heads])
        body = [
            el(
                "tr",
                el("th", row[0], style=left, scope="row"),
                [el("td", text, style=cell) for text in row[1:]],
            )
            for row in rows
        ]
        total = self.report["sets"][self.report["main_set"]]
        caption = el(
            "caption",
            f"{self.report['name']}: {total:,} held-out rows",
            style="text-align:left;font-weight:bold;padding-bottom:.4em",
        )
        return el("table", caption, el("thead", head), el("tbody", body))


def _cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    task = report["task_details"]
    rates = [("accuracy", "right"), ("verdict_agreement", f"teacher's {words(task['label'])}")]
    if task["score"]:
        rates.append(("agreement", f"and {words(task['score'])}"))
    rates.append(("json_valid", "valid JSON"))
    rows = []
    for name, figures in report["metrics"].items():
        cells = [
            f"{percent(found['value'])} [{interval(found)}]"
            if (found := figures.get(key)) and found["n"]
            else NONE
            for key, _ in rates
        ]
        pace = figures.get("items_per_minute")
        rows.append([model_title(name), *cells, significant(pace, 3) if pace else NONE])
    return [*[head for _, head in rates], "rows/min"], rows


def write_report(run: str | Path, report: Mapping[str, Any]) -> RunReport:
    """Write ``report.json`` and ``report.html`` into the run's folder, each whole or not at all."""
    run = Path(run)
    page = render_html(report)
    write_json(run / "report.json", report)
    write_text(run / "report.html", page)
    return RunReport(run / "report.json", report)


def read_report(run: str | Path) -> RunReport:
    """The report that a run left, from its folder or its ``report.json``.

    Raises:
        FileError: there is none, or it is of another format.
    """
    path = Path(run) / "report.json" if Path(run).is_dir() else Path(run)
    report = read_json(path)
    if not isinstance(report, Mapping) or report.get("format") != 1:
        raise FileError(f"{path}: not a report of format 1", fix="run the evaluate stage again")
    return RunReport(path, report)
