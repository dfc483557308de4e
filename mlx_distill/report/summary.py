"""The result of a run: the report, its files, and a table for the terminal and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.evaluate.audit import audit_lines
from mlx_distill.evaluate.categories import FOLDER
from mlx_distill.evaluate.goals import goal_text, require_goals
from mlx_distill.report.collect import FORMAT
from mlx_distill.report.environment import render
from mlx_distill.report.page import final_model, render_html
from mlx_distill.report.run_folders import left_out_text
from mlx_distill.run_models import model_phrase, model_title
from mlx_distill.storage import read_json, write_json, write_text
from mlx_distill.text import NONE, interval, percent, significant, words

_WIDTH = 110  # columns of a sentence in the terminal


@dataclass(frozen=True)
class RunReport:
    """The report of a run.

    ``path`` is ``report.json`` and ``report`` its content. ``str()`` and notebooks show a compact table.
    """

    path: Path
    report: Mapping[str, Any] = field(repr=False)

    @property
    def html(self) -> Path:
        """The HTML page, in the same folder as ``report.json``."""
        return self.path.with_suffix(".html")

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics of each model on the main held-out set; a rate is ``{"value", "low", "high", "n"}``."""
        return self.report["metrics"]

    @property
    def diagnosis(self) -> Sequence[Mapping[str, str]]:
        """What is wrong, each with ``problem``, ``reason`` and ``fix``; empty for a good result."""
        return self.report.get("diagnosis", ())

    @property
    def left_out(self) -> list[Mapping[str, str]]:
        """What is in the run's folder and belongs to other models than those of the report, or is not asked
        for: each with ``folder``, ``reason`` and ``fix``.
        """
        return list(self.report.get("left_out", ()))

    def to_dict(self) -> dict[str, Any]:
        """The short form for ``--json``: paths, names and metrics, without rows and curves."""
        short = {
            key: self.report[key]
            for key in ("name", "task", "created", "main_set", "sets", "goals", "metrics")
        } | {"answer": self.answer, "diagnosis": list(self.diagnosis), "left_out": self.left_out}
        if audit := self.report.get("audit"):
            short["audit"] = {key: audit[key] for key in ("bits_per_byte", "changes", "warnings")}
        return {"report": str(self.path), "html": str(self.html), **short}

    def require_goals(self) -> None:
        """Raise a :class:`QualityGateError` where a goal of the recipe is not met."""
        require_goals(self.report["goals"])

    @property
    def answer(self) -> Mapping[str, Any] | None:
        """Whether the final model is as good as the one that it replaces: ``verdict``, ``sentence``,
        ``advice``, ``margin``, ``difference``; None where nothing was compared.
        """
        return self.report.get("answer")

    def lines(self) -> list[str]:
        """The answer, the table for the terminal, then the path of the page."""
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
            *_answer_lines(self.answer),
            f"{self.report['name']}: {total:,} held-out rows, {self.report['confidence']:.0%} intervals",
            "",
            *text,
            *_legend(heads),
            "",
            *(f"{words(goal['state'])}: {goal_text(goal)}" for goal in self.report["goals"]),
            *([""] if self.report["goals"] else []),
            *(line for entry in self.diagnosis for line in _finding_lines(entry)),
            *self._error_lines(),
            *self._audit_lines(),
            f"report: {self.html}",
        ]

    def _audit_lines(self) -> list[str]:
        """The main figures of the audit, and what the report leaves out."""
        figures = self.report.get("audit")
        lines = audit_lines(figures) if figures else []
        return [*lines, *map(left_out_text, self.left_out)]

    def _error_lines(self) -> list[str]:
        """The errors of the model that the run is for, by kind, and where their rows are."""
        model = final_model(self.report)
        categories = self.report["metrics"][model].get("error_categories")
        if not categories:
            return []
        counts = [f"{entry['count']:,} {words(name)}" for name, entry in categories.items() if entry["count"]]
        folder = self.path.parent / FOLDER / f"{model}.csv"
        return [f"errors of {model_phrase(model)}: {', '.join(counts) or 'none'}; rows: {folder}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        heads, rows = _cells(self.report)
        context: dict[str, Any] = {"report": self.report, "answer": self.answer, "findings": self.diagnosis}
        context["audit"] = self._audit_lines()
        return render("summary.html.j2", heads=heads, rows=rows, **context)


def _answer_lines(answer: Mapping[str, Any] | None) -> list[str]:
    if not answer:
        return []
    texts = [answer["sentence"], *([answer["advice"]] if answer["advice"] else [])]
    return [line for text in texts for line in wrap(text, _WIDTH)] + [""]


def _finding_lines(entry: Mapping[str, str]) -> list[str]:
    return [f"problem: {entry['problem']}.", f"  reason: {entry['reason']}.", f"  fix: {entry['fix']}."]


def _cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns, and the rows of the table."""
    task = report["task_details"]
    if task.get("is_chats"):
        return _chat_cells(report)
    if task["label"]:
        rates = [("accuracy", "accuracy"), ("verdict_agreement", f"teacher's {words(task['label'])}")]
        if task["score"]:
            rates.append(("agreement", f"and {words(task['score'])}"))
    else:
        rates = [("answer_f1", "answer F1"), ("teacher_answer_f1", "F1 to teacher"), ("exact_match", "exact")]
    rates.append(("json_valid", "fits the task"))
    numbers = _number_columns(report["metrics"])
    rows = []
    for name, figures in report["metrics"].items():
        cells = [_rate(figures.get(key)) for key, _ in rates] + [show(figures) for _, show in numbers]
        speed = figures.get("items_per_minute")
        rows.append([model_title(name), *cells, significant(speed, 3) if speed else NONE])
    return [*[head for _, head in rates], *[head for head, _ in numbers], "rows/min"], rows


def _number_columns(models: Mapping[str, Any]) -> list[tuple[str, Callable[[Mapping[str, Any]], str]]]:
    """The columns of the label's distribution that some model has: heads, and what a model's cell shows."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    if any((figures.get("label_kl_interval") or {}).get("n") for figures in models.values()):
        columns.append(("KL", partial(_number, ("label_kl_interval", "value"), "{:.3f}".format)))
    for path in (("known_probabilities", "calibration_error"), ("calibration", "before", "ece")):
        show = partial(_number, path, percent)
        if any(show(figures) != NONE for figures in models.values()):
            return [*columns, ("ECE", show)]
    return columns


def _legend(heads: Sequence[str]) -> list[str]:
    said = {"KL": "from the teacher's label probabilities, in nats", "ECE": "expected calibration error"}
    found = [f"{head}: {said[head]}" for head in heads if head in said]
    return ["", "; ".join(found)] if found else []


def _number(path: Sequence[str], show: Callable[[float], str], figures: Mapping[str, Any]) -> str:
    value: Any = figures
    for key in path:
        value = (value or {}).get(key)
    return NONE if value is None else show(value)


def _chat_cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The same of a run without a task."""
    rows = []
    for name, figures in report["metrics"].items():
        numbers = [figures[key]["value"] for key in ("loss", "perplexity")]
        cells = [NONE if value is None else significant(value, 4) for value in numbers]
        rows.append([model_title(name), *cells, _rate(figures["token_accuracy"])])
    return ["loss", "perplexity", "token accuracy"], rows


def _rate(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or not estimate["n"]:
        return NONE
    shown = f" [{interval(estimate)}]" if estimate["low"] is not None else ""
    return f"{percent(estimate['value'])}{shown}"


def write_report(run: str | Path, report: Mapping[str, Any]) -> RunReport:
    """Write ``report.json`` and ``report.html`` into the run's folder, each atomically."""
    run = Path(run)
    page = render_html(report)
    write_json(run / "report.json", report)
    write_text(run / "report.html", page)
    return RunReport(run / "report.json", report)


def read_report(run: str | Path) -> RunReport:
    """Read the report of a run from its folder or its ``report.json``.

    Raises:
        FileError: there is none, or it has another format.
    """
    path = Path(run) / "report.json" if Path(run).is_dir() else Path(run)
    report = read_json(path)
    if not isinstance(report, Mapping) or report.get("format") != FORMAT:
        raise FileError(f"{path}: not a report of format {FORMAT}", fix="run the evaluate stage again")
    return RunReport(path, report)
