"""Models that answer the rows of a comparison: their answers are kept, continued, and told apart; rows that
were trained on, and rows that were looked at often.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.comparison_files import make_rows, write_files, write_lines, write_task
from helpers.report_runs import make_run, make_task
from helpers.small_model import write_small_model

import mlx_distill as md
from mlx_distill.data.chat import answer_ids
from mlx_distill.data.rows import to_item
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.comparison_text import WORN_AFTER, looked_note
from mlx_distill.evaluate.held_out import count_look, leaked_ids
from mlx_distill.evaluate.token_view import token_view
from mlx_distill.infer.analyze import Analyzer
from mlx_distill.infer.predict import item_prompt
from mlx_distill.progress import NullProgress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    write_small_model(folder)
    return folder


def test_the_answers_of_a_model_are_kept_and_continued(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, "max_answer_tokens: 2\n")
    rows = write_lines(tmp_path / "rows.jsonl", make_rows(10))
    settings: dict[str, Any] = {"answers": tmp_path / "kept", "batch_size": 1}
    asked: list[int] = []
    original = Analyzer._ask

    def ask(self: Analyzer, items: Any, *others: Any) -> Any:
        if len(asked) == 1:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(items))
        return original(self, items, *others)

    monkeypatch.setattr(Analyzer, "_ask", ask)
    with pytest.raises(KeyboardInterrupt):
        md.compare(model, model, str(task), rows, **settings)
    first = md.compare(model, model, str(task), rows, **settings)
    assert asked == [8, 0, 2]  # chunks of eight batches; the finished one is not asked again
    again = md.compare(model, model, str(task), rows, **settings)
    assert asked == [8, 0, 2] and again.facts["difference"] == first.facts["difference"]
    assert again.facts["a"]["size_bytes"] > 0 and again.facts["a"]["latency_s"] > 0
    md.compare(model, model, str(task), rows, constrained=True, **settings)
    assert len(asked) > 3 and len(list((tmp_path / "kept").glob("small-*.jsonl"))) == 2


def test_a_model_without_rows_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows that it could answer"):
        md.compare(model, model, str(write_task(tmp_path)))


def test_rows_that_were_trained_on_are_found(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "input": f"Text  number {i}."} for i in range(4)]
    assert leaked_ids(rows, [tmp_path]) is None
    (tmp_path / "data").mkdir()
    chats = [[{"role": "user", "content": text}] for text in ("text number 2.", "Another")]
    write_lines(tmp_path / "data" / "train.jsonl", [{"messages": chat} for chat in chats])
    assert leaked_ids(rows, [tmp_path]) == ["r2"]


def test_looks_are_counted_once_for_each_comparison(tmp_path: Path) -> None:
    for i in range(WORN_AFTER + 1):
        count_look([tmp_path], "rows", f"c{i}")
    looked = count_look([tmp_path], "rows", "c0")
    assert looked["times"] == WORN_AFTER + 1 and looked["first"] <= looked["last"]
    assert count_look([tmp_path], "other rows", "c0")["times"] == 1
    assert "worn" in (looked_note({"looked": looked}) or "")
    assert looked_note({"looked": {**looked, "times": WORN_AFTER}}) is None
    assert count_look([], "rows", "c0") == {"times": None, "first": None, "last": None}
    assert json.loads((tmp_path / "looks.json").read_text())["rows"]["c3"]


def test_the_pieces_of_a_text_have_the_probability_of_their_tokens(model: Path, tmp_path: Path) -> None:
    task = md.load_task(str(write_task(tmp_path)))
    raw = make_rows(2)
    rows = write_lines(tmp_path / "rows.jsonl", raw)
    text = json.dumps(raw[1]["answer"])
    (one,) = token_view((model, model), rows, (task, task), {"r1": text}, NullProgress())
    assert one["id"] == "r1" and "".join(span["text"] for span in one["spans"]) == text
    assert all(span["a"] == span["b"] for span in one["spans"]) and len(one["spans"]) > 5
    loaded, tokenizer = md.load(model)
    prompt = item_prompt(tokenizer, to_item(raw[1], task))
    answer = answer_ids(tokenizer, text)
    logits = loaded(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
    own = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
    known = mx.array(sorted(tokenizer.get_vocab().values()))  # not the padding of the head
    expected = (own - mx.logsumexp(logits[:, known], axis=-1)).sum().item()
    assert sum(math.log(span["a"]) for span in one["spans"]) == pytest.approx(expected, rel=1e-3)


def test_files_have_no_tokens(tmp_path: Path) -> None:
    files = write_files(tmp_path, 10)
    with pytest.raises(ConfigError, match="has answers and no model"):
        md.compare(files["a"], files["b"], str(files["task"]), files["rows"], tokens=["r1"])


def test_a_model_answers_the_held_out_rows_of_a_run(model: Path, tmp_path: Path) -> None:
    task = make_task(max_answer_tokens=2)
    run = tmp_path / "run"
    make_run(run, task, models=("teacher",), sets={"test": 3})
    lines = (run / "evaluations" / "teacher" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "data").mkdir()
    write_lines(
        run / "data" / "test.jsonl",
        [
            {
                "id": row["id"],
                "messages": [{"role": "user", "content": row["input"]}],
                "fields": row["fields"],
                "answer": row["truth"],
                "set": "test",
            }
            for row in map(json.loads, lines[1:])
        ],
    )
    result = md.compare(run, model, task, answers=tmp_path / "kept")
    assert result.facts["n"] == 3 and result.facts["a"]["name"] == "Teacher"
    assert result.facts["b"]["name"] == "small" and result.facts["b"]["json_valid"]["value"] == 0
    assert result.facts["looked"]["times"] == 1 and (run / "looks.json").is_file()
