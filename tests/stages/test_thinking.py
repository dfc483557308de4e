"""``targets.thinking``: what a teacher thinks, dropped or taught to a student with other marks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import killed_run
from helpers.small_chain import RecordedProgress
from helpers.thinking import THOUGHT, rows, write_recipe

from mlx_distill.data.predictions import read_predictions
from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.graph import graph
from mlx_distill.losses.cross_tokenizer import build_token_groups
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.report.origin_section import origin
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.context import Context, as_teacher, read_rows
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.stages.refinement import _open_bench
from mlx_distill.stages.student_chats import student_chats
from mlx_distill.stages.targets import targets
from mlx_distill.stages.thinking import check_thinking, without_marks
from mlx_distill.storage import read_manifest
from mlx_distill.tasks.answer import THINKING
from mlx_distill.thinking import set_thinking, thinking_budget

THOUGHTS = {
    row["id"]: THOUGHT.format("It is" if '"yes"' in row["messages"][-1]["content"] else "None is")
    for row in rows()
}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose student learns to think in harmony's analysis channel."""
    folder = tmp_path_factory.mktemp("thinking")
    run(write_recipe(folder, "map"), folder / "out")
    return folder


def context_of(folder: Path, *overrides: str, **more: Any) -> Context:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    progress = more.pop("progress", RecordedProgress())
    return Context(recipe, recipe.load_task(), folder / "out", progress, StopFlag(), **more)


def bare(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"][:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["map", "drop"])
def test_targets_are_read_behind_the_thinking_in_the_teachers_template(
    mapped: Path, tmp_path: Path, mode: str
) -> None:
    """Against the model itself on what transformers makes of the teacher's chat template."""
    folder = mapped / "out" / "targets"
    if mode == "drop":
        folder = tmp_path
        targets(context_of(mapped, "targets.thinking=drop"), folder)
    model, tokenizer = load(mapped / "out" / "teacher", dtype="float32")
    context = context_of(mapped)
    prepared = {row["id"]: row for split in ("train", "valid") for row in read_rows(context, split)}
    found = list(TargetReader(folder))
    assert 20 < len(found) == len([id for id in prepared if int(id[1:]) % 10 != 3])
    for target in found[:6]:
        thought = THOUGHTS[target.id]
        assert target.thinking == thought
        message = {"role": "assistant", "content": target.text, "reasoning_content": thought}
        tokens = tokenizer.apply_chat_template(
            [*bare(prepared[target.id]), message], tokenize=True, return_dict=False
        )
        tokens = tokens[: len(tokens) - tokens[::-1].index(tokenizer.eos_token_id)]
        assert tokens[-len(target.ids) :] == target.ids.tolist()
        said = tokenizer.decode(target.ids.tolist())
        kept = f"{thought}\n</think>\n\n" if mode == "map" else ""
        assert said == kept + target.text + "<|im_end|>"
        assert tokenizer.decode(target.ids[target.answer_start : -1].tolist()) == target.text
        assert target.answer_alone().ids.tolist() == target.ids[target.answer_start :].tolist()
        z = model(mx.array([tokens]))[0].astype(mx.float32)
        z = z - mx.logsumexp(z, axis=-1, keepdims=True)
        n = len(target.ids)
        own = np.array(z)[np.arange(len(tokens) - n, len(tokens)) - 1, target.ids]
        np.testing.assert_allclose(target.logprobs, own, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_the_student_learns_them_in_its_own_marks_and_no_mark_is_aligned(
    mapped: Path, tmp_path: Path
) -> None:
    context, out = context_of(mapped, "distill.teacher=live"), mapped / "out"
    student, teacher = load_tokenizer(out / "student_base"), load_tokenizer(out / "teacher")
    set_thinking(student, context.recipe.student_thinking)
    train, valid, inputs = aligned_rows(context, tmp_path, student, context.recipe.distill)
    by_text = [*TargetReader(out / "targets")]
    assert len(train) + len(valid) == len(by_text)
    ours, theirs = vocabulary(student).tokens, vocabulary(teacher).tokens
    for row, target in zip([*train, *valid], by_text, strict=True):
        said = student.decode(row.tokens[row.start :].tolist())
        end = "<|end|><|start|>assistant<|channel|>final<|message|>"
        assert said == f"{target.thinking}{end}{target.text}<|return|>"
        assert student.decode(row.tokens[: row.start].tolist()).endswith("<|channel|>analysis<|message|>")
        assert row.teacher_starts is not None and row.teacher_tokens is not None
        covered = b""
        for first, last in row.spans[:-1]:
            covered += b"".join(ours[i] for i in row.tokens[first:last].tolist())
        assert covered == (target.thinking + target.text).encode()
        names = ("<|end|>", "<|start|>", "<|channel|>", "<|message|>")
        marks = {student.convert_tokens_to_ids(name) for name in names}
        in_spans = {int(i) for first, last in row.spans for i in row.tokens[first:last]}
        assert not marks & in_spans and not marks & set(row.tokens[row.starts].tolist())
        closes = teacher.convert_tokens_to_ids("</think>")
        begun = row.teacher_tokens[row.teacher_starts].tolist()
        assert row.teacher_tokens[-len(target.ids) :].tolist() == target.ids.tolist()
        assert closes not in begun
        before = [theirs[i] for i in begun[:-1]]
        at = [ours[i] for i in row.tokens[row.starts].tolist()[:-1]]
        assert all(a.startswith(b[:1]) for a, b in zip(at, before, strict=True))
        assert row.label_start is not None and row.label_start > row.start + len(row.spans) // 3
    groups = inputs["groups"]
    assert groups.teacher[teacher.convert_tokens_to_ids("</think>")] == groups.outside
    assert groups.student[student.convert_tokens_to_ids("<|end|>")] == groups.outside


@pytest.mark.slow
def test_models_of_the_run_are_asked_with_thinking_open(mapped: Path) -> None:
    out = mapped / "out"
    for name in ("teacher", "student", "quantized"):
        assert thinking_budget(load_tokenizer(out / name)) == 24
    assert thinking_budget(load_tokenizer(out / "student_base")) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    told = origin(report)["method"]["Thinking"]
    thinking, _, rest = told.partition("; others do not")
    assert thinking == "the teacher and the student think before the answer, at most 24 tokens"
    left_out = report["teacher_answers"].get("left_out", 0)
    assert rest.startswith(f"; {left_out} row") if left_out else not rest
    for name in ("teacher", "student"):
        header, answers = read_predictions(out / "evaluations" / name)
        assert answers and header["settings"]["thinking"] == 24
        for row in answers:  # after two steps it may not end, and that is no answer
            assert row["tokens"] <= 24 + 32 + 12
            if row["error"] and THINKING in row["error"]:
                assert row["text"] == "" and row["answer"] is None and row["label_probs"] is None
            assert "think" not in row["text"] and "<|channel|>" not in row["text"]


@pytest.mark.slow
def test_rows_without_thinking_are_left_out_and_counted(mapped: Path, tmp_path: Path) -> None:
    context = context_of(mapped, "targets.thinking=drop")
    targets(context, tmp_path / "whole")
    asked = sum(1 for split in ("train", "valid") for _ in read_rows(context, split))
    left = asked - len(TargetReader(tmp_path / "whole"))
    notes = context.progress.notes  # type: ignore[attr-defined]
    assert left == 4 and any("4 rows left out" in note and "be kept (4)" in note for note in notes)
    assert any(note.endswith(" on disk") for note in notes)  # what is dropped takes none


@pytest.mark.slow
def test_targets_of_a_killed_stage_leave_out_the_same_rows(tmp_path: Path) -> None:
    """Killed within the shard behind rows that all were left out: the bytes and counts of a whole run."""
    splits = dict.fromkeys(("train", "valid", "test"), range(0))
    splits |= {"train": range(64 * 3), "valid": range(64 * 3, 64 * 4), "test": range(64 * 4, 64 * 4 + 4)}
    without = {*range(5, 64, 2), *range(64, 128), *range(130, 192, 2), *splits["valid"]}
    sources = [{"path": f"{split}.jsonl", "split": split} for split in splits]
    data = {"sources": sources, "near_duplicates": 0}
    recipe = write_recipe(tmp_path, "drop", data=data, teach={"method": "none"})
    every = rows(splits["test"].stop, without)
    for split, numbers in splits.items():
        lines = [json.dumps(every[i]) + "\n" for i in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    for stage in ("prepare", "convert", "teach"):
        run(recipe, tmp_path / "whole", only=stage, progress=NullProgress())
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    pattern = r"tokens-00001\.safetensors$"
    command = [sys.executable, killed_run.__file__, str(recipe), str(tmp_path / "killed"), pattern, "targets"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (tmp_path / "killed/.targets.partial/tokens-00000.safetensors").is_file()
    made = {}
    for name in ("whole", "killed"):
        run(recipe, tmp_path / name, only="targets", progress=NullProgress())
        made[name] = read_manifest(tmp_path / name / "targets")
    whole, killed = made["whole"], made["killed"]
    assert whole is not None and killed is not None and killed.content == whole.content
    counts = whole.recorded["teacher_answers"]
    assert killed.recorded["teacher_answers"] == counts and counts["left_out"] == len(without)
    assert whole.recorded["rows"] == killed.recorded["rows"] == 64 * 4 - len(without)


@pytest.mark.slow
def test_a_teacher_that_does_not_end_its_thinking_gives_no_targets(mapped: Path, tmp_path: Path) -> None:
    context = context_of(mapped, "targets.text=greedy", "targets.max_thinking_tokens=8", "targets.max_rows=3")
    with pytest.raises(DataError, match=rf"no row is left: .*{THINKING}") as caught:
        targets(context, tmp_path)
    assert "max_thinking_tokens" in str(caught.value)
    notes = context.progress.notes  # type: ignore[attr-defined]
    assert any("on disk, with 8 tokens of thinking each " in note for note in notes)


@pytest.mark.slow
def test_the_student_is_quantized_for_the_chats_that_it_learned(mapped: Path, tmp_path: Path) -> None:
    """The data has rows without thinking, which the targets leave out: the rows are those of training."""
    context, out = context_of(mapped, "quantize.refine=calibrate"), mapped / "out"
    student = load_tokenizer(out / "student")
    for name in ("aligned", "folder"):
        (tmp_path / name).mkdir()
    train, valid, _ = aligned_rows(context, tmp_path / "aligned", student, context.recipe.distill)
    bench = _open_bench(context, tmp_path / "folder")
    assert bench is not None and bench.held_out_from == "validation rows"
    for found, trained in ((bench.calibration, train), (bench.held_out, valid)):
        assert [(list(row.tokens), row.start, row.label_start) for row in found] == [
            (row.tokens.tolist(), row.start, row.label_start) for row in trained
        ]
    text = student.decode(bench.calibration[0].tokens)
    assert THOUGHTS[bench.calibration[0].id] in text and "<|channel|>analysis<|message|>" in text
    assert bench.error({}).answer_tokens == sum(len(row.tokens) - row.start for row in valid)
    plain = context_of(mapped, "targets.thinking=drop")
    rows_of = [list(student_chats(plain, split)) for split in ("train", "valid")]
    assert rows_of == [list(read_rows(plain, split)) for split in ("train", "valid")]


def test_targets_are_a_parent_of_a_quantization_that_reads_their_thinking(mapped: Path) -> None:
    def parents(*overrides: str) -> tuple[str, ...]:
        recipe = load_recipe(mapped / "recipe.yaml", overrides)
        return next(s.parents for s in graph(recipe, recipe.load_task()) if s.name == "quantized")

    plain = ("student", "student_base", "data")
    assert parents() == plain == parents("quantize.refine=calibrate", "targets.thinking=drop")
    assert parents("quantize.refine=calibrate") == (*plain, "targets")
    assert parents("quantize.bits_per_weight=4.5") == (*plain, "targets")


def test_only_the_teachers_rows_have_thinking(mapped: Path) -> None:
    context = context_of(mapped)
    theirs, ours = list(read_rows(as_teacher(context), "train")), list(read_rows(context, "train"))
    assert any("reasoning_content" in row["messages"][-1] for row in theirs)
    assert not any("reasoning_content" in json.dumps(row) for row in ours)
    none = context_of(mapped, "targets.thinking=none")
    assert list(read_rows(as_teacher(none), "train")) == ours


def test_what_cannot_be_taught_is_refused(tmp_path: Path, mapped: Path) -> None:
    def graph_of(*overrides: str) -> None:
        recipe = load_recipe(mapped / "recipe.yaml", overrides)
        graph(recipe, recipe.load_task())

    with pytest.raises(ConfigError, match="nothing teaches the student to end"):
        graph_of("distill.text_weight=0")
    graph_of("distill.text_weight=0", "targets.thinking=drop")
    with pytest.raises(ConfigError, match="in the middle of tokens"):
        graph_of("distill.mid_token_rows=true", "distill.token_loss=token_groups")
    with pytest.raises(ConfigError, match="shuffle_options"):
        graph_of("evaluate.shuffle_options=2")
    out = mapped / "out"
    both = {name: load_tokenizer(out / f"{name}_base") for name in ("teacher", "student")}
    recipe = load_recipe(mapped / "recipe.yaml", ["targets.thinking=keep"])
    with pytest.raises(ModelError, match=r"end their thinking differently.*</think>.*<\|end\|>") as caught:
        check_thinking(recipe, both)
    assert "map" in str(caught.value)
    check_thinking(recipe, dict.fromkeys(both, both["teacher"]))
    check_thinking(load_recipe(mapped / "recipe.yaml"), both)


def test_a_mark_that_is_no_special_token_is_in_no_group_either(mapped: Path, tmp_path: Path) -> None:
    """Its bytes alone would put it beside what the other model begins such a text with."""
    out = mapped / "out"
    for path in (out / "teacher_base").glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((out / "teacher_base/chat_template.jinja").read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in raw["added_tokens"]:
        token["special"] &= "think" not in token["content"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    teacher, student = load_tokenizer(tmp_path), load_tokenizer(out / "student_base")
    closes = teacher.convert_tokens_to_ids("</think>")
    plain = build_token_groups(student, teacher)
    changed = without_marks(plain, student, teacher)
    assert plain.teacher[closes] != plain.outside and changed.teacher[closes] == changed.outside
    others = np.flatnonzero(changed.teacher != plain.teacher)
    assert set(teacher.convert_ids_to_tokens(others.tolist())) == {"<think>", "</think>"}


def test_rows_are_counted_as_each_model_reads_them(mapped: Path) -> None:
    from mlx_distill.stages.token_lengths import check_token_lengths

    folder = mapped / "out" / "data"
    longest = {
        mode: {
            role: facts["rows"]["longest"]
            for role, facts in check_token_lengths(context_of(mapped, f"targets.thinking={mode}"), folder)[
                0
            ].items()
        }
        for mode in ("none", "drop", "map")
    }
    assert longest["drop"]["teacher"] > longest["none"]["teacher"] + 8
    assert longest["drop"]["student"] == longest["none"]["student"] < longest["map"]["student"] - 8


def test_keys_change_where_thinking_changes_the_result(mapped: Path) -> None:
    def configs(*overrides: str) -> dict[str, Any]:
        recipe = load_recipe(mapped / "recipe.yaml", overrides)
        return {stage.name: stage.config for stage in graph(recipe, recipe.load_task())}

    none, drop, kept = (configs(f"targets.thinking={mode}") for mode in ("none", "drop", "map"))
    changed = {name for name in none if none[name] != drop[name]}
    assert changed == {"teacher", "targets", "evaluations/teacher"}
    assert {name for name in kept if kept[name] != drop[name]} == {"targets", "student"}
