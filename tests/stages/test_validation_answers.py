"""Validation rows that a model in training answers: the figures are those of an evaluation, and the training
is the one without them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import chat_run, small_run
from helpers.small_chain import TRAININGS, finished, make_context

from mlx_distill.data.chat import render
from mlx_distill.data.rows import from_row
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.figures import model_metrics
from mlx_distill.graph import graph
from mlx_distill.infer.predict import predict
from mlx_distill.models.load import load
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import TrainConfig, load_recipe
from mlx_distill.records import Prediction
from mlx_distill.runtime import active_memory
from mlx_distill.stages.context import Context, read_rows
from mlx_distill.stages.validation_answers import answer_figures, answer_measure, check_measured
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task
from mlx_distill.text import significant
from mlx_distill.train.grad_checkpoint import checkpointed_layers
from mlx_distill.train.validation import measure_answers

NAMES = ("accuracy", "json_valid", "perplexity", "token_accuracy")
TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in TIMES} for _, row in read_jsonl(folder / "metrics.jsonl")
    ]


def weights_of(folder: Path) -> dict[str, Any]:
    return {name: array.tolist() for name, array in mx.load(str(folder / "adapters.safetensors")).items()}


def expected(context: Context, folder: Path, count: int) -> dict[str, float]:
    """The figures of a trained model on the first validation rows, from the parts that make evaluations, and
    the perplexity row by row from all logits.
    """
    model, tokenizer = load(folder, dtype="float32")
    rows = list(read_rows(context, "valid"))[:count]
    predictions = predict(model, tokenizer, context.task, rows, label_probs=False)
    answered = [{**vars(p), "truth": row["answer"]} for p, row in zip(predictions, rows, strict=True)]
    figures = model_metrics(answered, None, context.task)
    nats, right, tokens = 0.0, 0, 0
    for row in rows:
        chat = render(tokenizer, from_row(row).messages)
        logits = np.array(model(mx.array(chat.tokens[None, :-1]))[0].astype(mx.float32), dtype=np.float64)
        labels, places = chat.tokens[1:], np.flatnonzero(chat.trained)
        log_z = np.log(np.exp(logits).sum(axis=1))
        nats += float((log_z[places] - logits[places, labels[places]]).sum())
        right += int((logits[places].argmax(axis=1) == labels[places]).sum())
        tokens += len(places)
    rates = {name: figures[name]["value"] for name in ("accuracy", "json_valid")}
    return {**rates, "perplexity": math.exp(nats / tokens), "token_accuracy": right / tokens}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [("teach", "teacher"), ("distill", "student")])
def test_a_training_measures_what_an_evaluation_would_and_is_the_same(
    folder: Path, command: str, name: str
) -> None:
    context = make_context(f"{command}.evaluate_rows=5")
    TRAININGS[command](context, folder)
    plain, found = finished() / "out" / name, rows_of(folder)
    assert weights_of(folder) == weights_of(plain)
    names = [f"valid_{name}" for name in NAMES]
    assert [{k: v for k, v in row.items() if k not in names} for row in found] == rows_of(plain)
    assert [row["step"] for row in found if names[0] in row] == [3, 5]
    wanted = expected(context, plain, 5)
    for short, long in zip(NAMES, names, strict=True):
        assert found[-1][long] == pytest.approx(wanted[short], rel=1e-5), short


@pytest.mark.slow
def test_the_answers_are_held_against_the_rows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the rows are read in: two of five answers are the truth, one is invalid."""
    context = make_context("teach.evaluate_rows=5")
    model, tokenizer = load(finished() / "out" / "teacher_base", dtype="float32")

    def answer(model: Any, tokenizer: Any, task: Task, rows: Any, **settings: Any) -> list[Prediction]:
        truth = [row["answer"]["colour"] for row in rows]
        other = ["no" if colour == "yes" else "yes" for colour in truth]
        labels = [truth[0], other[1], truth[2], None, other[4]]
        return [
            Prediction(row["id"], "", label and {"colour": label}, label, None)
            for row, label in zip(rows, labels, strict=True)
        ]

    monkeypatch.setattr("mlx_distill.infer.predict.predict", answer)
    measure = answer_measure(context, "teach", model, tokenizer, context.recipe.teach)
    assert measure is not None
    figures = measure(model)
    assert (figures["accuracy"], figures["json_valid"]) == (0.4, 0.8)


@pytest.mark.slow
def test_measuring_keeps_no_memory_and_reads_checkpointed_layers() -> None:
    context = make_context("teach.evaluate_rows=3", "teach.max_length=200")
    model, tokenizer = load(finished() / "out" / "teacher", dtype="float32")
    measure = answer_measure(context, "teach", model, tokenizer, context.recipe.teach)
    assert measure is not None
    plain = measure_answers(model, measure)
    before = active_memory()
    model.train()
    with checkpointed_layers(model):
        assert measure_answers(model, measure) == plain
    assert active_memory() == before and model.training


def test_too_few_rows_are_told_and_none_is_refused() -> None:
    context = make_context("teach.evaluate_rows=500")
    model, tokenizer = load(finished() / "out" / "teacher_base", dtype="float32")
    count = len(list(read_rows(context, "valid")))
    assert answer_measure(context, "teach", model, tokenizer, context.recipe.teach) is not None
    assert any(f"500, and there are {count} validation rows" in note for note in context.progress.notes)
    with pytest.raises(DataError, match="no validation row has an answer and at most 9 tokens"):
        answer_measure(context, "teach", model, tokenizer, replace(context.recipe.teach, max_length=9))


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["bad", "good", "fine"]}, "score": {"type": "number"}},
}


def task_of(**changes: Any) -> Task:
    kinds: dict[str, Any] = {"schema": SCHEMA, "label": "kind", "score": "score", "positive": ("bad", "fine")}
    return Task("t", system="", user="{text}", **{**kinds, **changes})


def answered(truth: str, kind: str | None, score: float) -> dict[str, Any]:
    answer = None if kind is None else {"kind": kind, "score": score}
    return {
        "truth": {"kind": truth, "score": 40},
        "answer": answer,
        "label": kind,
        "score": None if kind is None else score,
    }


ROWS = [answered("bad", "bad", 44), answered("bad", "fine", 40), answered("good", "good", 30)]


def test_the_figures_of_answers_by_hand() -> None:
    """Of the positive rows the class counts, not only that it is positive; an invalid answer has the largest
    error of the score.
    """
    rows = [*ROWS, answered("fine", None, 0)]
    assert answer_figures(rows, task_of()) == {
        "accuracy": 0.5,
        "positive_accuracy": pytest.approx(1 / 3),
        "score_mae": (4 + 0 + 10 + 60) / 4,
        "json_valid": 0.75,
    }
    assert answer_figures(rows, task_of(positive=(), score=None)) == {"accuracy": 0.5, "json_valid": 0.75}
    without = answer_figures(rows, task_of(label=None, positive=(), score=None))
    assert without.keys() == {"answer_f1", "json_valid"} and without["answer_f1"] == pytest.approx(3 / 8)


def test_a_metric_without_a_row_is_refused_before_the_training() -> None:
    rows = [{"answer": {"kind": "good", "score": 1}}]
    settings = TrainConfig(evaluate_rows=1, best_metric="positive_accuracy")
    with pytest.raises(DataError, match="none of the 1 validation rows that are answered") as caught:
        check_measured(rows, task_of(), settings, "teach")
    assert "accuracy, positive_accuracy, score_mae, json_valid" in (caught.value.fix or "")
    check_measured(rows, task_of(), replace(settings, best_metric="perplexity"), "teach")


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teach.best_metric=score_mae"], "teach.best_metric: score_mae: the task 'colours' has no such"),
        (["distill.best_metric=positive_accuracy"], "distill.best_metric: positive_accuracy"),
        (["teach.best_metric=answer_f1"], "answer_f1"),
        (["teach.best_metric=luck"], "luck"),
    ],
)
def test_a_metric_that_the_task_does_not_have_is_refused_in_the_recipe(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    recipe = small_run.write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, overrides)
    assert load_recipe(recipe, ["teach.best_metric=accuracy"]).teach.best_metric == "accuracy"


def test_the_settings_are_part_of_a_stages_key_only_where_they_are_set(tmp_path: Path) -> None:
    def config(*overrides: str) -> Any:
        recipe = load_recipe(small_run.write_recipe(tmp_path), overrides)
        return next(stage.config for stage in graph(recipe, recipe.load_task()) if stage.name == "teacher")

    plain = config()
    assert "evaluate_rows" not in plain and "best_metric" not in plain
    asked = config("teach.evaluate_rows=9", "teach.best_metric=accuracy")
    assert asked == {**plain, "evaluate_rows": 9, "best_metric": "accuracy"}


@pytest.mark.slow
def test_chats_without_a_task_have_the_perplexity_and_the_accuracy_of_tokens(tmp_path: Path) -> None:
    recipe = chat_run.write_recipe(tmp_path, evaluate_rows=3, evaluate_every=1, best_metric="perplexity")
    with pytest.raises(ConfigError, match="best_metric: json_valid: the recipe has no task") as caught:
        load_recipe(recipe, ["teach.best_metric=json_valid"])
    assert caught.value.fix == "one of loss, perplexity, token_accuracy"
    run(recipe, tmp_path / "out", progress=NullProgress())
    rows = rows_of(tmp_path / "out" / "teacher")
    measured = {"valid_perplexity", "valid_token_accuracy"}
    assert len(rows) == 2 and all(measured < row.keys() for row in rows)
    assert not any("accuracy" in name and name not in measured for name in rows[0])
    # All validation rows are answered: the loss is the logarithm of the perplexity.
    count = sum(1 for _ in read_jsonl(tmp_path / "out" / "data" / "valid.jsonl"))
    assert count <= 3
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "answers to validation rows" in page
    assert f"perplexity {significant(rows[1]['valid_perplexity'], 3)}" in page
    assert math.log(rows[1]["valid_perplexity"]) == pytest.approx(rows[1]["valid_loss"], rel=1e-4)
