"""The audit stage: what is measured of teacher and student behind a distillation.

The models are loaded one after the other. Of the teacher the hidden states of the sampled answers stay on
disk and its output head in memory, which is enough for its whole distributions beside a student. Each model's
figures are a file in the scratch folder: a killed audit goes on behind the last one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import resolve_asset
from mlx_distill.data.general_text import PACKAGED, read_general_text
from mlx_distill.errors import DataError
from mlx_distill.evaluate.audit import (
    COMPARED,
    FACTS,
    FORMAT,
    LOSSES,
    PARTS,
    audit_figures,
    audit_lines,
)
from mlx_distill.recipe import UNTRAINED, DistillConfig, Recipe
from mlx_distill.run_models import RUN_MODELS
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.context import (
    Context,
    Facts,
    as_teacher,
    check_stop,
    count_rows,
    load_model,
    read_rows,
    vocabulary_hash,
)
from mlx_distill.stages.distill import kept_temperature, mid_tokens, token_groups, with_teachers_chat
from mlx_distill.stages.targets import fingerprints
from mlx_distill.storage import atomic_path, read_json, scratch, write_json, write_jsonl
from mlx_distill.text import counted, size
from mlx_distill.thinking import set_thinking

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_distill.data.chat import TokenizedRow
    from mlx_distill.distill.align import AlignedRow
    from mlx_distill.distill.audit import StudentAudit
    from mlx_distill.distill.live_teacher import LiveTeacher
    from mlx_distill.progress import Bar

    # The id, the row in a model's tokens, and the bytes of its trained tokens.
    Measured = tuple[str, TokenizedRow, int]

MODELS = ("teacher_before", "teacher", "student_before", "student")
_HIDDEN = "teacher_hidden.safetensors"


def audited_models(recipe: Recipe) -> list[str]:
    """The models that are measured: a teacher that is not trained is the same before and after."""
    return [name for name in MODELS if name != "teacher_before" or recipe.teach.method != UNTRAINED]


def general_text_file(recipe: Recipe) -> str:
    """The file of the general text: the recipe's, or the packaged one."""
    path = recipe.evaluate.general_text
    return str(PACKAGED) if path is None else resolve_asset(path, recipe.base)


def audit(context: Context, folder: Path) -> Facts:
    """Measure teacher and student, before and after their training, on answers of the data and on general
    text; and on sampled targets the parts of the student's loss and what the cache loses.
    """
    work = _Audit(context, folder)
    reset_peak_memory()
    measured = {name: work.part(name) for name in audited_models(context.recipe)}
    losses = [line for part in measured.values() for line in part["losses"]]
    compared = [line for part in measured.values() for line in part["compared"]]
    parts = {name: part["parts"] for name, part in measured.items() if part["parts"]}
    parts["coefficients"] = work.pair.coefficients
    write_json(folder / FACTS, work.facts)
    write_jsonl(folder / LOSSES, losses)
    write_json(folder / PARTS, parts)
    write_jsonl(folder / COMPARED, compared)
    figures = audit_figures(work.facts, losses, parts, compared, context.recipe.evaluate.confidence)
    for line in audit_lines(figures):
        context.progress.note(f"audit: {line}")
    return {"rows": len(losses), "peak_memory_bytes": peak_memory()}


class _Audit:
    """The audit of one run."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.folder = context, folder
        self.batch_size = context.recipe.evaluate.batch_size
        self.text = read_general_text(general_text_file(context.recipe))
        self.pair = _Pair(context)
        self.rows, self.left_out = self._rows()
        self._live: LiveTeacher | None = None
        self._note_cost()

    @property
    def facts(self) -> dict[str, Any]:
        """What is measured, and on what."""
        pair = self.pair
        return {
            "format": FORMAT,
            "general_text": {
                "name": self.text.name,
                "packaged": self.context.recipe.evaluate.general_text is None,
                "bytes": self.text.bytes,
                "paragraphs": len(self.text.paragraphs),
                "left_out": self.text.left_out,
            },
            "rows": {name: len(rows) for name, rows in self.rows.items()},
            "rows_left_out": self.left_out,
            "targets": {"rows": len(pair.aligned), "set": pair.split, "left_out": pair.left_out},
            "token_loss": pair.loss,
            "compared": pair.compared,
            "sampled": pair.reader.layout.sampled,
            "live": pair.settings.teacher == "live",
            "reads_cache": pair.reads_cache,
            "top_k": pair.reader.layout.top_k,
            "temperature": pair.temperature,
        }

    def _note_cost(self) -> None:
        """Say what will be computed."""
        models = audited_models(self.context.recipe)
        tokens = sum(
            len(row)
            for name in models
            for rows in self.tokenized[RUN_MODELS[name].role].values()
            for _, row, _ in rows
        )
        tokens += (len(models) - ("teacher_before" in models)) * sum(len(r.tokens) for r in self.pair.aligned)
        answers = sum(map(len, self.rows.values())) + len(self.pair.aligned)
        first = "the first " if self.text.left_out else ""
        self.context.progress.note(
            f"audit: {counted(answers, 'answer')} and {first}{size(self.text.bytes)} of {self.text.name} in "
            f"{counted(len(models), 'model')}, {tokens:,} tokens to read"
        )

    @cached_property
    def tokenized(self) -> dict[str, dict[str, list[Measured]]]:
        """By role of a model and set what is measured, in its tokens."""
        from mlx_distill.distill.audit import text_row

        out = {}
        for role, tokenizer in self.pair.tokenizers.items():
            paragraphs = [
                (str(n), *text_row(tokenizer, paragraph)) for n, paragraph in enumerate(self.text.paragraphs)
            ]
            answers = {split: list(self._answers(split, role, tokenizer)) for split in self.rows}
            out[role] = {**answers, "general": paragraphs}
        return out

    def _rows(self) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """The rows whose answers are measured, evenly spread over those that the student was trained and
        validated on, and the number of those that are too long for a model.
        """
        from mlx_distill.data.chat import render_many

        recipe, left_out = self.context.recipe, 0
        out: dict[str, list[dict[str, Any]]] = {}
        for split in ("train", "valid"):
            count = count_rows(self.context, split)
            if split == "train":
                count = min(count, recipe.distill.max_rows or count, recipe.targets.max_rows or count)
            chosen = set(spread(count, recipe.evaluate.audit_rows))
            rows = [row for n, row in enumerate(islice(read_rows(self.context, split), count)) if n in chosen]
            fits = [True] * len(rows)
            for name, limit in (("teacher", recipe.teach.max_length), ("student", recipe.distill.max_length)):
                chats = [self._chat(row, name) for row in rows]
                lengths = map(len, render_many(self.pair.tokenizers[name], chats)) if rows else ()
                fits = [fit and length <= limit for fit, length in zip(fits, lengths, strict=True)]
            out[split] = [row for row, fit in zip(rows, fits, strict=True) if fit]
            left_out += len(rows) - len(out[split])
        return out, left_out

    def _chat(self, row: Mapping[str, Any], role: str) -> Sequence[Mapping[str, Any]]:
        """A row as a model of that role reads it."""
        from mlx_distill.data.messages import with_system

        system = as_teacher(self.context).system if role == "teacher" else None
        return with_system(row["messages"], system) if system is not None else row["messages"]

    def part(self, name: str) -> dict[str, Any]:
        """The figures of one model, measured or read from an earlier run of this stage."""
        import mlx.core as mx

        path = scratch(self.folder) / f"{name}.json"
        if not path.is_file():
            check_stop(self.context)
            teacher = self._teacher(needed=name in ("student_before", "student"))
            model, tokenizer = load_model(self.context, RUN_MODELS[name].folder)
            write_json(path, self._measure(name, model, tokenizer, teacher))
            if name == "teacher" and self.pair.needs_teacher:
                self._live = _head_of(model, tokenizer)
            del model
            gc.collect()
            mx.clear_cache()
        return dict(read_json(path))

    def _teacher(self, needed: bool) -> LiveTeacher | None:
        """The teacher's head, read again where an earlier run has measured the teacher."""
        if needed and self.pair.needs_teacher and self._live is None:
            self._live = _head_of(*load_model(self.context, "teacher"))
        return self._live

    def _measure(self, name: str, model: Any, tokenizer: Any, teacher: LiveTeacher | None) -> dict[str, Any]:
        role = RUN_MODELS[name].role
        measured = self.tokenized[role]
        aligned = self.pair.aligned if role == "student" or name == "teacher" else []
        total = sum(map(len, measured.values())) + len(aligned)
        out: dict[str, Any] = {"losses": [], "parts": {}, "compared": []}
        with self.context.progress.task(f"audit {name.replace('_', ' ')}", total=total, unit="row") as bar:
            for split, rows in measured.items():
                done = len(out["losses"])
                out["losses"] += self._losses(name, split, model, tokenizer, rows, bar, done)
            if name == "teacher" and self.pair.needs_teacher:
                self._write_hidden(model, tokenizer)
            if role == "student":
                out |= self._parts(name, model, tokenizer, teacher)
            bar.update(total)
        return out

    def _answers(self, split: str, role: str, tokenizer: Any) -> Iterator[Measured]:
        from mlx_distill.data.chat import render_many

        rows = self.rows[split]
        chats = [self._chat(row, role) for row in rows]
        for row, chat in zip(rows, render_many(tokenizer, chats) if rows else (), strict=True):
            yield row["id"], chat, len(row["messages"][-1]["content"].encode())

    def _losses(
        self,
        name: str,
        split: str,
        model: Any,
        tokenizer: Any,
        measured: Sequence[Measured],
        bar: Bar,
        done: int,
    ) -> Iterator[dict[str, Any]]:
        from mlx_distill.distill.audit import row_losses

        def each(count: int) -> None:
            check_stop(self.context)
            bar.update(done + count)

        losses = row_losses(model, tokenizer, [row for _, row, _ in measured], self.batch_size, each)
        for (id_, _, size_), (nats, tokens) in zip(measured, losses, strict=True):
            yield {"model": name, "set": split, "id": id_, "nats": nats, "tokens": tokens, "bytes": size_}

    def _write_hidden(self, model: Any, tokenizer: Any) -> None:
        import mlx.core as mx

        from mlx_distill.distill.live_teacher import LiveTeacher

        teacher, stop = LiveTeacher(model, tokenizer), partial(check_stop, self.context)
        batches = list(_batches(self.pair.aligned, self.batch_size))
        hidden = {}
        for number, batch in enumerate(batches):
            stop()
            hidden[f"{number:06d}"] = teacher.hidden(batch)
        with atomic_path(scratch(self.folder) / _HIDDEN) as path:
            mx.save_safetensors(str(path), hidden)

    def _parts(self, name: str, model: Any, tokenizer: Any, teacher: LiveTeacher | None) -> dict[str, Any]:
        import mlx.core as mx

        from mlx_distill.distill.audit import Parts, add_parts

        if not self.pair.aligned:
            return {"parts": {}, "compared": []}
        audit = self.pair.student_audit(tokenizer, teacher)
        path = scratch(self.folder) / _HIDDEN
        hidden: dict[str, mx.array] = {}
        if teacher is not None:
            hidden = dict(mx.load(str(path)))
        sums: Parts = {}
        compared: list[dict[str, Any]] = []
        for number, batch in enumerate(_batches(self.pair.aligned, self.batch_size)):
            check_stop(self.context)
            parts, lines = audit.measure(model, batch, hidden.get(f"{number:06d}"))
            add_parts(sums, parts)
            compared += [{"model": name, **line} for line in lines]
        return {"parts": sums, "compared": compared}


class _Pair:
    """Teacher and student of a run, and the sampled targets."""

    def __init__(self, context: Context) -> None:
        from mlx_distill.distill.audit import LOWER_BOUNDS
        from mlx_distill.distill.objective import term_coefficients
        from mlx_distill.distill.teacher_cache import TargetReader
        from mlx_distill.distill.token_losses import TOKEN_LOSSES, token_loss_name
        from mlx_distill.infer.label_scoring import find_label_trie
        from mlx_distill.models.forward import embedding_rows
        from mlx_distill.models.load import empty_model, load_tokenizer

        self.context = context
        settings = context.recipe.distill
        if context.task.label is None and settings.label_weight:
            settings = replace(settings, label_weight=0.0)
        self.settings: DistillConfig = settings
        folders = {"teacher": context.run / "teacher", "student": context.run / "student_base"}
        self.tokenizers = {role: load_tokenizer(folder) for role, folder in folders.items()}
        set_thinking(self.tokenizers["student"], context.recipe.student_thinking)
        self.columns = embedding_rows(empty_model(folders["student"]))
        self.reader = TargetReader(context.run / "targets")
        self.reader.check(fingerprints(context, self.tokenizers["teacher"]))
        hashes = [vocabulary_hash(tokenizer) for tokenizer in self.tokenizers.values()]
        self.same_tokenizer = hashes[0] == hashes[1]
        self.labels = find_label_trie(self.tokenizers["student"], context.task, settings.label_weight)
        self.loss = token_loss_name(settings, self.same_tokenizer)
        is_live = settings.teacher == "live"
        distributions = self.loss is not None and TOKEN_LOSSES[self.loss].events == "start_index"
        self.reads_cache = distributions and not is_live
        self.compared = None
        if not self.reader.layout.sampled:
            plain = "kl" if self.same_tokenizer else "token_groups"
            self.compared = self.loss if self.loss in LOWER_BOUNDS else plain
        self.temperature = 1.0 if is_live else kept_temperature(self.loss, settings, self.reader.index)
        self.coefficients = term_coefficients(settings, self.same_tokenizer)
        has_valid = count_rows(context, "valid") > 0
        self.split = "valid" if has_valid else "train"
        self.aligned, self.left_out = self._aligned()
        needed = self.compared is not None or (is_live and distributions)
        self.needs_teacher = needed and bool(self.aligned)

    @cached_property
    def groups(self) -> Any:
        """The token groups, where a loss needs them."""
        from mlx_distill.distill.token_losses import TOKEN_LOSSES

        needed = [TOKEN_LOSSES[name].needs for name in (self.loss, self.compared) if name]
        if "token_groups" not in needed:
            return None
        return token_groups(self.tokenizers["student"], self.tokenizers["teacher"], self.columns)

    def _aligned(self) -> tuple[list[AlignedRow], int]:
        """The sampled targets as rows of the student, and the number of those that are left out."""
        from mlx_distill.data.chat import render_many
        from mlx_distill.distill.align import aligner, with_answer

        sampled = self._targets()
        teacher_tokenizer, tokenizer = self.tokenizers["teacher"], self.tokenizers["student"]
        align = aligner(
            self.context.task,
            tokenizer,
            teacher_tokenizer,
            self.labels,
            same_tokenizer=self.same_tokenizer,
            columns=self.columns,
            temperature=self.temperature,
            mid_tokens=mid_tokens(
                tokenizer,
                teacher_tokenizer,
                lambda: self.groups,
                self.loss,
                self.settings,
                self.context.recipe.targets.draws,
            ),
            finish=with_teachers_chat(self.context, teacher_tokenizer),
        )
        chats = [with_answer(row, targets) for row, targets in sampled]
        rows = []
        rendered = render_many(tokenizer, chats) if chats else []
        for chat, messages, (_, targets) in zip(rendered, chats, sampled, strict=True):
            if len(chat) > self.settings.max_length:
                continue
            try:
                rows.append(align(chat, messages, targets))
            except DataError:  # counted and named by distill
                continue
        return rows, len(sampled) - len(rows)

    def _targets(self) -> list[tuple[dict[str, Any], Any]]:
        """Targets of validation rows with their rows, or of training rows where there are none."""
        valid = self._valid_targets()
        self.split = "valid" if valid else "train"
        first, count = (len(self.reader) - valid, valid) if valid else (0, len(self.reader))
        chosen = spread(count, self.context.recipe.evaluate.audit_rows)
        sampled = [self.reader[first + number] for number in chosen]
        ids = {targets.id for targets in sampled}
        rows = {row["id"]: row for row in read_rows(self.context, self.split) if row["id"] in ids}
        return [(rows[targets.id], targets) for targets in sampled]

    def _valid_targets(self) -> int:
        """The last targets, which are of validation rows; rows of a teacher that thinks may have none."""
        if not self.context.recipe.teacher_thinking:
            return count_rows(self.context, "valid")
        ids, first = {row["id"] for row in read_rows(self.context, "valid")}, len(self.reader)
        while first and self.reader[first - 1].id in ids:
            first -= 1
        return len(self.reader) - first

    def student_audit(self, tokenizer: Any, teacher: LiveTeacher | None) -> StudentAudit:
        """What measures a student."""
        from mlx_distill.distill.audit import StudentAudit

        return StudentAudit(
            tokenizer,
            self.settings,
            len(self.context.task.labels) + 1,
            self.labels,
            self.groups,
            same_tokenizer=self.same_tokenizer,
            teacher=teacher,
            compared=self.compared,
        )


def spread(count: int, wanted: int) -> list[int]:
    """At most so many of the numbers below ``count``, evenly spread.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    few = min(count, wanted)
    return [number * count // few for number in range(few)]


def _batches(rows: Sequence[AlignedRow], count: int) -> Iterator[list[AlignedRow]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, count)):
        yield batch


def _head_of(model: Any, tokenizer: Any) -> LiveTeacher:
    """A teacher that only makes distributions of hidden states; its blocks are let go."""
    from mlx_distill.distill.audit import without_trunk
    from mlx_distill.distill.live_teacher import LiveTeacher

    without_trunk(model)
    return LiveTeacher(model, tokenizer)
