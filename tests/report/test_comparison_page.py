"""The page of a comparison and its other files: figures without JavaScript, one script, nothing from the data
that runs.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.comparison_files import make_answers, make_rows, write_lines, write_task
from helpers.html_page import Page

import mlx_distill as md
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.compare import ModelComparison

EVIL = "<script>alert(1)</script> {{ evil }} file://x"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelComparison, Path]:
    folder = tmp_path_factory.mktemp("comparison")
    rows = make_rows(70, title=EVIL)
    rows[3]["id"] = "=1+1"
    rows[4]["text"] = f"{EVIL} {rows[4]['text']}"
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "before.jsonl", make_answers(rows, wrong=[3, 7, 9], latency_s=0.25))
    answers = make_answers(rows, wrong=[3, 20, 21], invalid=[30], latency_s=0.125)
    answers[30]["text"] = EVIL
    write_lines(folder / "after.jsonl", answers)
    names = ["page.html", "rows.html", "facts.json", "cases.csv", "promptfoo.yaml"]
    result = md.compare(
        folder / "before.jsonl",
        folder / "after.jsonl",
        str(write_task(folder)),
        folder / "rows.jsonl",
        margin="5pt",
        out=[folder / name for name in names if name != "rows.html"],
    )
    md.compare(
        *(folder / name for name in ("before.jsonl", "after.jsonl", "task.yaml", "rows.jsonl")),
        out=folder / "rows.html",
        with_rows=True,
    )
    return result, folder


def _without_script(html: str) -> str:
    """What is read without JavaScript: no script, no template."""
    return re.sub(r"<template.*?</template>|<script>.*?</script>", "", html, flags=re.DOTALL)


def test_every_figure_shows_without_javascript(written: tuple[ModelComparison, Path]) -> None:
    result, folder = written
    text = Page(_without_script((folder / "page.html").read_text())).text.replace("\u202f", " ")
    assert result.facts["sentence"] in text and result.facts["advice"] in text
    for figure in ("2 fixed", "3 broken", "64 both right", "1 both wrong", "125 ms", "250 ms"):
        assert figure in text, figure
    assert "r20, r21, r30" in text and "Without JavaScript the first 50 of 70 rows" in text
    for entry in result.facts["metrics"]:
        assert entry["title"] in text


def test_one_script_is_allowed_and_it_holds_no_data(written: tuple[ModelComparison, Path]) -> None:
    _, folder = written
    for name in ("page.html", "rows.html"):
        html = (folder / name).read_text()
        scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
        assert len(scripts) == 1 and "<script" not in re.sub(
            r"<script>.*?</script>", "", html, flags=re.DOTALL
        )
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
        assert policy and f"script-src 'sha256-{digest}'" in policy[1].replace("&#39;", "'")
        assert "default-src 'none'" in policy[1].replace("&#39;", "'") and "r20" not in scripts[0]
        tags = [attributes for _, attributes in Page(html).tags]
        assert not [
            name for attributes in tags for name in attributes if name.startswith("on") or name == "src"
        ]
        assert not re.search(r"@import|url\(|https?://", html)


def test_texts_of_the_data_are_in_the_page_only_when_asked_for(
    written: tuple[ModelComparison, Path],
) -> None:
    _, folder = written
    plain, rows = ((folder / name).read_text() for name in ("page.html", "rows.html"))
    assert "alert(1)" not in plain and "Text number" not in plain
    assert "&lt;script&gt;alert(1)" in rows and "Text number 5." in rows
    facts = json.loads((folder / "facts.json").read_text())
    assert "alert(1)" not in json.dumps(facts)
    assert facts["verdict"] == "inconclusive" and len(facts["rows"]) == 70


def test_cells_of_csv_are_no_formulas(written: tuple[ModelComparison, Path]) -> None:
    _, folder = written
    with open(folder / "cases.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 70 and lines[3]["id"] == "'=1+1" and lines[3]["change"] == "both_wrong"
    assert lines[20]["b_error"] == "false positive" and lines[20]["kind"] == "note"
    assert lines[30]["b_error"] == "invalid"


def test_promptfoo_replays_the_answers(written: tuple[ModelComparison, Path]) -> None:
    _, folder = written
    config = yaml.safe_load((folder / "promptfoo.yaml").read_text())
    assert config["tests"] == "file://promptfoo.jsonl" and config["providers"][0]["id"] == "echo"
    assert [prompt["raw"] for prompt in config["prompts"]] == ["{{a}}", "{{b}}"]
    text = (folder / "promptfoo.jsonl").read_text()
    tests = [json.loads(line) for line in text.splitlines()]
    assert not re.search(r"\{\{|\{%|\{#", text)  # nothing of the data is a template there
    assert not [t for t in tests for value in t["vars"].values() if value.startswith("file:")]
    right = {t["metadata"]["id"]: _is_right(t, "b") for t in tests}
    assert [id for id, value in right.items() if not value] == ["=1+1", "r20", "r21", "r30"]
    schema = config["defaultTest"]["assert"][0]
    assert schema["type"] == "is-json" and schema["value"]["required"] == ["colour", "points"]


def _is_right(test: dict[str, Any], side: str) -> bool:
    """What promptfoo's is-json assertion does."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(test["vars"][side]), test["assert"][0]["value"])
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_other_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out page.pdf"):
        md.compare("nothing", "nothing", out="page.pdf")
