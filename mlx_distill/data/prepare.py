"""The prepare stage: read, check, filter, find duplicates, split, write. The rows wait in a file; a few
numbers of each are in memory.

sources -> checked chats -> filters -> row buffer -> duplicates -> splits -> train, valid, test.jsonl and
statistics.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8, Int64, UInt64

from mlx_distill.data.answer_marker import LeakCounter
from mlx_distill.data.checks import FieldsSeen, check_shares, left_out, warnings_of
from mlx_distill.data.dedup import Clusters, minhash, near_duplicates, shingles, words
from mlx_distill.data.layouts import listed
from mlx_distill.data.row_buffer import RowBuffer
from mlx_distill.data.rows import to_example
from mlx_distill.data.sources import read_source
from mlx_distill.data.splits import (
    DROPPED,
    SPLITS,
    TEST,
    TRAIN,
    UNASSIGNED,
    VALID,
    assign_requested,
    draw_folds,
    draw_splits,
    merge_clusters,
    take_share,
)
from mlx_distill.data.statistics import DropCounter, RowStatistics, row_figures
from mlx_distill.data.values import check_values
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.progress import NullProgress, Progress
from mlx_distill.recipe import DataConfig, SourceConfig
from mlx_distill.records import Example
from mlx_distill.storage import atomic_path, os_errors, scratch, write_json
from mlx_distill.tasks.task import Task

FORMAT = 1

SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "valid": VALID,
    "validation": VALID,
    "val": VALID,
    "dev": VALID,
    "test": TEST,
    "eval": TEST,
    "heldout": TEST,
    "held_out": TEST,
    "held-out": TEST,
}


def prepare(
    config: DataConfig, task: Task, base: Path | None, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Write ``train.jsonl``, ``valid.jsonl``, ``test.jsonl`` and ``statistics.json`` into ``folder``.

    Of rows with the same text one is kept, a held-out one if there is any. Rows with nearly the same text
    (see :func:`~mlx_distill.data.dedup.near_duplicates`) go to one split; where one of them asks for a
    held-out split, those that ask for train are dropped. The other rows are drawn, stratified by label and
    ``config.stratify``. With ``config.folds`` the test rows are those of one fold, and rows that ask for test
    are left out.

    Args:
        config: Sources, filters, shares and seed.
        task: Prompt, answer schema, label, slices.
        base: The folder that relative paths start from.
        folder: An existing folder; each file in it is written atomically.
        progress: Shows progress and notes.

    Returns:
        The content of ``statistics.json``: ``read``, ``rows``, ``sets``, ``labels``, ``slices``,
        ``characters``, ``dropped``, ``near_duplicates``, ``renamed_ids``, ``warnings``.

    Raises:
        DataError: a row that does not fit, an empty source, no rows left to train on, or a value of a field
            with a smaller share than ``min_share``.
        ConfigError: no sources, a field that the task or the recipe names and no row has, ``values`` of no
            field, or no such fold.
    """
    if not config.sources:
        raise ConfigError(
            "data.sources: no sources", fix="name a file, a Hub data set or a generator under data.sources"
        )
    if config.folds == 1 or (config.folds and not 1 <= config.fold <= config.folds):
        raise ConfigError(
            f"data.fold {config.fold} of data.folds {config.folds}",
            fix="two folds or more, and one of them, counted from 1",
        )
    for number, source in enumerate(config.sources):
        check_values(source.values, task, f"data.sources[{number}].values")
    progress = progress or NullProgress()
    for leftover in folder.glob(".*.tmp.json*"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    dropped = DropCounter()
    counted = _counted_fields(task, config)
    with RowBuffer(scratch(folder)) as buffer:
        read, warnings = _read(config, task, base, buffer, counted, dropped, progress)
        roots = _clusters(buffer, config, dropped)
        splits = _splits(buffer, roots, config, dropped)
        kept, renamed = _write(buffer, splits, counted, config, folder)
    statistics = {
        "format": FORMAT,
        "read": read,
        **kept.summary(SPLITS),
        "dropped": dropped.summary(),
        "near_duplicates": _cluster_sizes(roots, splits),
        "renamed_ids": renamed,
    }
    check_shares(kept, task, config)
    statistics["warnings"] = [*warnings, *warnings_of(kept, task, config)]
    write_json(folder / "statistics.json", statistics)
    for text in [*left_out(statistics), *(f"warning: {text}" for text in statistics["warnings"])]:
        progress.note(f"prepare: {text}")
    return statistics


def _counted_fields(task: Task, config: DataConfig) -> tuple[str, ...]:
    group = [task.group] if task.group else []
    return tuple(dict.fromkeys([*task.slices, *group, *config.stratify, *config.min_share]))


def _read(
    config: DataConfig,
    task: Task,
    base: Path | None,
    buffer: RowBuffer,
    counted: Sequence[str],
    dropped: DropCounter,
    progress: Progress,
) -> tuple[int, list[str]]:
    """Fill the buffer with the rows that pass the filters; return how many were read, and warnings."""
    cache: dict[str, int] = {}
    constant = _constant_shingles(task, cache)
    seen, leaks = FieldsSeen(), LeakCounter(task)
    read = 0

    def say(text: str) -> None:
        progress.note(f"prepare: {text}")

    with progress.task("prepare", total=_total(config), unit="row") as bar:
        for number, source in enumerate(config.sources):
            for where, raw in read_source(source, task, base, say):
                read += 1
                if read % 200 == 0:
                    bar.update(read)
                try:
                    example = _example(raw, task, where, source)
                except DataError as error:
                    if not config.drop_invalid:
                        raise
                    dropped.add("does not fit the task", error.message)
                    continue
                text = asked_text(example)
                values = {**raw, **example.fields}
                seen.add(values, source.columns, config)
                leaks.add(number, source, where, raw, example)
                reason = _empty(task, values) or _filter(text, example, values, config)
                if reason:
                    dropped.add(reason, where)
                    continue
                buffer.append(
                    where,
                    " ".join(words(known_text(example, task), punctuation=True)),
                    example,
                    _requested(source.split or values.get(config.split_field), config.split_field, where),
                    number,
                    _stratum(example, values, task, config),
                    row_figures(example, task.label, counted),
                )
                name = values.get(task.cluster) if task.cluster else None
                buffer.cluster_names.append(None if name in (None, "") else str(name))
                if config.near_duplicates:
                    hashes = shingles(words(text), cache)
                    own = hashes[~np.isin(hashes, constant)] if len(constant) else hashes
                    buffer.signatures.append(minhash(own if len(own) else hashes))
        bar.update(read)
    warnings = [*seen.check(task, config), *leaks.check()]
    if not len(buffer):
        raise _nothing_left(read, dropped.summary(), sorted(seen.domains))
    return read, warnings


def _nothing_left(read: int, dropped: Mapping[str, Any], domains: Sequence[str]) -> DataError:
    """The error of sources of which no row is left, with the commonest reason and a row of it."""
    reason = next(iter(dropped), "nothing was read")
    known = f"; the domains are {listed(domains)}" if domains else ""
    such = f", such as {dropped[reason]['examples'][0]}" if dropped else ""
    return DataError(
        f"no rows are left of {read}: {reason}{known}{such}",
        fix="correct the rows, or loosen the filters under data",
    )


def asked_text(example: Example) -> str:
    """The text of a row that near duplicates are found by: what the user and tools say."""
    return "\n".join(turn.content for turn in example.messages if turn.role in ("user", "tool"))


def known_text(example: Example, task: Task) -> str:
    """The text by which two rows are one: what is asked. Without a task it is the whole chat: there one
    question may have several answers, and rows differ in their system turns.
    """
    return "\n".join(turn.content for turn in example.messages) if task.is_chats else asked_text(example)


def _example(raw: Mapping[str, Any], task: Task, where: str, source: SourceConfig) -> Example:
    return to_example(
        raw, task, where, source.columns, source.format, source.values, answer_after=source.answer_after
    )


def _constant_shingles(task: Task, cache: dict[str, int]) -> UInt64[np.ndarray, " n"]:
    """The shingles of the prompt's own words: every row has them, so they say nothing about similarity."""
    literals = [words(text) for text in task.user_literals]
    hashes = [shingles(tokens, cache) for tokens in literals if len(tokens) >= 3]
    return np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)


def _total(config: DataConfig) -> int | None:
    counts = [source.count for source in config.sources]
    return sum(counts) if all(counts) else None


def _empty(task: Task, values: Mapping[str, Any]) -> str | None:
    """That a row has none of the texts that its prompt is made of; None where it has one, and of chats."""
    texts = [values.get(name) for name in task.input_fields]
    if not texts or any(text is None or str(text).strip() for text in texts):
        return None
    return f"{listed(task.input_fields)}: empty"


def _filter(text: str, example: Example, values: Mapping[str, Any], config: DataConfig) -> str | None:
    """Why the row is left out, or None."""
    *prompt, answer = (len(message.content) for message in example.messages)
    if sum(prompt) < config.min_prompt_chars:
        return f"prompt shorter than {config.min_prompt_chars} characters"
    if answer < config.min_answer_chars:
        return f"answer shorter than {config.min_answer_chars} characters"
    if len(text) < config.min_chars:
        return f"shorter than {config.min_chars} characters"
    if len(text) > config.max_chars:
        return f"longer than {config.max_chars} characters"
    if config.min_rating is not None:
        try:
            rating = float(values.get(config.rating_field))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return f"no number in the field {config.rating_field!r}"
        if not rating >= config.min_rating:
            return f"rating below {config.min_rating:g}"
    if config.domains and str(values.get(config.domain_field)) not in config.domains:
        return "of another domain"
    return None


def _requested(name: Any, field: str, where: str) -> int:
    """The split that a row or its source names."""
    if name is None or name == "":
        return UNASSIGNED
    split = SPLIT_NAMES.get(str(name).strip().lower())
    if split is None:
        raise DataError(
            f"{where}: {field}: {name!r} is not a split",
            fix="use train, valid or test, or set data.split_field to another field",
        )
    return split


def _stratum(example: Example, values: Mapping[str, Any], task: Task, config: DataConfig) -> tuple[str, ...]:
    label = [(example.answer or {}).get(task.label)] if task.label else []
    return tuple(str(value) for value in (*label, *map(values.get, config.stratify)))


def _clusters(buffer: RowBuffer, config: DataConfig, dropped: DropCounter) -> Int64[np.ndarray, " n"]:
    """The cluster of each row, -1 for rows dropped as exact duplicates."""
    text = np.array(buffer.text_hash, dtype=np.uint64)
    requested = np.array(buffer.requested, dtype=np.int8)
    # Of the rows with one text: the one that asks for the highest split, then the first in hash order.
    by_text = np.lexsort((np.array(buffer.chat_hash, dtype=np.uint64), -requested, text))
    starts = np.flatnonzero(np.concatenate([[True], text[by_text[1:]] != text[by_text[:-1]]]))
    kept = np.empty(len(buffer), dtype=np.int64)  # for each row the one that is kept of its text
    kept[by_text] = np.repeat(by_text[starts], np.diff(starts, append=len(by_text)))
    for row in np.flatnonzero(kept != np.arange(len(kept))).tolist():
        _drop_duplicate(buffer, row, int(kept[row]), dropped)
    rows = np.unique(kept)
    clusters = (
        near_duplicates(buffer.signatures, config.near_duplicates, rows)
        if config.near_duplicates
        else Clusters(len(rows))
    )
    roots = np.full(len(buffer), -1, dtype=np.int64)
    roots[rows] = rows[clusters.roots()]
    return roots


def _drop_duplicate(buffer: RowBuffer, row: int, kept: int, dropped: DropCounter) -> None:
    held_out = buffer.requested[kept] > max(buffer.requested[row], TRAIN)
    reason = "duplicate of a held-out row" if held_out else "duplicate"
    other = "" if buffer.answer_hash[row] == buffer.answer_hash[kept] else ", with another answer"
    dropped.add(reason + other, lambda: f"{buffer.where(row)} (of {buffer.where(kept)})")


def _splits(
    buffer: RowBuffer, roots: Int64[np.ndarray, " n"], config: DataConfig, dropped: DropCounter
) -> Int8[np.ndarray, " n"]:
    """The split of each row, or ``DROPPED``."""
    rows = np.flatnonzero(roots >= 0)
    requested = np.array(buffer.requested, dtype=np.int8)[rows]
    if config.folds:
        for row in rows[requested == TEST].tolist():
            dropped.add(
                "test row of its own, which a cross-validation leaves alone", partial(buffer.where, row)
            )
        rows = rows[requested != TEST]
        clusters, assigned = _fold(buffer, roots[rows], rows, config)
    else:
        clusters = np.searchsorted(rows, roots[rows])
        assigned = assign_requested(clusters, requested)
        for row in rows[assigned == DROPPED].tolist():
            dropped.add("near duplicate of a held-out row", partial(buffer.where, row))
    content = np.array(buffer.chat_hash, dtype=np.uint64)[rows]
    drawn = draw_splits(
        clusters,
        assigned,
        content,
        [buffer.strata[row] for row in rows],
        valid_fraction=config.valid_fraction,
        test_fraction=0.0 if config.folds else config.test_fraction,
        seed=config.seed,
    )
    if not (drawn == TRAIN).any():
        raise DataError(
            "no rows are left to train on",
            fix="lower data.test_fraction and data.valid_fraction, or add rows",
        )
    if config.train_share < 1:
        train = np.flatnonzero(drawn == TRAIN)
        strata = [buffer.strata[row] for row in rows[train]]
        taken = take_share(
            clusters[train], content[train], strata, share=config.train_share, seed=config.seed
        )
        for row in rows[train[~taken]].tolist():
            dropped.add("training row beyond data.train_share", partial(buffer.where, row))
        drawn[train[~taken]] = DROPPED
    splits = np.full(len(buffer), DROPPED, dtype=np.int8)
    splits[rows] = drawn
    return splits


def _fold(
    buffer: RowBuffer, roots: Int64[np.ndarray, " m"], rows: Int64[np.ndarray, " m"], config: DataConfig
) -> tuple[Int64[np.ndarray, " m"], Int8[np.ndarray, " m"]]:
    """The clusters that stay in one fold, and as assigned splits the test rows of fold ``config.fold``."""
    clusters = merge_clusters(roots, [buffer.cluster_names[row] for row in rows])
    folds = draw_folds(
        clusters,
        np.array(buffer.chat_hash, dtype=np.uint64)[rows],
        [buffer.strata[row] for row in rows],
        folds=config.folds,
        seed=config.seed,
    )
    return clusters, np.where(folds == config.fold - 1, np.int8(TEST), np.int8(UNASSIGNED)).astype(np.int8)


def _write(
    buffer: RowBuffer,
    splits: Int8[np.ndarray, " n"],
    counted: Sequence[str],
    config: DataConfig,
    folder: Path,
) -> tuple[RowStatistics, int]:
    """Write the rows of each split; return their statistics and how many ids were changed because another row
    has the same.
    """
    statistics = RowStatistics(counted)
    hashes, counts = np.unique(np.array(buffer.id_hash, dtype=np.uint64), return_counts=True)
    shared = frozenset(hashes[counts > 1].tolist())
    used: set[str] = set()
    renamed = 0
    with os_errors(), ExitStack() as stack:
        # Leaving the stack closes each file before its temporary name becomes the real one.
        paths = [stack.enter_context(atomic_path(folder / f"{split}.jsonl")) for split in SPLITS]
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for number, row in enumerate(buffer.rows()):
            if splits[number] == DROPPED:
                continue
            id, copy = row.id, 1
            # Only an id of several rows, or one that looks like a changed id, can be in use already.
            if buffer.id_hash[number] in shared or "~" in id:
                while id in used:
                    copy += 1
                    id = f"{row.id}~{copy}"
                used.add(id)
            renamed += copy > 1
            split = SPLITS[splits[number]]
            set_name = (config.sources[buffer.source[number]].set or "test") if split == "test" else split
            files[splits[number]].write(row.final_line(id, set_name))
            statistics.add(split, set_name, row.figures)
    return statistics, renamed


def _cluster_sizes(roots: Int64[np.ndarray, " n"], splits: Int8[np.ndarray, " n"]) -> dict[str, int]:
    """How many clusters of several rows are kept, their rows, and the rows of the largest."""
    _, sizes = np.unique(roots[(roots >= 0) & (splits != DROPPED)], return_counts=True)
    several = sizes[sizes > 1]
    return {"clusters": len(several), "rows": int(several.sum()), "largest": int(several.max(initial=0))}
