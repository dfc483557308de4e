"""The examples of docs/data.md are run: its files are written, its recipes prepared, its rows read."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import DOCS, code_blocks

from mlx_distill.data.prepare import prepare
from mlx_distill.data.rows import to_example
from mlx_distill.recipe import load_recipe
from mlx_distill.tasks.task import load_task

PAGE = DOCS / "data.md"
BLOCKS = code_blocks(PAGE)
HEAD = "name: page\ntask: task.yaml\nteacher: asset:models/tiny-qwen3\nstudent: asset:models/tiny-gpt-oss\n"
RAIN = {"verdict": "RECOMMENDED", "score": 95}


def prepared(recipe: Path) -> list[dict[str, Any]]:
    loaded = load_recipe(recipe, ["data.valid_fraction=0", "data.test_fraction=0"])
    folder = recipe.with_suffix("")
    folder.mkdir()
    prepare(loaded.data, loaded.load_task(), loaded.base, folder)
    texts = [(folder / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "test")]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import disable_progress_bars

    disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    counts: list[int] = []
    for number, (language, name, text) in enumerate(BLOCKS):
        if language == "sql":
            with sqlite3.connect(name) as database:
                database.executescript(text)
            database.close()
        elif language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        elif name == "recipe":
            recipe = tmp_path / f"{number}.yaml"
            recipe.write_text(HEAD + text, encoding="utf-8")
            rows = prepared(recipe)
            assert rows[0]["answer"] == RAIN and "Rain: The rain" in rows[0]["messages"][1]["content"]
            counts.append(len(rows))
        elif "." in name:
            Path(name).write_text(text, encoding="utf-8")
    assert counts == [2, 2, 1, 1, 2, 1]


def test_every_layout_of_the_page_is_the_same_question_and_answer(tmp_path: Path) -> None:
    task_text = next(text for _, name, text in BLOCKS if name == "task.yaml")
    (tmp_path / "task.yaml").write_text(task_text, encoding="utf-8")
    task = load_task("task.yaml", tmp_path)
    rows = [json.loads(text) for _, name, text in BLOCKS if name == "row"]
    assert len(rows) == 7
    for row in rows:
        example = to_example(row, task, "docs/data.md", format="chatml" if "text" in row else "auto")
        assert example.answer == RAIN and example.messages[-2].content == "Rain: The rain came down"
