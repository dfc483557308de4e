"""Stages: which rows they read, what they refuse, and what they write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_chain import finished, make_context, manifests

from mlx_distill.data.predictions import constrained_rows, read_predictions
from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.errors import DataError, Interrupted
from mlx_distill.infer.engine import Generation
from mlx_distill.losses import token_bytes
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.stages.context import Context, held_out_rows, read_rows
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.stages.distill import distill as distill_stage
from mlx_distill.stages.evaluate import evaluate as evaluate_stage
from mlx_distill.stages.targets import targets as targets_stage
from mlx_distill.stages.teach import teach as teach_stage
from mlx_distill.storage import read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

# --- evaluate -----------------------------------------------------------------------------------------------


def test_the_limit_on_held_out_rows_is_for_each_set(run_copy: Path) -> None:
    rows = [{"id": f"r{i}", "set": "test" if i % 3 else "other"} for i in range(12)]
    write_jsonl(run_copy / "data" / "test.jsonl", rows)
    found = held_out_rows(make_context("evaluate.max_rows=2", run=run_copy))
    assert [row["id"] for row in found] == ["r0", "r1", "r2", "r3"]
    assert held_out_rows(make_context(run=run_copy)) == rows


def test_an_evaluation_without_held_out_rows_is_refused(run_copy: Path, folder: Path) -> None:
    (run_copy / "data" / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="no held-out rows") as caught:
        evaluate_stage(make_context(run=run_copy), folder, "student", "student")
    assert "test_fraction" in (caught.value.fix or "")


def test_there_is_a_prediction_for_each_row_in_order_with_the_settings() -> None:
    header, *found = [
        row for _, row in read_jsonl(finished() / "out" / "evaluations" / "student" / "predictions.jsonl")
    ]
    rows = list(read_rows(make_context(), "test"))
    assert [row["id"] for row in found] == [row["id"] for row in rows] and len(rows) > 16
    assert (
        header["model"] == "student"
        and header["labels"] == ["yes", "no"]
        and header["set_counts"] == {"test": len(rows)}
    )
    for row, source in zip(found, rows, strict=True):
        assert row["truth"] == source["answer"] and sum(row["label_probs"].values()) == pytest.approx(
            1, abs=1e-4
        )
        assert (row["answer"] is None) == (row["error"] is not None)


def test_each_row_has_its_answer_under_the_grammar_too() -> None:
    header, found = read_predictions(finished() / "out" / "evaluations" / "student")
    assert header["constrained"] is True
    both = constrained_rows(found)
    # Only what was cut does not parse, and only what is different was generated again.
    assert all(row["answer"] is not None or row["error"].startswith("cut after") for row in both)
    assert any(row["answer"] is not None for row in both)
    assert all(row["constrained"] for row in found if str(row["error"]).startswith("not JSON"))


def test_an_evaluation_without_a_grammar_says_so(run_copy: Path, folder: Path) -> None:
    context = make_context("evaluate.max_rows=2", "evaluate.constrain=false", run=run_copy)
    evaluate_stage(context, folder, "student", "student")
    assert read_predictions(folder)[0]["constrained"] is False
    schema = {**context.task.schema, "not": {"required": ["nothing"]}}
    context = make_context("evaluate.max_rows=2", run=run_copy)
    context = replace(context, task=replace(context.task, schema=schema))
    shutil.rmtree(folder)
    folder.mkdir()
    evaluate_stage(context, folder, "student", "student")
    assert read_predictions(folder)[0]["constrained"] is False
    assert any("not: a grammar cannot enforce it" in note for note in context.progress.notes)


# --- targets ------------------------------------------------------------------------------------------------


def scored_ids(folder: Path) -> list[str]:
    return [row.id for row in TargetReader(folder)]


def test_targets_are_for_the_training_and_validation_rows_only() -> None:
    wanted = [row["id"] for split in ("train", "valid") for row in read_rows(make_context(), split)]
    found = scored_ids(finished() / "out" / "targets")
    assert found == wanted and not set(found) & {row["id"] for row in read_rows(make_context(), "test")}


def test_targets_max_rows_limits_the_training_rows(folder: Path) -> None:
    context = make_context("targets.max_rows=5", "targets.text=data")
    facts = targets_stage(context, folder)
    valid = [row["id"] for row in read_rows(context, "valid")]
    assert scored_ids(folder) == [row["id"] for row in read_rows(context, "train")][:5] + valid and valid
    assert facts["rows"] == 5 + len(valid) and facts["bytes"] > 0


def test_an_answer_that_does_not_fit_is_replaced_by_that_of_the_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context("targets.max_rows=4", "targets.text=greedy")
    answers = ['{"colour": "yes"}', "no JSON", '{"colour": "maybe"}', '{"colour": "no"}']
    generations = [
        Generation(text, (1,) * 12, 9, "length" if text == "no JSON" else "stop", 0.1) for text in answers
    ]
    monkeypatch.setattr(
        "mlx_distill.distill.teacher.generate_answers",
        lambda model, tokenizer, prompts, max_tokens, batch_size, seeds: (generations * 40)[: len(prompts)],
    )
    facts = targets_stage(context, folder)["teacher_answers"]
    assert 2 * facts["valid"] == facts["rows"] > 8
    cut, unknown = (facts["reasons"][kind] for kind in ("cut", "does not fit the schema"))
    assert cut["error"].startswith("cut after 12 tokens: not JSON") and cut["text"] == "no JSON"
    assert unknown["count"] == facts["rows"] // 4 and "maybe" in unknown["error"]
    rows = {
        row["id"]: row["messages"][-1]["content"]
        for split in ("train", "valid")
        for row in read_rows(context, split)
    }
    for row, answer in zip(TargetReader(folder), answers * 40, strict=False):
        assert row.text == (answer if answer in (answers[0], answers[3]) else rows[row.id])
        assert row.label_logprobs is not None and np.exp(row.label_logprobs).sum() == pytest.approx(
            1, abs=1e-4
        )
    assert any("do not fit the task" in note for note in context.progress.notes)  # type: ignore[attr-defined]


def test_in_the_place_of_a_sample_that_does_not_fit_another_is_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context("targets.max_rows=4")
    drawn: list[list[tuple[int, ...]]] = []

    def draw(model: Any, tokenizer: Any, prompts: Any, limit: int, size: int, seeds: Any) -> list[Generation]:
        """The first row's first sample fits, the second's third, and none of the others."""
        drawn.append(seeds)
        assert len(prompts) == len(seeds) == len(set(seeds))
        first = {seed[2]: number for number, seed in reversed(list(enumerate(drawn[0])))}
        fits = [(first[seed[2]], len(drawn)) in ((0, 1), (1, 3)) for seed in seeds]
        return [Generation('{"colour": "yes"}' if one else "none", (1,) * 12, 9, "stop", 0.1) for one in fits]

    monkeypatch.setattr("mlx_distill.distill.teacher.generate_answers", draw)
    facts = targets_stage(context, folder)["teacher_answers"]
    assert (facts["valid"], facts["valid_again"]) == (1, 1)
    assert [len(seeds) for seeds in drawn] == [facts["rows"] - n for n in (0, 1, 1, 2)]
    assert all(len(seed) == 3 for seed in drawn[0]) and {seed[3] for seed in drawn[2]} == {2}
    texts = [row.text for row in TargetReader(folder)]
    assert texts[:2] == ['{"colour": "yes"}'] * 2
    own = [row["messages"][-1]["content"] for row in read_rows(context, "train")]
    assert texts[2:4] == own[2:4]
    (note,) = [note for note in context.progress.notes if "do not fit" in note]  # type: ignore[attr-defined]
    assert f"1 have another sample that does and {facts['rows'] - 2} keep the data's own" in note


def test_targets_are_the_teachers_distributions_over_its_own_template(folder: Path) -> None:
    """One row is computed by hand: the tokenizer's own chat template, the whole model, a plain softmax."""
    import mlx.core as mx

    row = next(iter(TargetReader(finished() / "out" / "targets")))
    source = next(r for r in read_rows(make_context(), "train") if r["id"] == row.id)
    model, tokenizer = load(finished() / "out" / "teacher", dtype="float32")
    prompt = tokenizer.apply_chat_template(
        source["messages"][:-1], add_generation_prompt=True, enable_thinking=False
    )
    model.eval()
    logits = np.array(model(mx.array([[*prompt, *row.ids.tolist()]])).astype(mx.float32))[0].astype(
        np.float64
    )
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(len(prompt) - 1, len(prompt) - 1 + len(row.ids))
    assert tokenizer.decode(row.ids.tolist()[:-1]) == row.text
    np.testing.assert_allclose(
        row.logprobs, [logprobs[p, t] for p, t in zip(places, row.ids, strict=True)], rtol=3e-4, atol=1e-3
    )
    for place, ids, theirs in zip(places, row.topk_ids, row.topk_logprobs, strict=True):
        np.testing.assert_allclose(
            theirs, np.sort(logprobs[place])[::-1][:8], atol=2e-2
        )  # rounded when it was stored
        np.testing.assert_allclose(theirs, logprobs[place, ids], atol=2e-2)


# --- distill ------------------------------------------------------------------------------------------------


def test_every_aligned_span_has_the_same_bytes_in_both_tokenizers(folder: Path) -> None:
    context, out = make_context(), finished() / "out"
    student, teacher = load_tokenizer(out / "student_base"), load_tokenizer(out / "teacher")
    ours, theirs = token_bytes(student), token_bytes(teacher)
    train, valid, inputs = aligned_rows(context, folder, student, context.recipe.distill)
    assert (len(train), len(valid)) == tuple(
        len(list(read_rows(context, split))) for split in ("train", "valid")
    )
    assert not inputs["same_tokenizer"] and inputs["labels"].labels == context.task.labels
    for pair, target in zip([*train, *valid], TargetReader(out / "targets"), strict=True):
        text = target.text.encode()
        assert (
            b"".join(ours[t] for t in pair.tokens[pair.start : -1])
            == text
            == b"".join(theirs[t] for t in target.ids[:-1])
        )
        offsets = np.cumsum([0, *(len(theirs[t]) for t in target.ids[:-1])])
        assert pair.span_logprobs.sum() == pytest.approx(
            target.logprobs.sum(), abs=1e-3
        )  # every token of the answer in one span
        for (a, b), start, ids in zip(pair.spans[:-1], pair.starts, pair.topk_ids, strict=False):
            begin = sum(len(ours[t]) for t in pair.tokens[pair.start : a])
            assert a == start and b > a and begin in offsets
            assert (ids == target.topk_ids[list(offsets).index(begin)]).all()
        assert (
            pair.label_start is not None
            and text[: sum(len(ours[t]) for t in pair.tokens[pair.start : pair.label_start])]
            == b'{"colour": "'
        )


def test_rows_that_are_too_long_for_the_student_are_reported_and_left_out(folder: Path) -> None:
    context, student = make_context(), load_tokenizer(finished() / "out" / "student_base")
    lengths = sorted(aligned_rows(context, folder, student, context.recipe.distill)[0].lengths.tolist())
    middle = lengths[len(lengths) // 2]
    settings = replace(context.recipe.distill, max_length=middle)
    for _ in range(2):  # the second time from the stored rows
        context.progress.notes.clear()  # type: ignore[attr-defined]
        train, _, _ = aligned_rows(context, folder, student, settings)
        assert train.lengths.tolist() == [len(pair.tokens) for pair in train] and sorted(train.lengths) == [
            n for n in lengths if n <= middle
        ]
        assert any(f"longer than {middle} tokens" in note for note in context.progress.notes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("control", ["labels", "text"])
def test_a_control_is_trained_on_its_own_term_alone(folder: Path, control: str) -> None:
    facts = distill_stage(make_context("distill.steps=2"), folder, control)
    assert facts["steps"] == 2 and 0 < facts["trainable"]["share"] < 0.2
    row = next(read_jsonl(folder / "metrics.jsonl"))[1]
    assert {"label", "token"}.isdisjoint(row)
    assert {"adapters.safetensors", "adapter_config.json"} <= {p.name for p in folder.iterdir()}


def test_the_student_is_an_adapter_and_the_quantized_one_a_whole_model() -> None:
    out = finished() / "out"
    assert {"adapters.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl"} <= {
        p.name for p in (out / "student").iterdir()
    }
    assert not list((out / "student").glob("model*.safetensors"))
    assert list((out / "quantized").glob("model*.safetensors")) and not list(
        (out / "quantized").glob("adapter*")
    )
    facts = manifests(out)["student"].recorded
    assert facts["steps"] == 5 and facts["tokens"] > 0 and 0 < facts["trainable"]["share"] < 0.2
    steps = [row for _, row in read_jsonl(out / "student" / "metrics.jsonl")]
    assert (
        [row["step"] for row in steps] == [1, 2, 3, 4, 5]
        and {"label", "token", "text"} <= steps[0].keys()
        and "valid_loss" in steps[2]
    )


# --- stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [teach_stage, targets_stage, distill_stage, lambda c, f: evaluate_stage(c, f, "student", "student")],
    ids=["teach", "targets", "distill", "evaluate"],
)
def test_a_stage_stops_when_the_stop_flag_is_set(folder: Path, stage: Callable[[Context, Path], Any]) -> None:
    context = make_context()
    context.stop.set = True
    with pytest.raises(Interrupted) as caught:
        stage(context, folder)
    assert caught.value.exit_code == 130 and "same command" in (caught.value.fix or "")
