"""Edge cases in a run: each model answers them after its rows, and the report says how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.small_chain import finished

from mlx_distill import pipeline
from mlx_distill.errors import ConfigError
from mlx_distill.report import render_html
from mlx_distill.status import Plan
from mlx_distill.storage import read_json

pytestmark = pytest.mark.slow
CASES = [
    {"id": "e1", "kind": "empty", "text": " ", "expect": [{"error": "bad row"}]},
    {"id": "e2", "kind": "empty", "expect": [{"error": "bad row"}]},
    {"id": "e3", "kind": "empty", "text": "", "expect": [{"answer": {}}]},  # not so: it is refused
    {
        "id": "l1",
        "kind": "very_long",
        "text": {"text": "a red heron ", "repeat": 20_000},
        "expect": [{"error": "prompt too long"}, {"answer": {}}],
    },
    {"id": "s1", "kind": "other_scripts", "text": "\u4e00\u53ea\u9e5f", "expect": [{"answer": {}}]},
]


def test_a_run_with_edge_cases(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished(), folder)
    recipe, task = folder / "recipe.yaml", folder / "task.yaml"
    overrides = ["evaluate.edge_cases=true", "evaluate.max_rows=2", "evaluate.models=[teacher]"]
    with pytest.raises(ConfigError, match="no edge_cases"):
        pipeline.run(recipe, folder / "out", overrides=overrides, dry_run=True)
    task.write_text(yaml.safe_dump({**yaml.safe_load(task.read_text()), "edge_cases": "cases.jsonl"}))
    (folder / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES))
    pipeline.run(recipe, folder / "out", overrides=overrides, only="evaluate")
    report = read_json(folder / "out" / "report.json")
    figures = report["metrics"]["teacher"]["edge_cases"]
    assert figures["did"] == {"bad row": 3, "prompt too long": 1, "answer": 1}
    assert [row["id"] for row in figures["rows"]] == ["e3"]
    assert figures["kinds"]["very_long"]["value"] == 1 and figures["kinds"]["empty"]["n"] == 3
    assert 'id="edge-cases"' in render_html(report)

    def state() -> str:
        plan = pipeline.run(recipe, folder / "out", overrides=overrides, dry_run=True)
        assert isinstance(plan, Plan)
        return next(row["state"] for row in plan.stages if row["writes"].endswith("evaluations/teacher"))

    assert state() == "current"
    (folder / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES[1:]))
    assert state() != "current"  # other cases are asked anew
