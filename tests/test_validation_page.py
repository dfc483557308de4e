"""The examples of docs/validation.md are run, with a tiny model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.pages import DOCS, code_blocks
from helpers.small_run import write_recipe

from mlx_distill.cli import cli
from mlx_distill.recipe import load_recipe

PAGE = DOCS / "validation.md"
BLOCKS = code_blocks(PAGE)
_TEACH = {"steps": 2, "accumulate": 1, "batch_size": 4, "lora_rank": 4, "evaluate_every": 0}


@pytest.mark.slow
def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, teach=_TEACH)
    outputs = []
    for language, _, text in BLOCKS:
        if language == "sh":
            for line in text.splitlines():
                result = runner.invoke(cli, shlex.split(line)[1:])
                assert result.exit_code == 0, result.output
                outputs.append(result.stdout)
        elif language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        else:
            recipe = yaml.safe_load(path.read_text()) | yaml.safe_load(text)
            other = path.with_name("other.yaml")
            other.write_text(yaml.safe_dump(recipe))
            load_recipe(other)
    assert "2 trainings: teach on" in outputs[0] and "answers: teacher 40 rows" in outputs[0]
    assert "Teacher before:" in outputs[1] and "page: cv/validation.html" in outputs[1]
    assert "'n': 40" in capsys.readouterr().out
