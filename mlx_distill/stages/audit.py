"""The audit stage: what is measured of teacher and student behind a distillation, and of the teacher alone
where no student is evaluated.

The models are loaded one after the other. Of the teacher the hidden states of the sampled answers stay on
disk and its output head in memory, which is enough for its whole distributions beside a student. Each model's
figures are a file in the scratch folder: a killed audit goes on behind the last one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.config import resolve_asset
from mlx_distill.data.general_text import PACKAGED, read_general_text
from mlx_distill.evaluate.audit import (
    COMPARED,
    FACTS,
    FORMAT,
    LOSSES,
    PARTS,
)
from mlx_distill.recipe import UNTRAINED, Recipe
from mlx_distill.run_models import RESULTS, RUN_MODELS
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.audited_pair import AuditedPair, spread
from mlx_distill.stages.context import (
    Context,
    Facts,
    as_teacher,
    check_stop,
    count_rows,
    load_model,
    read_rows,
)
from mlx_distill.storage import atomic_path, read_json, scratch, write_json, write_jsonl
from mlx_distill.text import counted, size
from mlx_distill.thinking import set_thinking

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_distill.data.chat import TokenizedRow
    from mlx_distill.distill.align import AlignedRow
    from mlx_distill.distill.live_teacher import LiveTeacher
    from mlx_distill.progress import Bar

    # The id, the row in a model's tokens, and the bytes of its trained tokens.
    Measured = tuple[str, TokenizedRow, int]

_HIDDEN = "teacher_hidden.safetensors"


def audited_models(recipe: Recipe) -> list[str]:
    """The models that the audit measures, none where there is no audit: the teacher, and the student where a
    recipe evaluates it or its quantized copy. A teacher that is not trained is the same before and after.
    """
    trained = recipe.teach.method != UNTRAINED
    teacher = ["teacher_before", "teacher"] if trained else ["teacher"]
    if not recipe.evaluate.audit_rows:
        return []
    if _measures_student(recipe):
        return [*teacher, "student_before", "student"]
    return teacher if trained else []


def _measures_student(recipe: Recipe) -> bool:
    """Whether there is a student at the end of a run: who evaluates the teacher alone may have none yet."""
    return recipe.student is not None and not set(RESULTS).isdisjoint(recipe.evaluate.models)


def general_text_file(recipe: Recipe) -> str:
    """The file of the general text: the recipe's, or the packaged one."""
    path = recipe.evaluate.general_text
    return str(PACKAGED) if path is None else resolve_asset(path, recipe.base)


def audit(context: Context, folder: Path) -> Facts:
    """Measure teacher and student, before and after their training, on answers of the data and on general
    text; and on sampled targets the parts of the student's loss and what the cache loses. Without a student
    the teacher alone.
    """
    work = _Audit(context, folder)
    reset_peak_memory()
    measured = {name: work.part(name) for name in audited_models(context.recipe)}
    losses = [line for part in measured.values() for line in part["losses"]]
    compared = [line for part in measured.values() for line in part["compared"]]
    parts = {name: part["parts"] for name, part in measured.items() if part["parts"]}
    parts["coefficients"] = work.pair.coefficients if work.pair else {}
    write_json(folder / FACTS, work.facts)
    write_jsonl(folder / LOSSES, losses)
    write_json(folder / PARTS, parts)
    write_jsonl(folder / COMPARED, compared)
    return {"rows": len(losses), "peak_memory_bytes": peak_memory()}


class _Audit:
    """The audit of one run."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.folder = context, folder
        self.batch_size = context.recipe.evaluate.batch_size
        self.text = read_general_text(general_text_file(context.recipe))
        self.pair = AuditedPair(context) if _measures_student(context.recipe) else None
        self.tokenizers = self.pair.tokenizers if self.pair else {"teacher": _teacher_tokenizer(context)}
        self.rows, self.left_out = self._rows()
        self._live: LiveTeacher | None = None
        self._note_cost()

    @property
    def facts(self) -> dict[str, Any]:
        """What is measured, and on what."""
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
            **(self.pair.facts if self.pair else {}),
        }

    @property
    def aligned(self) -> Sequence[AlignedRow]:
        """The sampled targets as rows of the student; none without one."""
        return self.pair.aligned if self.pair else ()

    @property
    def needs_teacher(self) -> bool:
        """Whether a student is measured beside the teacher's distributions."""
        return self.pair is not None and self.pair.needs_teacher

    def _note_cost(self) -> None:
        """Say what will be computed."""
        models = audited_models(self.context.recipe)
        tokens = sum(
            len(row)
            for name in models
            for rows in self.tokenized[RUN_MODELS[name].role].values()
            for _, row, _ in rows
        )
        tokens += (len(models) - ("teacher_before" in models)) * sum(len(r.tokens) for r in self.aligned)
        answers = sum(map(len, self.rows.values())) + len(self.aligned)
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
        for role, tokenizer in self.tokenizers.items():
            paragraphs = [
                (str(n), *text_row(tokenizer, paragraph)) for n, paragraph in enumerate(self.text.paragraphs)
            ]
            answers = {split: list(self._answers(split, role, tokenizer)) for split in self.rows}
            out[role] = {**answers, "general": paragraphs}
        return out

    def _rows(self) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """The rows whose answers are measured, evenly spread over those that the models were trained and
        validated on, and the number of those that are too long for a model.
        """
        recipe, left_out = self.context.recipe, 0
        limits = {"teacher": recipe.teach.max_length, "student": recipe.distill.max_length}
        out: dict[str, list[dict[str, Any]]] = {}
        for split in ("train", "valid"):
            count = count_rows(self.context, split)
            if split == "train" and self.pair:
                count = min(count, recipe.distill.max_rows or count, recipe.targets.max_rows or count)
            chosen = set(spread(count, recipe.evaluate.audit_rows))
            rows = [row for n, row in enumerate(islice(read_rows(self.context, split), count)) if n in chosen]
            fits = [True] * len(rows)
            for role in self.tokenizers:
                lengths = map(len, self._rendered(rows, role))
                fits = [fit and length <= limits[role] for fit, length in zip(fits, lengths, strict=True)]
            out[split] = [row for row, fit in zip(rows, fits, strict=True) if fit]
            left_out += len(rows) - len(out[split])
        return out, left_out

    def _rendered(self, rows: Sequence[Mapping[str, Any]], role: str) -> list[TokenizedRow]:
        """Rows in the tokens of the models of a role. Of chats of any kind the turns that are trained."""
        from mlx_distill.data.chat import render_many

        loss_on = self.context.recipe.teach.loss_on if self.context.task.is_chats else "last"
        chats = [self._chat(row, role) for row in rows]
        return render_many(self.tokenizers[role], chats, loss_on=loss_on) if chats else []

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
            if name == "teacher" and self.needs_teacher:
                self._live = _head_of(model, tokenizer)
            del model
            gc.collect()
            mx.clear_cache()
        return dict(read_json(path))

    def _teacher(self, needed: bool) -> LiveTeacher | None:
        """The teacher's head, read again where an earlier run has measured the teacher."""
        if needed and self.needs_teacher and self._live is None:
            self._live = _head_of(*load_model(self.context, "teacher"))
        return self._live

    def _measure(self, name: str, model: Any, tokenizer: Any, teacher: LiveTeacher | None) -> dict[str, Any]:
        role = RUN_MODELS[name].role
        measured = self.tokenized[role]
        aligned = self.aligned if role == "student" or name == "teacher" else ()
        total = sum(map(len, measured.values())) + len(aligned)
        out: dict[str, Any] = {"losses": [], "parts": {}, "compared": []}
        with self.context.progress.task(f"audit {name.replace('_', ' ')}", total=total, unit="row") as bar:
            for split, rows in measured.items():
                done = len(out["losses"])
                out["losses"] += self._losses(name, split, model, tokenizer, rows, bar, done)
            if name == "teacher" and self.needs_teacher:
                self._write_hidden(model, tokenizer)
            if role == "student" and self.pair is not None:
                out |= self._parts(self.pair, name, model, tokenizer, teacher)
            bar.update(total)
        return out

    def _answers(self, split: str, role: str, tokenizer: Any) -> Iterator[Measured]:
        from mlx_distill.distill.audit import trained_bytes

        rows = self.rows[split]
        for row, chat in zip(rows, self._rendered(rows, role), strict=True):
            is_chat = self.context.task.is_chats
            text = row["messages"][-1]["content"]
            yield row["id"], chat, trained_bytes(tokenizer, chat) if is_chat else len(text.encode())

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
        batches = list(_batches(self.aligned, self.batch_size))
        hidden = {}
        for number, batch in enumerate(batches):
            stop()
            hidden[f"{number:06d}"] = teacher.hidden(batch)
        with atomic_path(scratch(self.folder) / _HIDDEN) as path:
            mx.save_safetensors(str(path), hidden)

    def _parts(
        self, pair: AuditedPair, name: str, model: Any, tokenizer: Any, teacher: LiveTeacher | None
    ) -> dict[str, Any]:
        import mlx.core as mx

        from mlx_distill.distill.audit import Parts, add_parts

        if not pair.aligned:
            return {"parts": {}, "compared": []}
        audit = pair.student_audit(tokenizer, teacher)
        path = scratch(self.folder) / _HIDDEN
        hidden: dict[str, mx.array] = {}
        if teacher is not None:
            hidden = dict(mx.load(str(path)))
        sums: Parts = {}
        compared: list[dict[str, Any]] = []
        batches = (_batches(rows, self.batch_size) for rows in (pair.aligned, pair.compared_rows))
        for number, (batch, same) in enumerate(zip(*batches, strict=True)):
            check_stop(self.context)
            parts, lines = audit.measure(model, batch, hidden.get(f"{number:06d}"), same)
            add_parts(sums, parts)
            compared += [{"model": name, **line} for line in lines]
        return {"parts": sums, "compared": compared}


def _teacher_tokenizer(context: Context) -> Any:
    from mlx_distill.models.load import load_tokenizer

    tokenizer = load_tokenizer(context.run / "teacher")
    set_thinking(tokenizer, context.recipe.teacher_thinking)
    return tokenizer


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
