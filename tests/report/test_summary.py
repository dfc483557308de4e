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
from mlx_distill.storage import write_json


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
    assert result._repr_html_().count("<tr>") == 1 + len(MODELS)
    short = result.to_dict()
    assert json.loads(json.dumps(short, allow_nan=False))["metrics"]["student"]
    assert "curves" not in short


def test_a_report_of_another_format_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"format": 9})
    with pytest.raises(FileError, match="not a report of format 1"):
        read_report(tmp_path)
