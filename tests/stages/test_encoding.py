"""Tokenized and aligned rows on disk: equal to those of a list, made once, and part of a checkpoint's
identity.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_chain import TRAININGS, finished, make_context
from helpers.targets import rewrite_targets

from mlx_distill.data import chat as templates
from mlx_distill.data.chat import EncodeReport, encode_rows
from mlx_distill.data.rows import from_row
from mlx_distill.distill.align import align_answer, aligned_row_arrays
from mlx_distill.distill.joined_rows import join_rows
from mlx_distill.distill.teacher_cache import TargetReader, TeacherTargets
from mlx_distill.errors import ConfigError, DataError, Interrupted, ModelError
from mlx_distill.infer.label_scoring import task_label_trie
from mlx_distill.losses.mid_token import MidTokens
from mlx_distill.losses.token_groups import build_token_groups
from mlx_distill.models.load import load_tokenizer
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.context import Context, content_of, read_rows, rows_file
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.stages.encoding import encoded_rows
from mlx_distill.stages.training import batch_notes
from mlx_distill.storage import digest, read_jsonl, write_jsonl
from mlx_distill.storage.array_store import Store
from mlx_distill.train.batches import make_dataset
from mlx_distill.train.checkpoint import latest, read_state
from mlx_distill.train.distributed import Ranks

pytestmark = pytest.mark.slow


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were rendered at a time; a chat alone is a question to the template."""
    seen: list[int] = []
    whole = templates.render_many

    def counted(tokenizer: Any, chats: Any, **more: Any) -> Any:
        if len(chats) > 1:
            seen.append(len(chats))
        return whole(tokenizer, chats, **more)

    monkeypatch.setattr("mlx_distill.data.chat.render_many", counted)
    monkeypatch.setattr("mlx_distill.distill.align.render_many", counted)
    return seen


def encode(
    context: Context,
    folder: Path,
    split: str = "train",
    check_every: int = 200,
    token_rows: int = 0,
    **changes: Any,
) -> Store[Any]:
    tokenizer = load_tokenizer(context.run / "teacher_base")
    settings = replace(context.recipe.teach, **changes)
    return encoded_rows(
        context,
        folder,
        "teach",
        split,
        tokenizer,
        "teacher_base",
        settings,
        check_every=check_every,
        token_rows=token_rows,
    )


def pairs(context: Context, folder: Path, token_rows: int = 0) -> tuple[Store[Any], Store[Any]]:
    tokenizer = load_tokenizer(context.run / "student_base")
    return aligned_rows(context, folder, tokenizer, context.recipe.distill, token_rows=token_rows)[:2]


def change_rows(run_copy: Path, split: str = "train") -> None:
    rows = [row for _, row in read_jsonl(run_copy / "data" / f"{split}.jsonl")]
    rows[0]["messages"][-2]["content"] += " again"
    write_jsonl(run_copy / "data" / f"{split}.jsonl", rows)
    rewrite_targets(run_copy)


def change_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"]["sha256"] = "other"
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- what is stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid"])
def test_stored_rows_are_those_of_a_list(folder: Path, split: str) -> None:
    context = make_context()
    store, report = encode(context, folder, split), EncodeReport()
    rows = [from_row(row) for row in read_rows(context, split)]
    plain = list(encode_rows(rows, load_tokenizer(context.run / "teacher_base"), 512, "last", report))
    assert len(store) == len(plain) == report.kept > 0 and store.facts == vars(report)
    for piece, item in zip(store, plain, strict=True):
        assert np.array_equal(piece.tokens, item.tokens) and np.array_equal(piece.trained, item.trained)
        assert (piece.tokens.dtype, piece.trained.dtype) == (item.tokens.dtype, item.trained.dtype)
    name, total, seen = context.progress.tasks[0]  # type: ignore[attr-defined]
    assert (name, total, seen[-1]) == (f"teach: tokenize {split}", len(rows), len(rows))


def test_rows_that_are_too_long_are_noted_with_the_limit(folder: Path) -> None:
    context = make_context()
    longest = int(encode(context, folder).lengths.max())
    assert not context.progress.notes  # type: ignore[attr-defined]
    encode(context, folder, max_length=longest - 1)
    (note,) = context.progress.notes  # type: ignore[attr-defined]
    assert f"(the longest has {longest} tokens); max_length is {longest - 1}" in note


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_several_ranks_notes_how_many_rows_a_step_has(folder: Path, rank: int) -> None:
    context = make_context("teach.batch_size=4", "teach.accumulate=2")
    rows, notes = encode(context, folder), []
    for size, packing in ((1, False), (2, False), (2, True)):
        settings = replace(context.recipe.teach, packing=packing)
        dataset = make_dataset(rows, lambda *_: None, settings)  # type: ignore[arg-type, return-value]
        notes += batch_notes(settings, dataset, Ranks(rank, size))
    batch = "2 ranks: batch_size 4 x accumulate 2 x 2 = 16"
    assert [note for note in notes if "rank" in note] == (
        [] if rank else [f"{batch} rows a step", f"{batch} sequences a step"]
    )


def test_stored_aligned_rows_are_those_of_a_list(folder: Path) -> None:
    context, out = make_context(), finished() / "out"
    student, teacher = load_tokenizer(out / "student_base"), load_tokenizer(out / "teacher")
    labels = task_label_trie(student, context.task)
    plain: dict[str, list[Any]] = {"train": [], "valid": []}
    files = {split: rows_file(context, split) for split in plain}
    stop, teacher_stop = (templates.stop_ids(side)[0] for side in (student, teacher))
    groups = build_token_groups(student, teacher, student_stop=stop, teacher_stop=teacher_stop)
    by_context = MidTokens(student, teacher, groups, in_middle=False)
    for split, row, target in join_rows(files, TargetReader(out / "targets")):
        chat = templates.render(
            student, [*row["messages"][:-1], {"role": "assistant", "content": target.text}]
        )
        encode = partial(templates.answer_ids, student)
        sides = (student, teacher, encode, labels)
        plain[split].append(align_answer(chat, target, context.task, *sides, mid_tokens=by_context))
    for store, items in zip(pairs(context, folder), plain.values(), strict=True):
        assert len(store) == len(items) > 0
        for ours, theirs in zip(map(aligned_row_arrays, store), map(aligned_row_arrays, items), strict=True):
            assert list(ours) == list(theirs)
            assert all(
                ours[n].dtype == a.dtype and ours[n].shape == a.shape and ours[n].tobytes() == a.tobytes()
                for n, a in theirs.items()
            )


def test_an_empty_split_is_an_empty_store(run_copy: Path, folder: Path) -> None:
    (run_copy / "data" / "valid.jsonl").write_text("")
    assert len(encode(make_context(run=run_copy), folder, "valid")) == 0


def test_targets_in_another_order_than_the_rows_are_refused(run_copy: Path, folder: Path) -> None:
    rows = [row for _, row in read_jsonl(run_copy / "data" / "train.jsonl")]
    write_jsonl(run_copy / "data" / "train.jsonl", rows[::-1])
    with pytest.raises(DataError, match="targets of another rows"):
        pairs(make_context(run=run_copy), folder)
    rewrite_targets(run_copy)
    with pytest.raises(DataError, match=r"is not in .*, or not in its order") as caught:
        pairs(make_context(run=run_copy), folder)
    assert "mlx-distill targets" in (caught.value.fix or "") and not list(
        (folder / "scratch" / "pairs").iterdir()
    )


def test_tokens_beyond_the_embedding_are_refused_before_training(folder: Path) -> None:
    context = make_context()
    highest = max(int(row.tokens.max()) for row in encode(context, folder))
    shutil.rmtree(folder / "scratch")
    assert encode(context, folder, token_rows=highest + 1)
    shutil.rmtree(folder / "scratch")
    with pytest.raises(ModelError, match=rf"teacher_base: .* number {highest} .* embedding {highest} rows"):
        encode(context, folder, token_rows=highest)
    with pytest.raises(ModelError, match=r"student_base: .* the embedding 300 rows"):
        pairs(context, folder, token_rows=300)


def change_target(run_copy: Path, number: int, before: str, after: str) -> None:
    """Another text in the targets: the teacher's tokens stay those of the old one."""

    def change(at: int, row: TeacherTargets) -> TeacherTargets:
        if at != number or row.id != first:
            return row
        assert before in row.text
        return replace(row, text=row.text.replace(before, after))

    first = TargetReader(run_copy / "targets")[number].id
    rewrite_targets(run_copy, change)


def test_rows_whose_text_a_tokenizer_changes_are_left_out_and_counted(run_copy: Path, folder: Path) -> None:
    context = make_context(run=run_copy)
    whole = pairs(context, folder)[0]
    assert not context.progress.notes  # type: ignore[attr-defined]
    change_target(run_copy, 3, "colour", "color")
    shutil.rmtree(folder / "scratch")
    assert len(pairs(context, folder)[0]) == len(whole) - 1
    (note,) = context.progress.notes  # type: ignore[attr-defined]
    assert "distill: 1 rows whose text a tokenizer changes are left out" in note and "differ at byte" in note


# --- made once ----------------------------------------------------------------------------------------------


def test_rows_are_tokenized_once_until_something_changes(
    run_copy: Path, folder: Path, calls: list[int]
) -> None:
    context = make_context(run=run_copy)
    first = encode(context, folder).content
    made = len(calls)
    assert made > 0 and encode(context, folder).content == first and len(calls) == made
    assert (
        encode(context, folder, max_length=300).content == first and len(calls) == 2 * made
    )  # another key, the same rows
    assert encode(context, folder, max_length=300, loss_on="all").content == first and len(calls) == 3 * made
    change_rows(run_copy)
    assert encode(context, folder, max_length=300, loss_on="all").content != first and len(calls) == 4 * made
    change_manifest(run_copy / "teacher_base")
    encode(context, folder, max_length=300, loss_on="all")
    assert len(calls) == 5 * made


def test_rows_are_aligned_once_until_something_changes(
    run_copy: Path, folder: Path, calls: list[int]
) -> None:
    context = make_context(run=run_copy)
    first = [store.content for store in pairs(context, folder)]
    tokens = [row.tokens.tolist() for row in pairs(context, folder)[0]]
    made = len(calls)
    assert made > 0 and [store.content for store in pairs(context, folder)] == first and len(calls) == made
    shutil.rmtree(folder / "scratch" / "pairs" / "valid")  # a kill between the two
    assert [store.content for store in pairs(context, folder)] == first and len(calls) == 2 * made
    change_rows(run_copy, "valid")
    assert [row.tokens.tolist() for row in pairs(context, folder)[0]] == tokens
    assert len(calls) == 3 * made
    assert pairs(context, folder)[1].content != first[1] and len(calls) == 3 * made
    change_manifest(run_copy / "student_base")
    pairs(context, folder)
    assert len(calls) == 4 * made


@pytest.mark.parametrize("work", [partial(encode, check_every=7), pairs])
def test_stopping_leaves_nothing_half_written(folder: Path, work: Any) -> None:
    context = make_context()
    context.stop.set = True
    with pytest.raises(Interrupted):
        work(context, folder)
    assert not [path for path in (folder / "scratch").rglob("*") if path.is_file()]
    context.stop.set = False
    assert work(context, folder)


# --- a checkpoint knows its rows ----------------------------------------------------------------------------


def start(run_copy: Path, folder: Path, stage: str) -> dict[str, Any]:
    """Two steps of a training that is then interrupted; its checkpoint."""
    stop = StopFlag()

    def hook(row: dict[str, Any]) -> None:
        stop.set = stop.set or row["step"] == 2

    context = replace(make_context(run=run_copy, hooks=[hook]), stop=stop)
    with pytest.raises(Interrupted):
        TRAININGS[stage](context, folder)
    path = latest(folder / "scratch" / "checkpoints")
    assert path is not None
    return read_state(path)


@pytest.mark.parametrize("stage", ["teach", "distill"])
def test_a_checkpoint_of_other_rows_or_another_base_is_refused(
    run_copy: Path, folder: Path, stage: str
) -> None:
    base, name = {"teach": ("teacher_base", "rows"), "distill": ("student_base", "pairs")}[stage]
    state = start(run_copy, folder, stage)
    train, valid = (Store(folder / "scratch" / name / split, dict).content for split in ("train", "valid"))
    content = content_of(run_copy / base)
    assert state["data"]["identity"] == train and state["settings"]["identity"] == digest(
        {"train": train, "valid": valid, "model": content}
    )
    text = (run_copy / "data" / "train.jsonl").read_bytes()
    shutil.copytree(run_copy / "targets", folder / "targets")
    change_rows(run_copy)
    with pytest.raises(ConfigError, match="identity"):
        TRAININGS[stage](make_context(run=run_copy), folder)
    (run_copy / "data" / "train.jsonl").write_bytes(text)
    shutil.copytree(folder / "targets", run_copy / "targets", dirs_exist_ok=True)
    assert TRAININGS[stage](make_context(run=run_copy), folder)["resumed"] == 2
    shutil.rmtree(folder / "scratch")
    start(run_copy, folder, stage)
    change_manifest(run_copy / base)
    with pytest.raises(ConfigError, match="identity"):
        TRAININGS[stage](make_context(run=run_copy), folder)
