"""Answers and rows in the models' tokens are held against their limits before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_distill.errors import ConfigError
from mlx_distill.models.hub import find_cached
from mlx_distill.pipeline import run
from mlx_distill.storage import read_manifest

TASK = {
    "name": "mail",
    "system": "",
    "user": "{text}",
    "label": "kind",
    "schema": {
        "type": "object",
        "properties": {"kind": {"type": "string", "enum": ["ham", "spam"]}, "why": {"type": "string"}},
    },
}


def recorded(folder: Path, task: dict[str, Any], *, long: int = 0, **overrides: Any) -> dict[str, Any]:
    """What prepare records of 20 rows, of which the first ``long`` have a long text and a long reason."""
    rows = [
        {"text": f"mail {i}" + " and more" * 40 * (i < long), "kind": ["ham", "spam"][i % 2]}
        | ({"why": "because " * 30} if i < long else {"why": "so"})
        for i in range(20)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "task.yaml").write_text(yaml.safe_dump({**TASK, **task}), encoding="utf-8")
    recipe = {"name": "mail", "task": "task.yaml", "teacher": "asset:models/tiny-qwen3"}
    recipe |= {"student": "asset:models/tiny-gpt-oss"}
    recipe |= {"data": {"sources": [{"path": "rows.jsonl"}], "near_duplicates": 0}}
    recipe["data"] |= {"valid_fraction": 0, "test_fraction": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(folder / "recipe.yaml", folder / "run", overrides=overrides, only="prepare")
    manifest = read_manifest(folder / "run" / "data")
    assert manifest is not None
    return dict(manifest.recorded)


def test_tokens_are_counted_and_rows_and_answers_beyond_the_limits_named(tmp_path: Path) -> None:
    facts = recorded(tmp_path, {"max_answer_tokens": 60}, long=2, **{"teach.max_length": 100})
    teacher, student = facts["tokens"]["teacher"], facts["tokens"]["student"]
    assert teacher["rows"]["counted"] == student["rows"]["counted"] == 20
    assert teacher["rows"]["too_long"] == 2 and student["rows"]["too_long"] == 0
    assert teacher["answers"]["too_long"] == student["answers"]["too_long"] == 2
    assert 0 < teacher["answers"]["median"] < 60 < teacher["answers"]["longest"] < teacher["rows"]["longest"]
    said = [text for text in facts["warnings"] if "tokens" in text]
    longest = teacher["rows"]["longest"]
    assert len(said) == 3 and said[0].startswith(
        "2 of 20 answers have more than max_answer_tokens: 60 of the teacher's tokens (the longest "
    )
    assert said[1].startswith(
        f"2 of 20 training rows have more than teach.max_length: 100 of the teacher's tokens (the longest "
        f"{longest}) and will be left out"
    )
    assert int(said[1].split("teach.max_length: ")[-1].split()[0]) >= longest  # the fix suffices
    assert "student" in said[2]


def test_limits_that_nearly_nothing_fits_are_an_error_with_the_one_that_would(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20 of 20 answers have more than max_answer_tokens: 4") as caught:
        recorded(tmp_path, {"max_answer_tokens": 4})
    assert "write max_answer_tokens: " in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="20 of 20 training rows have more than distill") as caught:
        recorded(tmp_path, {}, **{"distill.max_length": 8})
    assert "write distill.max_length: " in (caught.value.fix or "")
    assert not [text for text in recorded(tmp_path, {})["warnings"] if "tokens" in text]


def test_models_that_are_not_on_this_machine_are_not_counted(tmp_path: Path) -> None:
    facts = recorded(tmp_path, {"max_answer_tokens": 4}, teacher="org/none-such", student="org/none-such")
    assert facts["tokens"] == {}


def test_the_tokenizer_of_a_downloaded_model_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--small" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--small" / "refs").mkdir()
    (tmp_path / "models--org--small" / "refs" / "main").write_text("a" * 40)
    assert find_cached("org/small", "tokenizer.json") is None
    (snapshot / "tokenizer.json").write_text("{}")
    assert find_cached("org/small", "tokenizer.json") == snapshot
    assert find_cached("org/small", "tokenizer.json", "b" * 40) is None
    assert (
        find_cached("org/..small", "tokenizer.json") is None and find_cached("./a", "tokenizer.json") is None
    )
