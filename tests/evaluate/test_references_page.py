"""The examples of docs/references.md are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.pages import DOCS, code_blocks, write_files

from mlx_distill.evaluate.edge_cases import ERRORS
from mlx_distill.evaluate.references import reference_metrics
from mlx_distill.metrics import upper_limit_of_none
from mlx_distill.tasks.references import CHECKER_KEYS
from mlx_distill.tasks.task import load_task

PAGE = (DOCS / "references.md").read_text(encoding="utf-8")
BLOCKS = code_blocks(DOCS / "references.md")


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(BLOCKS, tmp_path)
    for (language, name, text), following in zip(BLOCKS, [*BLOCKS[1:], ("", "", "")], strict=True):
        if language == "python" and not name:
            exec(compile(text, "docs/references.md", "exec"), {})
            assert following[0] == "text"
            assert capsys.readouterr().out == following[2]
    answer = {
        "verses": ["Romans 655:908", "Luke 15:20"],
        "themes": ["hope"],
        "instruments": ["harp", "kazoo"],
    }
    row = {"id": "1", "answer": answer, "fields": {}, "input": "as in Luke 15:20"}
    figures = reference_metrics([row], load_task("verses.yaml", tmp_path))
    assert (figures["hallucination_rate"]["value"], figures["hallucination_rate"]["n"]) == (2 / 5, 5)
    assert figures["references"]["verses"]["support"]["supported"]["value"] == 0.5
    assert figures["references"]["verses"]["corrected"]["checked"] == 3


def test_the_page_names_what_there_is() -> None:
    table = re.findall(r"^\| `([\w:]+)` \|", PAGE.split("### The rates")[0], re.M)
    assert table == [*CHECKER_KEYS, "module:function"]
    assert all(f"`{kind}`" in PAGE for kind in ERRORS)
    assert f"at most {100 * upper_limit_of_none(50):.1f} %" in PAGE
