"""The examples of docs/analyze.md are run, with a small model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import DOCS, code_blocks, write_files
from helpers.small_model import write_small_model

from mlx_distill.cli import cli

PAGE = DOCS / "analyze.md"
BLOCKS = code_blocks(PAGE)


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_small_model(tmp_path / "model")
    write_files(BLOCKS, tmp_path)
    for language, _, text in BLOCKS:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        elif language == "sh":
            for line in text.splitlines():
                result = runner.invoke(cli, shlex.split(line)[1:])
                assert "without a valid answer (" in result.stderr, result.output
                assert "bad row 1" in result.stderr, result.output
    answers = {
        name: [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        for name in ("answers.jsonl", "short.jsonl", "labels.jsonl")
    }
    for name, rows in answers.items():
        assert [row["id"] for row in rows] == ["s1", "s2", "s3", "s4"]
        assert "no field 'lyrics'" in rows[2]["error"] and rows[1]["prompt_tokens"]
        assert (name == "labels.jsonl") != bool(rows[1].get("tokens"))
    keys = "id text answer label score label_probs error error_kind prompt_tokens tokens fields cut"
    assert set(answers["answers.jsonl"][0]) == set(keys.split())
    keys = "id label probabilities calibrated error error_kind prompt_tokens fields cut"
    assert set(answers["labels.jsonl"][0]) == set(keys.split())
    assert sum(answers["labels.jsonl"][0]["probabilities"].values()) == pytest.approx(1)
    assert answers["answers.jsonl"][3]["cut"] is None
    example = json.loads(re.search(r'"cut": (\{.*\})', PAGE.read_text(encoding="utf-8")).group(1))  # type: ignore[union-attr]
    assert answers["short.jsonl"][3]["cut"] == example
