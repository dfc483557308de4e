"""The commands of docs/compare.md are run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import DOCS, code_blocks

from mlx_distill.cli import cli

PAGE = DOCS / "compare.md"
BLOCKS = code_blocks(PAGE)
ROWS = 120


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {name: text for _, name, text in BLOCKS if name}
    (tmp_path / "task.yaml").write_text(files["task.yaml"], encoding="utf-8")
    row, answer = json.loads(files["rows.jsonl"]), json.loads(files["before.jsonl"])
    broken = {"after.jsonl": (5, 40), "before.jsonl": (7,)}
    for name in ("rows.jsonl", *broken):
        with open(name, "w", encoding="utf-8") as file:
            for i in range(ROWS):
                text = '{"mood": "sad"}' if i in broken.get(name, ()) else answer["text"]
                line = {**row, "text": f"Line {i}"} if name == "rows.jsonl" else {"text": text}
                file.write(json.dumps({**line, "id": f"r{i}"}) + "\n")
    commands = [line for language, _, text in BLOCKS if language == "sh" for line in text.splitlines()]
    outputs = []
    for command in commands:
        result = runner.invoke(cli, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    facts = json.loads(next(text for text in outputs if text.startswith("{")))
    assert facts["verdict"] == "non_inferior" and facts["cases"] == {"fixed": ["r7"], "broken": ["r5", "r40"]}
    named = "both first_only second_only neither difference p method margin verdict planned_n looked cases"
    assert set(named.split()) <= facts.keys()
    for name in ("page.html", "cases.csv", "facts.json", "promptfoo.yaml", "promptfoo.jsonl"):
        assert (tmp_path / name).stat().st_size > 100
    for language, _, text in BLOCKS:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("non_inferior") and printed[1:] == ["r5 glad glad sad", "r40 glad glad sad"]
