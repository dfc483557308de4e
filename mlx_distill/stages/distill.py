"""The distill stage: training of the student on the teacher's targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import UNTRAINED, DistillConfig
from mlx_distill.stages.context import (
    Context,
    Facts,
    check_stop,
    content_of,
    count_rows,
    load_model,
    read_rows,
    rows_file,
)
from mlx_distill.stages.label_calibration import calibrate_labels
from mlx_distill.stages.pair import open_pair
from mlx_distill.stages.training import check_training, fine_tune, train_rows
from mlx_distill.storage import digest, scratch, sha256, write_json
from mlx_distill.thinking import set_thinking

if TYPE_CHECKING:
    from mlx_distill.distill.align import AlignedRow
    from mlx_distill.distill.joined_rows import JoinedRow
    from mlx_distill.distill.live_teacher import LiveTeacher
    from mlx_distill.distill.teacher_cache import TargetReader
    from mlx_distill.records import Batch
    from mlx_distill.storage.array_store import Store

SPLITS = ("train", "valid")
_NAMES = {
    None: "distill",
    "labels": "distill (labels alone)",
    "text": "distill (text alone)",
    "labels_hard": "distill (one-hot labels of the rows)",
    "teacher_hard": "distill (one-hot labels of the teacher)",
}


def distill(context: Context, folder: Path, control: str | None = None) -> Facts:
    """Train the student on the teacher's targets.

    Args:
        context: Of the run.
        folder: Where the stage writes.
        control: A key of ``controls`` in the recipe: cross-entropy on the ``labels`` of the data or on the
            teacher's ``text``; or the student's terms with one-hot labels, ``labels_hard`` of the data or
            ``teacher_hard``.
    """
    from mlx_distill.models.forward import embedding_rows

    settings = context.recipe.distill
    check_training(context, {"distill"})
    model, tokenizer = load_model(context, "student_base")
    of_rows = control in ("labels", "labels_hard")
    set_thinking(tokenizer, 0 if of_rows else context.recipe.student_thinking)
    if control == "labels":
        return fine_tune(
            context,
            folder,
            _NAMES[control],
            model,
            tokenizer,
            "student_base",
            settings,
            max_rows=settings.max_rows,
        )
    settings = _settings(context, control)
    align = own_answer_rows if control == "labels_hard" else partial(aligned_rows, student=model)
    rows = align(context, folder, tokenizer, settings, token_rows=embedding_rows(model))
    _preflight(context, folder, settings, rows[0].facts, rows[2]["same_tokenizer"], control)
    facts = train_student(context, folder, model, tokenizer, settings, *rows, control=control)
    if facts and control is None:  # only the first of several ranks has facts, and writes
        facts |= calibrate_labels(context, folder, "distill", model, tokenizer)
    return facts


def train_student(
    context: Context,
    folder: Path,
    model: Any,
    tokenizer: Any,
    settings: DistillConfig,
    train: Store[AlignedRow],
    valid: Store[AlignedRow],
    inputs: Mapping[str, Any],
    *,
    control: str | None = None,
) -> Facts:
    """Train a student on aligned rows.

    Args:
        context: Of the run.
        folder: Where the stage writes.
        model: The student.
        tokenizer: Its tokenizer.
        settings: Of the training.
        train: These and the following are those of :func:`aligned_rows`.
        valid: For validation.
        inputs: Of the objective.
        control: As for :func:`distill`.
    """
    from mlx_distill.data.chat import pad_id
    from mlx_distill.distill.align import collate_aligned_rows
    from mlx_distill.distill.hard_targets import with_hard_labels
    from mlx_distill.distill.live_teacher import with_live_teacher
    from mlx_distill.distill.objective import kd
    from mlx_distill.models.forward import embedding_rows

    pad = pad_id(tokenizer, embedding_rows(model))
    classes = len(context.task.labels) + 1  # and one for everything else

    def collate(rows: Sequence[AlignedRow], chosen: Sequence[Sequence[int]], multiple: int) -> Batch:
        return collate_aligned_rows(rows, chosen, pad, classes, multiple)

    if inputs.get("teacher") is not None:
        collate = with_live_teacher(collate, inputs["teacher"])
    if control == "teacher_hard":
        collate = with_hard_labels(collate)
    return train_rows(
        context,
        folder,
        _NAMES[control],
        model,
        tokenizer,
        "student_base",
        settings,
        kd(settings, **inputs),
        train,
        valid,
        collate,
    )


def _settings(context: Context, control: str | None) -> DistillConfig:
    """The recipe's settings as a student or a control of some kind is trained with them."""
    from mlx_distill.distill.hard_targets import hard_settings

    settings = context.recipe.distill
    if control == "text":
        settings = replace(settings, label_weight=0.0, token_weight=0.0, span_weight=0.0, text_weight=1.0)
    if context.task.label is None and settings.label_weight:
        settings = replace(settings, label_weight=0.0)
        if control is None:
            context.progress.note("distill: the task has no label, so distill.label_weight has no effect")
    return hard_settings(settings) if control in ("labels_hard", "teacher_hard") else settings


def aligned_rows(
    context: Context,
    folder: Path,
    tokenizer: Any,
    settings: DistillConfig,
    *,
    token_rows: int = 0,
    student: Any = None,
) -> tuple[Store[AlignedRow], Store[AlignedRow], dict[str, Any]]:
    """The aligned rows for training and validation, and what the objective needs of the two tokenizers.

    Args:
        context: Of the run.
        folder: Where the stage writes; the aligned rows are in its scratch folder, and are reused while
            nothing that they are made of changes.
        tokenizer: The student's.
        settings: ``max_length``, ``label_weight``, and which token-level loss.
        token_rows: Rows of the student's embedding; 0 for any number.
        student: The model that will be trained, which is a live teacher too where its base is the teacher;
            None: a live teacher is loaded beside it.

    Raises:
        DataError: the targets are of another tokenizer, or of other rows, or have no label distribution where
            ``label_weight`` needs one.
        ModelError: a token that the student's embedding has no row for; or a label that its tokenizer cannot
            write, where ``label_weight`` is above 0.
        Interrupted: stopped on request.
    """
    from mlx_distill.distill.align import aligned_row_from_arrays, write_aligned_rows
    from mlx_distill.distill.mapped_mass import MappedMass
    from mlx_distill.distill.token_losses import TOKEN_LOSSES
    from mlx_distill.storage.array_store import Store, is_stored

    pair = open_pair(context, settings, tokenizer, token_rows)
    targets = pair.reader.folder
    key = _aligned_key(context, content_of(targets), pair.teacher_hash, settings, pair.temperature)
    folders = {split: scratch(folder) / "pairs" / split for split in SPLITS}
    if not all(is_stored(path, key) for path in folders.values()):
        groups = None if pair.same_tokenizer else lambda: pair.groups
        write_aligned_rows(
            folders,
            key,
            _first_rows(_joined(context, pair.reader), settings.max_rows),
            pair.aligner(temperature=pair.temperature, with_chat=pair.is_live),
            tokenizer,
            token_rows=token_rows,
            max_length=settings.max_length,
            total=len(pair.reader),
            progress=context.progress,
            check_stop=partial(check_stop, context),
            mapped=MappedMass(tokenizer, pair.teacher, groups, columns=token_rows),
            mid_tokens=pair.mid_tokens,
        )
    train, valid = (Store(path, aligned_row_from_arrays) for path in folders.values())
    _check_rows(context, train, settings, targets)
    needs_groups = pair.loss is not None and TOKEN_LOSSES[pair.loss].needs == "token_groups"
    return (
        train,
        valid,
        {
            "labels": pair.labels,
            "groups": pair.groups if needs_groups else None,
            "same_tokenizer": pair.same_tokenizer,
            "teacher": _live_teacher(context, student, tokenizer) if pair.is_live else None,
        },
    )


def _joined(context: Context, reader: TargetReader) -> Iterator[JoinedRow]:
    from mlx_distill.distill.joined_rows import join_rows

    return join_rows({split: rows_file(context, split) for split in SPLITS}, reader)


def _live_teacher(context: Context, student: Any, tokenizer: Any) -> LiveTeacher:
    """The teacher, in memory a second time only where it is not the student's own base.

    Raises:
        ConfigError: it is, and the training changes that base.
    """
    from mlx_distill.distill.live_teacher import LiveTeacher

    if student is None or not _is_own_base(context):
        return LiveTeacher(*load_model(context, "teacher"))
    context.recipe.check_own_base()
    context.progress.note(
        "distill: the teacher is the student with its adapter switched off: one model in memory"
    )
    return LiveTeacher(student, tokenizer, shared=True)


def _is_own_base(context: Context) -> bool:
    """Whether the teacher is the student's own base, without a training of its own."""
    bases = [content_of(context.run / name) for name in ("teacher_base", "student_base")]
    return context.recipe.teach.method == UNTRAINED and bases[0] == bases[1]


def _may_be_live(context: Context) -> bool:
    """Whether the teacher can be live: not where the training changes its base."""
    if _is_own_base(context):
        try:
            context.recipe.check_own_base()
        except ConfigError:
            return False
    return True


def _preflight(
    context: Context,
    folder: Path,
    settings: DistillConfig,
    measured: Mapping[str, Any],
    same_tokenizer: bool,
    control: str | None,
) -> None:
    """Say and write what of the teacher reaches the student, and which settings are known to harm; not of a
    control.
    """
    from mlx_distill.distill.preflight import FILE_NAME, lines, preflight
    from mlx_distill.distill.token_losses import token_loss_name

    if control is not None:
        return
    loss = token_loss_name(settings, same_tokenizer)
    facts = preflight(
        loss,
        settings,
        context.recipe.targets,
        measured["mapped"],
        measured.get("mid_token"),
        may_be_live=_may_be_live(context),
    )
    for line in lines(facts):
        context.progress.note(f"distill: {line}")
    write_json(folder / FILE_NAME, facts)


def own_answer_rows(
    context: Context, folder: Path, tokenizer: Any, settings: DistillConfig, *, token_rows: int = 0
) -> tuple[Store[AlignedRow], Store[AlignedRow], dict[str, Any]]:
    """The rows' own answers with one-hot labels, and what the objective needs: :func:`aligned_rows` without a
    teacher.
    """
    from mlx_distill.distill.align import aligned_row_from_arrays, aligner, write_aligned_rows
    from mlx_distill.infer.label_scoring import find_label_trie
    from mlx_distill.storage.array_store import Store, is_stored

    labels = find_label_trie(tokenizer, context.task, settings.label_weight)
    key = _aligned_key(context, "", "", settings)
    folders = {split: scratch(folder) / "pairs" / split for split in SPLITS}
    if not all(is_stored(path, key) for path in folders.values()):
        write_aligned_rows(
            folders,
            key,
            _first_rows(_own_answers(context, tokenizer), settings.max_rows),
            aligner(context.task, tokenizer, tokenizer, labels, same_tokenizer=True, columns=token_rows),
            tokenizer,
            token_rows=token_rows,
            max_length=settings.max_length,
            total=sum(count_rows(context, split) for split in SPLITS),
            progress=context.progress,
            check_stop=partial(check_stop, context),
        )
    train, valid = (Store(path, aligned_row_from_arrays) for path in folders.values())
    _check_rows(context, train, settings, rows_file(context, "train"))
    return train, valid, {"labels": labels, "groups": None, "same_tokenizer": True}


def _own_answers(context: Context, tokenizer: Any) -> Iterator[JoinedRow]:
    from mlx_distill.data.chat import render
    from mlx_distill.distill.hard_targets import own_answer_targets

    for split in SPLITS:
        for row in read_rows(context, split):
            chat = render(tokenizer, row["messages"])
            tokens = chat.tokens[chat.spans[-1][0] :].tolist()
            yield split, row, own_answer_targets(row, tokens, context.task)


def _first_rows(joined: Iterator[JoinedRow], max_rows: int) -> Iterator[JoinedRow]:
    """All targets of the first training rows, and the validation rows; 0: of all."""
    seen: set[str] = set()
    for split, row, targets in joined:
        if max_rows and split == "train" and row["id"] not in seen:
            if len(seen) == max_rows:
                continue
            seen.add(row["id"])
        yield split, row, targets


def _check_rows(context: Context, train: Store[AlignedRow], settings: DistillConfig, targets: Path) -> None:
    """Note the rows that are left out, and refuse a label loss that no row has."""
    facts = train.facts
    if facts["too_long"]:
        context.progress.note(
            f"distill: {facts['too_long']} rows are longer than {settings.max_length} tokens for the student "
            "and are left out"
        )
    if facts.get("not_aligned"):
        context.progress.note(
            f"distill: {facts['not_aligned']} rows whose text a tokenizer changes are left out; the first is "
            f"{facts['example']}"
        )
    if settings.label_weight > 0:
        _check_labelled(context, train, targets)


def _check_labelled(context: Context, train: Store[AlignedRow], targets: Path) -> None:
    """Refuse a label loss that no training row has, and note one that some lack."""
    labelled = train.facts.get("labelled", len(train))
    if labelled == len(train):
        return
    reason = "the teacher's targets have no label distribution, or the answers are not in the schema's order"
    if not labelled:
        raise DataError(
            f"{targets}: no row for distill.label_weight: {reason}",
            fix="run: mlx-distill targets; or set distill.label_weight: 0",
        )
    context.progress.note(
        f"distill: {len(train) - labelled} of {len(train)} rows are left out of the label loss: {reason}"
    )


def _aligned_key(
    context: Context, targets: str, teacher_tokenizer: str, settings: DistillConfig, temperature: float = 1.0
) -> str:
    """A hash of all that the aligned rows are made of; ``targets`` is that of the targets."""
    return digest(
        {
            "rows": [sha256(rows_file(context, split)) for split in SPLITS],
            "targets": targets,
            "model": content_of(context.run / "student_base"),
            "teacher_tokenizer": teacher_tokenizer,
            "max_length": settings.max_length,
            "facts": 3,  # what is measured of the pair
            **({"max_rows": settings.max_rows} if settings.max_rows else {}),
            **({"temperature": temperature} if temperature != 1 else {}),
            **({"teacher": settings.teacher} if settings.teacher != "cached" else {}),
            "by_context": 1,
            **({"mid_token_rows": 2} if settings.mid_token_rows else {}),
            "answer": [dict(context.task.schema), context.task.label],
        }
    )
