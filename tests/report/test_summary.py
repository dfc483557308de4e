"""The result of a run: written, read back, shown in a terminal and a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import (
    MODELS,
)

from mlx_distill.errors import FileError
from mlx_distill.report import read_report, write_report
from mlx_distill.report.summary import _number_columns
from mlx_distill.storage import write_json
from mlx_distill.text import NONE


def test_report_is_written_read_and_shown(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, report = run
    result = write_report(tmp_path, report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert read_report(tmp_path).report == read_report(tmp_path / "report.json").report == report
    assert result.metrics["student"]["accuracy"]["n"] == 60
    lines = str(result).splitlines()
    lines = lines[lines.index("try: 60 held-out rows, 95% intervals") :]
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"
    assert len({len(line) for line in lines[2 : 3 + len(MODELS)]}) == 1  # columns are aligned
    assert max(map(len, lines[:-1])) <= 120
    assert lines[2].split()[-3:] == ["KL", "ECE", "rows/min"] and any(
        line.startswith("KL: ") for line in lines
    )
    kl = report["metrics"]["student"]["label_kl_interval"]["value"]
    assert f"{kl:.3f}" in next(line for line in lines if line.startswith("Student  "))
    assert result._repr_html_().count("<tr>") == 1 + len(MODELS)
    short = result.to_dict()
    assert json.loads(json.dumps(short, allow_nan=False))["metrics"]["student"]
    assert "curves" not in short


def test_known_probabilities_give_the_calibration_error_and_models_without_it_have_none() -> None:
    fitted = {"calibration": {"before": {"ece": 0.2}}}
    known = {"known_probabilities": {"calibration_error": 0.031}, **fitted}
    heads, shows = zip(*_number_columns({"teacher": known, "student": fitted}), strict=True)
    assert heads == ("ECE",) and (shows[0](known), shows[0](fitted)) == ("3.1\u202f%", NONE)
    ((head, show),) = _number_columns({"teacher": {}, "student": fitted})
    assert (head, show(fitted), show({})) == ("ECE", "20.0\u202f%", NONE)
    assert _number_columns({"teacher": {"calibration": None}}) == []


def test_a_report_of_another_format_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"format": 9})
    with pytest.raises(FileError, match="not a report of format 1"):
        read_report(tmp_path)
