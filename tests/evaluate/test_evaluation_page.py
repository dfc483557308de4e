"""The examples of docs/evaluation.md are run, and its tables name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.pages import DOCS, code_blocks, write_files
from helpers.predictions import prediction

from mlx_distill.cli.main import cli
from mlx_distill.evaluate import conditions
from mlx_distill.evaluate.registry import METRICS
from mlx_distill.storage import write_jsonl
from mlx_distill.tasks.task import load_task

PAGE = (DOCS / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = code_blocks(DOCS / "evaluation.md")


def song(verdict: str, score: int, *themes: str, summary: str = "a song of hope") -> dict[str, Any]:
    return {"verdict": verdict, "score": score, "themes": list(themes), "summary": summary}


def write_run(folder: Path) -> None:
    """Predictions of two models: the student overestimates row 1 and gets its themes wrong."""
    truths = [song("play", 90, "hope"), song("skip", 20, "grief"), song("play", 96, "work")]
    answers = [
        truths[0],
        song("play", 97, "hope", summary="far too long a text, word after word " * 3),
        truths[2],
    ]
    for model, own in (("teacher", truths), ("student", answers)):
        rows = [
            {**prediction(i, truth, answer), "label": answer["verdict"], "score": answer["score"]}
            for i, (truth, answer) in enumerate(zip(truths, own, strict=True))
        ]
        header = {
            "format": 2,
            "model": model,
            "task": "songs",
            "set_counts": {"test": 3},
            "constrained": False,
        }
        write_jsonl(folder / "evaluations" / model / "predictions.jsonl", [header, *rows])


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(BLOCKS, tmp_path)
    Path("songs.jsonl").write_text('{"lyrics": "la", "answer": {}}\n', encoding="utf-8")
    commands = next(text for language, _, text in BLOCKS if language == "sh")  # the others need models
    for line in commands.splitlines():
        result = CliRunner().invoke(cli, [*shlex.split(line)[1:], "--dry-run"])
        assert result.exit_code == 0, result.output
        refused = CliRunner().invoke(cli, [*shlex.split(line)[1:], "--set", "goals.0.metric=acuracy"])
        assert (refused.exit_code, "no figure 'acuracy'" in refused.output) == (2, True)
    write_run(Path("runs/songs"))
    exec(compile(Path("measure.py").read_text(encoding="utf-8"), "measure.py", "exec"), {})
    teacher, student = capsys.readouterr().out.splitlines()
    assert teacher.startswith("teacher {'value': 1.0") and teacher.endswith("[]")
    assert student.endswith("['1']")


def test_the_tables_of_the_page_name_every_metric_and_test() -> None:
    metrics = re.search(r"\| metric \| options \|.*?\n\n", PAGE, re.S)
    assert metrics is not None
    first = [line.split("|")[1] for line in metrics[0].splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(first)) == list(METRICS)
    tests = re.search(r"\| part \| tests \|.*?\n\n", PAGE, re.S)
    assert tests is not None
    named = set(re.findall(r"`(\w+)`", tests[0]))
    assert named >= {*conditions.VALUE_TESTS, *conditions.DIFFERENCES}


def test_the_task_of_the_page_finds_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_distill.data.predictions import read_predictions
    from mlx_distill.evaluate.suite import evaluate_models

    write_files(BLOCKS, tmp_path)
    write_run(tmp_path)
    task = load_task("songs.yaml", tmp_path)
    rows = {name: read_predictions(tmp_path / "evaluations" / name)[1] for name in ("teacher", "student")}
    student = evaluate_models(rows, task)["by_set"]["test"]["student"]
    counts = {name: entry["count"] for name, entry in student["error_categories"].items()}
    assert counts == {
        "wrongly_played": 1,
        "false_positive": 1,
        "overestimate": 1,
        "theme_error": 1,
        "invalid": 0,
    }
    assert student["task_metrics"]["short_summary"]["value"] == pytest.approx(2 / 3)
    assert student["task_metrics"]["theme_f1"]["value"] == pytest.approx(2 / 3)
    assert student["task_comparisons"]["short_summary"]["second_only"] == 1
