"""The stages: each reads its parents' folders, does one thing, and leaves its result in the folder that it is given.

A stage knows nothing of keys, skipping or renaming: :mod:`mlx_distill.pipeline` hands it a partial folder, empty or as a killed run left it,
and publishes that folder when the stage returns. What a stage returns is recorded in its manifest, for people.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import to_mapping
from mlx_distill.errors import DataError, Interrupted
from mlx_distill.files import read_jsonl, scratch, write_jsonl
from mlx_distill.progress import Progress
from mlx_distill.recipe import DistillConfig, Recipe, TrainConfig
from mlx_distill.runtime import StopFlag, peak_memory, rank_and_size, reset_peak_memory
from mlx_distill.task import Task

Facts = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What every stage of a run shares: the recipe, its task, the run's folder, where progress is told, and the wish to stop."""

    recipe: Recipe
    task: Task
    run: Path
    progress: Progress
    stop: StopFlag


def prepare(context: Context, folder: Path) -> Facts:
    """Rows from everywhere to train, valid and test chats."""
    from mlx_distill.data import splits

    statistics = splits.prepare(context.recipe.data, context.task, context.recipe.base, folder, context.progress)
    return {"rows": statistics["rows"]} if "rows" in statistics else {}


def convert(context: Context, folder: Path, source: str) -> Facts:
    """A checkpoint of the Hub's layout to one of ours, numerically the same."""
    from mlx_distill.models.convert import convert_into

    settings = context.recipe.convert
    report = convert_into(
        source, folder, quantize=settings.quantize, dtype=settings.dtype, revision=settings.revision, progress=context.progress
    )
    return {"source": source, **report.facts()}


def teach(context: Context, folder: Path) -> Facts:
    """Fine-tune the teacher on the labelled rows."""
    model, tokenizer = _load(context, "teacher_base")
    return _fine_tune(context, folder, "teach", model, tokenizer, "teacher_base", context.recipe.teach)


def targets(context: Context, folder: Path) -> Facts:
    """What the teacher says of the training and validation rows, written once."""
    from mlx_distill.targets import TargetWriter

    settings = context.recipe.targets
    model, tokenizer = _load(context, "teacher")
    rows = [row for name in ("train", "valid") for row in _rows(context, name)]
    rows = rows[: settings.max_rows or None]
    writer = TargetWriter(folder)
    shard = max(settings.batch_size * 8, 64)
    invalid = 0
    with context.progress.task("targets", total=len(rows), unit="row", start=writer.done) as bar:
        for first in range(writer.done, len(rows), shard):
            _stop_here(context)
            written, bad = _score_shard(context, model, tokenizer, rows[first : first + shard])
            writer.write(written)
            invalid += bad
            bar.update(writer.done)
    writer.finish(labels=list(context.task.labels), teacher_tokenizer=_fingerprint(tokenizer), text=settings.text, top_k=settings.top_k)
    return {"rows": writer.done, "bytes": sum(p.stat().st_size for p in folder.glob("*-0*"))}


def distill(context: Context, folder: Path, control: str | None = None) -> Facts:
    """Train the student on the teacher's targets; ``control`` trains on one thing alone: ``labels`` or ``text``."""
    from mlx_distill.data.templates import pad_id
    from mlx_distill.train.kd import kd
    from mlx_distill.train.pairs import collate_pairs

    settings = context.recipe.distill
    model, tokenizer = _load(context, "student_base")
    if control == "labels":
        return _fine_tune(context, folder, "distill (labels alone)", model, tokenizer, "student_base", settings)
    if control == "text":
        settings = replace(settings, label_weight=0.0, token_weight=0.0, text_weight=1.0)
    train_pairs, valid_pairs, tokenizers = _pairs(context, tokenizer, settings)
    pad, classes = pad_id(tokenizer), len(context.task.labels)
    return _train(
        context, folder, "distill" if control is None else "distill (text alone)", model, tokenizer, "student_base", settings,
        kd(settings, **tokenizers), train_pairs, valid_pairs, lambda pairs, rows: collate_pairs(pairs, rows, pad, classes),
    )  # fmt: skip


def quantize(context: Context, folder: Path) -> Facts:
    """Bring what is not MXFP4 already to few bits."""
    from mlx_distill.models.quantize import quantize_into

    settings = context.recipe.quantize
    return quantize_into(
        context.run / "student", folder, settings.mode, group_size=settings.group_size, adapter=settings.adapter, keep=settings.keep,
        progress=context.progress,
    ).facts()  # fmt: skip


def evaluate(context: Context, folder: Path, model_folder: str, name: str) -> Facts:
    """Held-out rows through one model, a chunk at a time, so that a killed evaluation goes on behind its last whole chunk."""
    from mlx_distill.infer.predict import predict
    from mlx_distill.infer.store import write_predictions
    from mlx_distill.records import Prediction

    settings = context.recipe.evaluate
    rows = _evaluation_rows(context)
    model, tokenizer = _load(context, model_folder)
    reset_peak_memory()
    chunk = settings.batch_size * 4
    found: list[Prediction] = []
    with context.progress.task(f"evaluate {name}", total=len(rows), unit="row") as bar:
        for first in range(0, len(rows), chunk):
            path = scratch(folder) / f"predictions-{first:08d}.jsonl"
            if not path.is_file():
                _stop_here(context)
                done = predict(
                    model, tokenizer, context.task, rows[first : first + chunk], batch_size=settings.batch_size,
                    on_done=lambda count, first=first: bar.update(first + count),
                )  # fmt: skip
                write_jsonl(path, (asdict(prediction) for prediction in done))
            found += [Prediction(**row) for _, row in read_jsonl(path)]
            bar.update(len(found))
    write_predictions(folder / "predictions.jsonl", name, context.task, rows, found, settings=to_mapping(settings))
    return {"rows": len(rows), "peak_memory_bytes": peak_memory()}


# --- what the stages share -----------------------------------------------------------------------------------------------------


def _load(context: Context, name: str) -> tuple[Any, Any]:
    from mlx_distill.models.load import load

    return load(context.run / name, dtype=context.recipe.compute_dtype)


def _rows(context: Context, split: str) -> list[dict[str, Any]]:
    path = context.run / "data" / f"{split}.jsonl"
    return [row for _, row in read_jsonl(path)] if path.stat().st_size else []


def _evaluation_rows(context: Context) -> list[dict[str, Any]]:
    rows = _rows(context, "test")
    if not rows:
        raise DataError("no held-out rows", fix="raise data.test_fraction, or give a source with split: test")
    limit = context.recipe.evaluate.max_rows
    if not limit:
        return rows
    counts: dict[str, int] = {}
    kept = []
    for row in rows:
        counts[row["set"]] = counts.get(row["set"], 0) + 1
        if counts[row["set"]] <= limit:
            kept.append(row)
    return kept


def _stop_here(context: Context) -> None:
    if context.stop:
        raise Interrupted("stopped", fix="run the same command again: it goes on from here")


def _fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary: targets of one teacher are of no use with the ids of another."""
    from mlx_distill.files import digest

    return digest(dict(tokenizer.get_vocab()))


def _fine_tune(context: Context, folder: Path, name: str, model: Any, tokenizer: Any, base: str, settings: TrainConfig) -> Facts:
    """Supervised fine-tuning on the rows' own answers."""
    from mlx_distill.data.batches import collate, encode_rows
    from mlx_distill.data.rows import from_row
    from mlx_distill.data.templates import pad_id
    from mlx_distill.train.objectives import sft

    encoded = {}
    for split in ("train", "valid"):
        rows = _rows(context, split)
        encoded[split] = []
        if rows:
            encoded[split], report = encode_rows(
                (from_row(row) for row in rows), tokenizer, settings.max_length, settings.loss_on, where=str(context.run / "data" / f"{split}.jsonl")
            )
            if report.too_long or report.nothing_to_train:
                context.progress.note(f"{name}: {split}: {report}")
    pad = pad_id(tokenizer)
    return _train(
        context, folder, name, model, tokenizer, base, settings, sft(), encoded["train"], encoded["valid"],
        lambda rows, chosen: collate(rows, chosen, pad),
    )  # fmt: skip


def _score_shard(context: Context, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], int]:
    """Targets of some rows; a row whose answer is not valid keeps the data's own text."""
    from mlx_distill.data.templates import answer_ids, render
    from mlx_distill.losses.labels import label_tokens
    from mlx_distill.schema import label_prefix, parse_answer
    from mlx_distill.targets import TargetRow
    from mlx_distill.teacher import label_position, score

    task, settings = context.task, context.recipe.targets
    texts = [row["messages"][-1]["content"] for row in rows]
    invalid = 0
    if settings.text == "greedy":
        for i, text in enumerate(_answers(context, model, tokenizer, rows)):
            if parse_answer(text, task.schema)[0] is None:
                invalid += 1
            else:
                texts[i] = text
    chats = [render(tokenizer, [*row["messages"][:-1], {"role": "assistant", "content": text}]) for row, text in zip(rows, texts, strict=True)]
    starts = [chat.spans[-1][0] for chat in chats]
    places = []
    for chat, start, text in zip(chats, starts, texts, strict=True):
        answer, _ = parse_answer(text, task.schema)
        places.append(label_position(chat.tokens.tolist(), start, answer_ids(tokenizer, label_prefix(task.schema, task.label, answer))))
    scored = score(
        model, [chat.tokens.tolist() for chat in chats], starts, top_k=settings.top_k, labels=label_tokens(tokenizer, task.labels),
        label_at=places, batch_size=settings.batch_size,
    )  # fmt: skip
    out = [
        TargetRow(
            row["id"], text, None if s.label_logprobs is None else tuple(float(x) for x in s.label_logprobs), s.ids, s.logprobs, s.topk_ids,
            s.topk_logprobs,
        )
        for row, text, s in zip(rows, texts, scored, strict=True)
    ]  # fmt: skip
    return out, invalid


def _answers(context: Context, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    from mlx_distill.data.templates import prompt_ids, stop_ids
    from mlx_distill.infer.generate import generate

    prompts = [prompt_ids(tokenizer, row["messages"][:-1]) for row in rows]
    done = generate(
        model, tokenizer, prompts, max_tokens=context.task.max_answer_tokens, batch_size=context.recipe.targets.batch_size, stop=set(stop_ids(tokenizer))
    )
    return [g.text for g in done]


def _pairs(context: Context, tokenizer: Any, settings: DistillConfig) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Training and validation pairs, and what the objective needs of the two tokenizers."""
    from mlx_distill.data.templates import answer_ids, render, stop_ids
    from mlx_distill.losses.alignment import align_bytes
    from mlx_distill.losses.cross_tokenizer import cell_map
    from mlx_distill.losses.labels import label_tokens
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.schema import label_prefix, parse_answer
    from mlx_distill.targets import TargetReader
    from mlx_distill.teacher import label_position
    from mlx_distill.train.pairs import make_pair

    task = context.task
    reader = TargetReader(context.run / "targets")
    teacher_tokenizer = load_tokenizer(context.run / "teacher")
    if reader.index["teacher_tokenizer"] != _fingerprint(teacher_tokenizer):
        raise DataError(f"{reader.folder}: targets of another tokenizer than {context.run / 'teacher'}", fix="run: mlx-distill targets")
    prompts = {row["id"]: (row["messages"][:-1], split) for split in ("train", "valid") for row in _rows(context, split)}
    out: dict[str, list[Any]] = {"train": [], "valid": []}
    too_long = 0
    with context.progress.task("align", total=len(reader), unit="row") as bar:
        for number, target in enumerate(reader, 1):
            messages, split = prompts[target.id]
            chat = render(tokenizer, [*messages, {"role": "assistant", "content": target.text}])
            if len(chat) > settings.max_length:
                too_long += 1
                continue
            start, end = chat.spans[-1]
            answer, _ = parse_answer(target.text, task.schema)
            prefix = answer_ids(tokenizer, label_prefix(task.schema, task.label, answer))
            spans = align_bytes(chat.tokens[start:end], target.ids[:-1], tokenizer, teacher_tokenizer)
            out[split].append(
                make_pair(
                    chat.tokens, start, spans, teacher_logprobs=target.logprobs, topk_ids=target.topk_ids, topk_logprobs=target.topk_logprobs,
                    label_at=label_position(chat.tokens.tolist(), start, prefix), label_logprobs=target.label_logprobs,
                )
            )  # fmt: skip
            bar.update(number)
    if too_long:
        context.progress.note(f"distill: {too_long} rows are longer than {settings.max_length} tokens for the student and are left out")
    inputs = {
        "labels": label_tokens(tokenizer, task.labels),
        "cells": cell_map(tokenizer, teacher_tokenizer, student_stop=stop_ids(tokenizer)[0], teacher_stop=stop_ids(teacher_tokenizer)[0]),
        "same_tokenizer": _fingerprint(tokenizer) == _fingerprint(teacher_tokenizer),
    }
    return out["train"], out["valid"], inputs


def _train(
    context: Context, folder: Path, name: str, model: Any, tokenizer: Any, base: str, settings: TrainConfig, objective: Any,
    rows: Sequence[Any], valid: Sequence[Any], collate: Callable[[Sequence[Any], Sequence[int]], Any],
) -> Facts:  # fmt: skip
    """The loop over prepared rows; leaves an adapter folder, or a whole model where all its weights moved."""
    from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
    from mlx_distill.models.save import save_model
    from mlx_distill.optim import make_optimizer
    from mlx_distill.train.loop import total_steps, train
    from mlx_distill.train.rows import RowBatches

    lora = LoraSettings(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.target_modules, settings.method)
    adapted = settings.method in ("lora", "dora")
    if adapted:
        add_lora(model, lora, settings.seed)
    rank, size = rank_and_size()
    source = RowBatches(
        [len(row.tokens) for row in rows], lambda chosen: collate(rows, chosen), settings.batch_size, settings.seed, rank=rank, size=size
    )
    steps = total_steps(settings, len(source))
    look = [collate(valid, range(i, min(i + settings.batch_size, len(valid)))) for i in range(0, len(valid), settings.batch_size)]
    with context.progress.task(name, total=steps, unit="step") as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update(row["step"], loss=row["loss"], tokens_per_second=round(row["tokens_per_second"]))

        result = train(
            model, source, objective, make_optimizer(settings, steps), settings, folder=scratch(folder), valid=look, hooks=[show], stop=context.stop
        )
    shutil.copyfile(scratch(folder) / "metrics.jsonl", folder / "metrics.jsonl")
    if adapted:
        save_adapter(model, folder, lora, context.run / base)
    else:
        save_model(model, context.run / base, folder)
    return {
        "steps": result.steps, "rows": len(rows), "tokens": result.tokens, "seconds": result.seconds, "resumed": result.resumed,
        "best_step": result.best_step, "best_loss": result.best_loss, "trainable": trainable_share(model),
        "peak_memory_bytes": result.metrics.get("peak_memory_bytes"),
    }  # fmt: skip


def trainable_share(model: Any) -> dict[str, float]:
    """Trained parameters, all parameters, and the share of them."""
    from mlx.utils import tree_flatten

    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
    total = sum(_count(module) for _, module in model.named_modules())
    return {"trained": trained, "all": total, "share": trained / total}


def _count(module: Any) -> int:
    """Weights of one module itself; packed ones count as what they stand for."""
    import mlx.core as mx

    own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
    if "scales" in own and hasattr(module, "bits"):
        packed = own["weight"].size * 32 // module.bits
        return packed + sum(value.size for name, value in own.items() if name not in ("weight", "scales", "biases"))
    return sum(value.size for value in own.values())
