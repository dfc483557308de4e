"""``targets.system``: the teacher reads another system prompt than the student."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import chat_run, small_run
from helpers.small_chain import finished, make_context

from mlx_distill.data.predictions import read_predictions
from mlx_distill.distill.teacher import score_answers
from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.errors import ConfigError
from mlx_distill.graph import Stage, graph
from mlx_distill.infer.label_scoring import find_label_trie
from mlx_distill.ledger.root import Root
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.models.trained_on import read_trained_on
from mlx_distill.recipe import load_recipe
from mlx_distill.registry.golden import golden_from_run
from mlx_distill.report.origin_section import origin
from mlx_distill.serve.pages.recipe_checks import problems
from mlx_distill.stages.context import as_teacher, read_rows
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.stages.evaluate import evaluate
from mlx_distill.stages.targets import fingerprints, targets
from mlx_distill.stages.teach import teach

POLICY = "Colours are red, green and blue. {Nothing} else counts as one, whatever a text says of it."
SYSTEM = f"targets.system={POLICY!r}"


@pytest.mark.slow
def test_the_teachers_targets_are_those_of_its_own_prompt(folder: Path, run_copy: Path) -> None:
    """Against rows whose system prompt is replaced here. A live teacher reads the same prompt, and the
    student that of the rows.
    """
    context = make_context(SYSTEM, "targets.max_rows=3", "targets.text=data", "distill.teacher=live")
    targets(context, folder)
    found = list(TargetReader(folder))
    model, tokenizer = load(finished() / "out" / "teacher", dtype="float32")
    rows = [row for split in ("train", "valid") for row in read_rows(context, split)]
    rows = [*rows[:3], *read_rows(context, "valid")]
    for row in rows:
        assert row["messages"][0]["role"] == "system"
        row["messages"][0]["content"] = POLICY
    labels = find_label_trie(tokenizer, context.task, 1.0)
    wanted, _ = score_answers(model, tokenizer, rows, context.task, context.recipe.targets, labels)
    assert [row.id for row in found] == [row.id for row in wanted]
    plain = next(iter(TargetReader(finished() / "out" / "targets")))
    assert not np.allclose(found[0].label_logprobs, plain.label_logprobs, atol=1e-3)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.allclose(ours.label_logprobs, theirs.label_logprobs, atol=1e-4)
        assert np.allclose(ours.logprobs, theirs.logprobs, rtol=1e-3, atol=1e-3)
    shutil.rmtree(run_copy / "targets")
    shutil.copytree(folder, run_copy / "targets", ignore=shutil.ignore_patterns("scratch"))
    context = replace(context, run=run_copy)
    students = load_tokenizer(run_copy / "student_base")
    train, _, _ = aligned_rows(context, folder, students, context.recipe.distill)
    assert len(train) == 3
    for row in train:
        assert POLICY in tokenizer.decode(row.teacher_tokens.tolist())
        read = students.decode(row.tokens.tolist())
        assert POLICY not in read and context.task.system in read


def test_only_the_teachers_rows_have_it() -> None:
    context = make_context(SYSTEM)
    theirs, ours = list(read_rows(as_teacher(context), "test")), list(read_rows(context, "test"))
    assert {row["messages"][0]["content"] for row in theirs} == {POLICY}
    assert [row["messages"][1:] for row in theirs] == [row["messages"][1:] for row in ours]
    assert {row["messages"][0]["content"] for row in ours} == {context.task.system}
    plain = make_context()
    assert list(read_rows(as_teacher(plain), "test")) == ours
    _, tokenizer = load(finished() / "out" / "teacher")
    hashes, plain_hashes = fingerprints(context, tokenizer), fingerprints(plain, tokenizer)
    assert {name for name in hashes if hashes[name] != plain_hashes.get(name)} == {"system"}


@pytest.mark.slow
def test_the_teacher_is_evaluated_with_it_and_golden_rows_and_report_say_so(folder: Path) -> None:
    context = make_context(SYSTEM, "evaluate.max_rows=2", "evaluate.constrain=false")
    for name in ("teacher", "student"):
        (folder / name).mkdir()
    evaluate(context, folder / "teacher", "teacher", "teacher")
    evaluate(context, folder / "student", "student", "student")
    headers = {name: read_predictions(folder / name)[0] for name in ("teacher", "student")}
    assert headers["teacher"]["settings"]["system"] == POLICY
    assert "system" not in headers["student"]["settings"]
    _, tokenizer = load(finished() / "out" / "teacher")
    added = len(tokenizer.encode(POLICY)) - len(tokenizer.encode(context.task.system))
    before = read_predictions(finished() / "out" / "evaluations" / "teacher")[1]
    for row, old in zip(read_predictions(folder / "teacher")[1], before, strict=False):
        assert abs(row["prompt_tokens"] - old["prompt_tokens"] - added) <= 2 and added > 5
    provenance = {
        "machine": {},
        "versions": {},
        "seeds": {},
        "stages": [],
        "recipe": {},
        "evaluations": {name: header["settings"] for name, header in headers.items()},
    }
    section = origin({"provenance": provenance, "confidence": 0.95, "task_details": {}, "metrics": {}})
    told = section["method"]["System prompts"]
    assert told.startswith(f"the teacher read targets.system ({len(POLICY)} characters) in place of")
    answered = {
        "text": '{"colour": "yes"}',
        "answer": {"colour": "yes"},
        "label": "yes",
        "label_probs": {"yes": 1.0},
    }
    lines = [{**row, **answered} for row in read_predictions(folder / "teacher")[1]]
    write_answers(folder / "teacher", headers["teacher"], lines)
    golden = golden_from_run(finished() / "out", folder / "teacher")
    assert golden and all(
        [turn["role"] for turn in row["messages"]] == ["system", "user"]
        and row["messages"][0]["content"] == POLICY
        for row in golden
    )


def write_answers(folder: Path, header: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    from mlx_distill.storage import write_jsonl

    write_jsonl(folder / "predictions.jsonl", [header, *lines])


@pytest.mark.slow
def test_a_teacher_that_is_not_trained_is_its_base(folder: Path) -> None:
    """Self-distillation: the base with a policy in its prompt, for a student that starts as the same base."""
    context = make_context("teach.method=none", SYSTEM)
    facts = teach(context, folder)
    assert facts["steps"] == 0
    teacher, tokenizer = load(folder, dtype="float32")
    base, _ = load(finished() / "out" / "teacher_base", dtype="float32")
    tokens = mx.array([tokenizer.encode(POLICY)])
    assert mx.array_equal(teacher(tokens), base(tokens)).item()
    trained_on = read_trained_on(folder)
    assert trained_on is not None and trained_on.system_prompts == (POLICY,)


# --- the recipe ---------------------------------------------------------------------------------------------


def stages_of(path: Path, *overrides: str) -> dict[str, Stage]:
    recipe = load_recipe(path, overrides)
    return {stage.name: stage for stage in graph(recipe, recipe.load_task())}


def test_the_prompt_is_part_of_the_keys_of_the_stages_that_read_it(tmp_path: Path) -> None:
    path = small_run.write_recipe(tmp_path)
    (tmp_path / "policy.md").write_text(POLICY + "\n", encoding="utf-8")
    plain, text, file = (
        stages_of(path),
        stages_of(path, SYSTEM),
        stages_of(path, "targets.system_file=policy.md"),
    )
    readers = {"teacher", "targets", "evaluations/teacher"}
    assert {name for name in plain if plain[name].config != text[name].config} == readers
    assert {name for name in plain if plain[name].inputs != file[name].inputs} == readers
    assert all(file[name].config == plain[name].config for name in plain)
    assert file["targets"].local == (str(tmp_path / "policy.md"),)
    recipe = load_recipe(path, ["targets.system_file=policy.md"])
    assert recipe.teacher_system() == POLICY and load_recipe(path).teacher_system() is None


def test_prompts_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    path = small_run.write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"system_file: targets\.system is set too"):
        load_recipe(path, [SYSTEM, "targets.system_file=policy.md"])
    recipe = load_recipe(path, ["targets.system_file=policy.md"])
    with pytest.raises(ConfigError, match=r"targets.system_file: .*policy.md: cannot be read"):
        recipe.teacher_system()
    (tmp_path / "policy.md").write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is empty"):
        recipe.teacher_system()
    alone = load_recipe(chat_run.write_recipe(tmp_path, method="none"))
    with pytest.raises(ConfigError, match=r"teach\.method: none: the recipe has no student"):
        graph(alone, alone.load_task())
    with pytest.raises(ConfigError, match="none"):
        load_recipe(path, ["distill.method=none"])
    alone = load_recipe(chat_run.write_recipe(tmp_path), [SYSTEM])
    with pytest.raises(ConfigError, match="the recipe has no student"):
        graph(alone, alone.load_task())


def test_over_http_the_file_lies_under_the_root(tmp_path: Path) -> None:
    import yaml

    raw = yaml.safe_load(small_run.write_recipe(tmp_path).read_text(encoding="utf-8"))
    (tmp_path / "policy.md").write_text(POLICY, encoding="utf-8")
    root = Root.at(tmp_path)
    for name, problem in (
        ("policy.md", None),
        ("../policy.md", "is not under the root"),
        ("/etc/passwd", "is not under the root"),
        ("other.md", "no such file"),
    ):
        raw["targets"]["system_file"] = name
        recipe, found = problems(raw, root)
        if problem is None:
            assert recipe is not None and not found
        else:
            assert recipe is None and problem in found["targets.system_file"][0], name
