"""The targets stage: the teacher's answers and distributions."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ConfigError, DataError, FileError
from mlx_distill.recipe import Recipe, TargetsConfig
from mlx_distill.stages.context import (
    Context,
    Facts,
    as_teacher,
    check_stop,
    count_rows,
    load_model,
    read_rows,
    rows_file,
    vocabulary_hash,
)
from mlx_distill.storage import digest, os_errors, read_json, read_manifest, scratch, sha256, write_json
from mlx_distill.text import counted, listed, percent, size

if TYPE_CHECKING:
    from mlx_distill.distill.teacher_cache import TargetWriter, TeacherTargets
    from mlx_distill.distill.token_codec import TokenLayout

TEXT_BYTES = 5  # of a token's text
MAX_TAIL = 0.01  # of the mass at a temperature other than 1


def targets(context: Context, folder: Path) -> Facts:
    """Write the teacher's targets of the training and validation rows."""
    from mlx_distill.distill.answer_check import FACT, joined
    from mlx_distill.distill.teacher import score_answers
    from mlx_distill.distill.teacher_cache import TargetWriter
    from mlx_distill.infer.label_scoring import find_label_trie

    context, settings = as_teacher(context), context.recipe.targets
    model, tokenizer = load_model(context, "teacher")
    labels = find_label_trie(tokenizer, context.task, context.recipe.distill.label_weight)
    train_rows = min(count_rows(context, "train"), settings.max_rows or sys.maxsize)
    temperatures = recipe_temperatures(context.recipe)
    layout = cache_layout(model, tokenizer, settings, temperatures)
    writer = TargetWriter(folder, layout, fingerprints(context, tokenizer))
    train = (
        (row, n) for row in islice(read_rows(context, "train"), train_rows) for n in range(settings.samples)
    )
    total = train_rows * settings.samples + count_rows(context, "valid")
    _note_disk(context, tokenizer, writer, total)
    done = _asked(folder, len(writer.shards), writer.done)
    rows = islice(chain(train, ((row, 0) for row in read_rows(context, "valid"))), done, None)
    shard = max(settings.batch_size * 8, 64)
    with context.progress.task("targets", total=total, unit="row", start=done) as bar:

        def scored(done: int) -> Iterator[list[TeacherTargets]]:
            number = len(writer.shards)
            waiting: list[dict[str, Any]] = []  # the counts of rows that all were left out
            while chunk := list(islice(rows, shard)):
                check_stop(context)
                asked, samples = zip(*chunk, strict=True)
                found, check = score_answers(
                    model, tokenizer, asked, context.task, settings, labels, samples, temperatures
                )
                done += len(chunk)
                waiting = [joined([*waiting, check.to_dict()])]
                write_json(_check_file(folder, number), {**waiting[0], "asked": done})
                bar.update(done)
                if found:
                    number, waiting = number + 1, []
                    yield found

        for _ in writer.write_all(scored(done)):
            if context.recipe.distill.token_loss != "auto":
                check_tail(writer.sums, settings.top_k)
    paths = [_check_file(folder, shard) for shard in range(len(writer.shards) + 1)]
    answers = joined([read_json(path) for path in paths if path.is_file()])
    _note_left_out(context, answers, writer.done)
    _note_unfit(context, answers)
    writer.finish(labels=list(context.task.labels), text=settings.text)
    stored = sum(p.stat().st_size for p in folder.glob("[rt]*-0*"))
    told = answers["rows"] or answers.get("left_out")
    return {"rows": writer.done, "bytes": stored, **({FACT: answers} if told else {})}


def _asked(folder: Path, shards: int, rows: int) -> int:
    """How many rows an earlier run has asked the teacher for: those of its shards, and those left out."""
    path = _check_file(folder, shards - 1)
    return int(read_json(path).get("asked", rows)) if shards and path.is_file() else rows


def _note_left_out(context: Context, answers: Mapping[str, Any], rows: int) -> None:
    """Say how many rows have no targets, and why.

    Raises:
        DataError: no row has any.
    """
    if answers.get("left_out") and not rows:
        raise DataError(
            f"targets: no row is left: {_reasons(answers)}",
            fix="raise targets.max_thinking_tokens, give the rows reasoning_content that teach trains on, or "
            "set targets.thinking: none",
        )
    if left_out := answers.get("left_out", 0):
        context.progress.note(
            f"targets: {counted(left_out, 'row')} left out, since the teacher's thinking or answer cannot be "
            f"used: {_reasons(answers)}"
        )


def _note_unfit(context: Context, answers: Mapping[str, Any]) -> None:
    """Say how many answers do not fit the task, and what these rows have instead."""
    unfit, again = answers["rows"] - answers["valid"], answers.get("valid_again", 0)
    if not unfit or context.recipe.targets.thinking != "none":
        return
    others = [f"{again} have another sample that does"] if again else []
    if unfit > again:
        others.append(f"{unfit - again} keep the data's own")
    context.progress.note(
        f"targets: {unfit} of {counted(answers['rows'], 'answer')} of the teacher do not fit the task; of "
        f"these rows {' and '.join(others)}"
    )


def _reasons(answers: Mapping[str, Any]) -> str:
    return listed([f"{kind} ({reason['count']})" for kind, reason in answers["reasons"].items()])


def _note_disk(context: Context, tokenizer: Any, writer: TargetWriter, rows: int) -> None:
    """Say what the targets will take, from the tokens of the first rows' own answers.

    Raises:
        FileError: there is less room than that.
    """
    from mlx_distill.data.chat import answer_ids

    first = []
    for row in islice(read_rows(context, "train"), 100):
        turn = row["messages"][-1]
        text, thought = turn["content"], turn.get("reasoning_content", "")
        tokens = len(answer_ids(tokenizer, text)) + 1
        if most := context.recipe.student_thinking:  # where a row has none, as much as the teacher may write
            tokens += len(answer_ids(tokenizer, thought)) if thought else most
        first.append((row["id"], text + thought, tokens))
    left = rows - writer.done
    each_has = sum(row[2] for row in first) / max(len(first), 1)
    needed = round(left * estimated_bytes(writer.layout, first, len(context.task.labels)))
    with os_errors(writer.folder):
        free = shutil.disk_usage(writer.folder).free
    each = f"{writer.layout.record_bytes} bytes a token"
    text = f"{counted(left, 'answer')} of about {each_has:.0f} tokens, {each}: {size(needed)}"
    if needed > free:
        raise FileError(
            f"{writer.folder}: {size(free)} are free, and the targets need more: {text}",
            fix="make room, or lower targets.max_rows or targets.top_k",
        )
    if left:
        thinking = context.recipe.student_thinking  # how much of it there will be is not known
        most = needed + left * thinking * (writer.layout.record_bytes + TEXT_BYTES)
        more = f", with {thinking} tokens of thinking each {size(most)}" if thinking else ""
        context.progress.note(f"targets: {text} on disk{more}")


def estimated_bytes(layout: TokenLayout, answers: Sequence[tuple[str, str, int]], labels: int) -> float:
    """What a row takes on disk: its tokens' records, its line and its distribution over the labels.

    Args:
        layout: Of the records.
        answers: Id, text and number of tokens of some rows, of which it is the mean.
        labels: The task's number of labels.
    """
    each = 4 * (labels + 1) if labels else 0
    lines = (
        json.dumps({"id": name, "sample": 0, "text": text, "tokens": tokens}, ensure_ascii=False)
        for name, text, tokens in answers
    )
    whole = sum(len(line.encode()) + 1 for line in lines)
    whole += layout.record_bytes * sum(tokens for _, _, tokens in answers)
    return each + whole / max(len(answers), 1)


def recipe_temperatures(recipe: Recipe) -> tuple[float, ...]:
    """The temperatures at which a recipe's token-level loss reads the cached distributions: where it softens
    both over all tokens (``auto`` may become one of these losses).

    >>> from mlx_distill.recipe import load_recipe
    >>> recipe_temperatures(load_recipe("tiny", {"distill.temperature": 2.0}))
    (2.0,)
    """
    settings = recipe.distill
    needed = settings.token_weight > 0 and settings.token_loss not in ("none", "token_groups", "alm")
    needed = needed and settings.teacher == "cached"
    return (settings.temperature,) if needed and settings.temperature != 1 else ()


def cache_layout(
    model: Any, tokenizer: Any, settings: TargetsConfig, temperatures: tuple[float, ...] = ()
) -> TokenLayout:
    """How a teacher's distributions are written."""
    from mlx_distill.distill.teacher import byte_lengths
    from mlx_distill.distill.token_codec import TokenLayout
    from mlx_distill.models.forward import head_columns

    lengths = byte_lengths(tokenizer)
    columns = head_columns(model)
    return TokenLayout(
        columns=columns,
        top_k=settings.draws or min(settings.top_k, columns),
        sampled=settings.draws > 0,
        length_bits=0 if lengths is None else int(lengths.max()).bit_length(),
        temperatures=temperatures,
    )


def fingerprints(context: Context, tokenizer: Any) -> dict[str, str]:
    """What targets are made from: hashes of the teacher's weights, adapter, tokenizer and template, of the
    rows, and of the system prompt that the teacher reads in place of theirs, if there is one.
    """
    system = as_teacher(context).system
    weights = [_hashes(context.run / name, "model*.safetensors") for name in ("teacher_base", "teacher")]
    return {
        "weights": digest(weights),
        "adapter": digest(_hashes(context.run / "teacher", "adapter*")),
        "tokenizer": vocabulary_hash(tokenizer),
        "template": digest(str(getattr(tokenizer, "chat_template", None))),
        "rows": digest([sha256(rows_file(context, split)) for split in ("train", "valid")]),
        **({"system": digest(system)} if system is not None else {}),
        **({"thinking": context.recipe.targets.thinking} if context.recipe.teacher_thinking else {}),
    }


def _hashes(folder: Path, pattern: str) -> dict[str, str]:
    """The hashes of a stage's files, from its manifest where it has them."""
    manifest = read_manifest(folder)
    listed = manifest.files if manifest else {}
    return {
        path.name: listed[path.name].sha256 if path.name in listed else sha256(path)
        for path in sorted(folder.glob(pattern))
    }


def check_tail(sums: Mapping[str, Any], top_k: int) -> None:
    """Refuse a temperature at which the top k does not hold the distribution.

    Args:
        sums: Of a :class:`~mlx_distill.distill.teacher_cache.TargetWriter`, or the index of its cache.
        top_k: For the message.

    Raises:
        ConfigError: the mean mass outside of the top k is 1 % or more at a temperature.
    """
    for temperature, mass in sums["tail_mass_at"].items():
        if mass >= MAX_TAIL:
            raise ConfigError(
                f"distill.temperature: {temperature}: the {top_k} most probable tokens hold "
                f"{percent(1 - mass)} of the teacher's distribution at it, and 99 % are needed",
                fix="raise targets.top_k, or set distill.temperature: 1 or distill.teacher: live",
            )


def _check_file(folder: Path, shard: int) -> Path:
    """Where the counts of a shard's answers wait for the end of the stage, which may be in another run."""
    return scratch(folder) / f"answers-{shard:05d}.json"
