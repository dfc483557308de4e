"""A recipe without a task fine-tunes the teacher on chats, and measures the loss on held-out ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mlx_distill.data.rows import to_example
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.graph import graph
from mlx_distill.infer.analyze import find_model
from mlx_distill.metrics.intervals import ratio_estimate
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.report import RunReport, read_report
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import CHATS

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TINY = "asset:models/tiny-qwen3"


def chat(number: int, answer: str | None = None) -> dict[str, Any]:
    turns = [
        {"role": "system", "content": f"You are calculator {number % 3}."},
        {"role": "user", "content": f"What is {number} plus {number}?"},
        {"role": "assistant", "content": answer or f"It is {2 * number}."},
    ]
    return {"messages": turns}


def write_recipe(folder: Path, rows: list[dict[str, Any]], **blocks: Any) -> Path:
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "chats",
        "teacher": TINY,
        "data": {"sources": [{"path": "chats.jsonl"}], "test_fraction": 0, "valid_fraction": 0.2},
        "teach": {
            "steps": 3,
            "batch_size": 4,
            "accumulate": 1,
            "learning_rate": 2e-3,
            "loss_on": "all",
            "evaluate_every": 3,
        },
        **blocks,
    }
    path = folder / "chats.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_a_chat_is_kept_whole() -> None:
    turns = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "First, I ask.", "weight": 0},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    example = to_example({"messages": turns, "mood": "calm", "id": 4}, CHATS, "x:1")
    assert example.answer is None
    assert example.id == "4"
    assert dict(example.fields) == {"mood": "calm"}
    assert [turn.trained for turn in example.messages] == [True, False, True, True]
    assert example.messages[-1].extra["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    # The text of an answer is nobody's JSON, and is not normalised.
    assert to_example(chat(1, '{"a":1} ﬁ'), CHATS, "x:1").messages[-1].content == '{"a":1} ﬁ'
    pair = to_example({"prompt": "Hello?", "completion": "Yes."}, CHATS, "x:1")
    assert [turn.content for turn in pair.messages] == ["Hello?", "Yes."]
    alpaca = to_example({"instruction": "Say hello.", "output": "Hello."}, CHATS, "x:1")
    assert [turn.role for turn in alpaca.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "b"}, "x:1: no chat: the row has text, label"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "x:1: no assistant turn"),
        ({"messages": []}, "x:1: no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "x:1: no user turn"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yes", "weight": 0},
                ]
            },
            "x:1: no turn of the assistant is to be trained",
        ),
        (
            {"messages": [*chat(1)["messages"], {"role": "user", "content": "Sure?"}]},
            "x:1: the last turn is the user's",
        ),
    ],
)
def test_a_row_that_is_no_chat_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_example(row, CHATS, "x:1")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"student": TINY}, "a student, and no task that it learns"),
        ({"evaluate": {"repeats": 2}}, r"evaluate.repeats: the recipe has no task"),
        ({"data": {"sources": [{"path": "a", "answer_after": "#"}]}}, "answer_after: the recipe has no task"),
        ({"data": {"folds": 3, "sources": []}}, "a cross-validation, and the recipe has no task"),
    ],
)
def test_what_needs_a_task_is_refused(tmp_path: Path, blocks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path, [], **blocks))


def test_a_goal_names_a_figure_of_chats(tmp_path: Path) -> None:
    goals = [{"model": "teacher", "metric": "accuracy", "at_least": 0.5}]
    recipe = load_recipe(write_recipe(tmp_path, [chat(1)], goals=goals))
    with pytest.raises(ConfigError, match="no figure 'accuracy'"):
        graph(recipe, recipe.load_task())


def test_the_ratio_of_totals_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(5, 60, 40)
        nats = rng.normal(2.0, 0.5, 40) * tokens  # tokens of one row share its difficulty
        estimate = ratio_estimate(nats, tokens)
        covered += estimate["low"] <= 2.0 <= estimate["high"]
    assert 180 <= covered <= 199
    assert ratio_estimate([], []) == {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.slow
def test_a_run_measures_the_loss_before_and_after(tmp_path: Path) -> None:
    # Two answers to one question are two rows; an equal chat is one.
    rows = [*(chat(number) for number in range(30)), chat(1, "Two, I think."), chat(2)]
    recipe, out = write_recipe(tmp_path, rows, evaluate={"audit_rows": 3}), tmp_path / "out"
    goals = [{"model": "teacher", "metric": "perplexity", "at_most": 1e9}]
    result = run(recipe, out, overrides={"goals": goals}, progress=NullProgress())
    assert isinstance(result, RunReport)
    assert sum(result.report["data"]["rows"].values()) == 31
    before, after = (result.metrics[name] for name in ("teacher_before", "teacher"))
    assert after["loss"]["value"] < before["loss"]["value"]
    assert after["perplexity"]["value"] == pytest.approx(math.exp(after["loss"]["value"]))
    assert 0 <= after["token_accuracy"]["value"] <= 1
    assert result.report["goals"][0]["state"] == "met"
    page = result.html.read_text(encoding="utf-8")
    assert "Loss on held-out chats" in page and "before the training" in page
    assert "Audit of the training" in page
    audit = result.report["audit"]
    # Of each chat the turns that are trained: "It is 12." and the token that ends it, which has no bytes.
    sizes = [
        line["bytes"] for _, line in read_jsonl(out / "audit" / "losses.jsonl") if line["set"] == "valid"
    ]
    assert len(sizes) == 6 and set(sizes) <= {len("It is 2."), len("It is 12."), len("Two, I think.")}
    assert audit["changes"]["teacher"]["general"]["n"] == 49
    assert read_report(out).lines()[0].startswith("chats: ")
    _assert_equals_training_loss(out, after["loss"]["value"])
    trained_on = read_trained_on(out / "teacher")
    assert trained_on is not None and trained_on.task is None
    with pytest.raises(ConfigError, match="trained on chats of any kind"):
        find_model(out, None, NullProgress())
    again = run(recipe, out, progress=NullProgress())
    assert isinstance(again, RunReport)
    assert again.metrics == result.metrics


def _assert_equals_training_loss(out: Path, loss: float) -> None:
    """The loss of the evaluation is the last validation loss of the training, which has the same chats."""
    rows = [json.loads(line) for line in (out / "teacher" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["valid_loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_without_held_out_chats_nothing_is_measured(tmp_path: Path) -> None:
    overrides = {"data.valid_fraction": 0, "teach.steps": 1}
    result = run(
        write_recipe(tmp_path, [chat(n) for n in range(4)]),
        tmp_path / "out",
        overrides=overrides,
        progress=NullProgress(),
    )
    assert isinstance(result, RunReport)
    assert result.metrics["teacher"]["loss"]["value"] is None
    assert "No chat was held out" in result.html.read_text(encoding="utf-8")
