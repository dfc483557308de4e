"""The pair of teacher and student that an audit measures, and the sampled targets in the student's tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import DataError
from mlx_distill.recipe import DistillConfig
from mlx_distill.stages.context import Context, count_rows, read_rows
from mlx_distill.stages.pair import open_pair
from mlx_distill.thinking import set_thinking

if TYPE_CHECKING:
    from mlx_distill.distill.align import AlignedRow
    from mlx_distill.distill.audit import StudentAudit
    from mlx_distill.distill.live_teacher import LiveTeacher


class AuditedPair:
    """Teacher and student of a run, and the sampled targets.

    Args:
        context: Of the run, whose targets and student's base are finished.

    Attributes:
        tokenizers: By role, ``teacher`` and ``student``.
        loss: The token-level loss that the student was trained with; None for none.
        compared: The one that is computed from the cache and from the teacher; None for none.
        coefficients: Of the terms of the student's loss.
        aligned: The sampled targets as rows of the student; ``left_out``: how many could not be aligned;
            ``split``: the set that they are of.
        compared_rows: The same with the distributions that are compared, at ``compared_temperature``: that of
            the training where it compares distributions over the same tokens, else 1.
        needs_teacher: Whether a student is measured beside the teacher's distributions.
    """

    def __init__(self, context: Context) -> None:
        from mlx_distill.distill.audit import LOWER_BOUNDS
        from mlx_distill.distill.objective import term_coefficients
        from mlx_distill.distill.token_losses import TOKEN_LOSSES
        from mlx_distill.models.forward import embedding_rows
        from mlx_distill.models.load import empty_model, load_tokenizer

        self.context = context
        settings = context.recipe.distill
        if context.task.label is None and settings.label_weight:
            settings = replace(settings, label_weight=0.0)
        self.settings: DistillConfig = settings
        base = context.run / "student_base"
        tokenizer = load_tokenizer(base)
        set_thinking(tokenizer, context.recipe.student_thinking)
        self.pair = pair = open_pair(context, settings, tokenizer, embedding_rows(empty_model(base)))
        self.tokenizers = {"teacher": pair.teacher, "student": tokenizer}
        self.reader, self.labels, self.loss = pair.reader, pair.labels, pair.loss
        self.same_tokenizer = pair.same_tokenizer
        is_live = settings.teacher == "live"
        distributions = self.loss is not None and TOKEN_LOSSES[self.loss].events == "start_index"
        self.reads_cache = distributions and not is_live
        self.compared = None
        if not self.reader.layout.sampled:
            plain = "kl" if self.same_tokenizer else "token_groups"
            self.compared = self.loss if self.loss in LOWER_BOUNDS else plain
        self.temperature = pair.temperature
        self.coefficients = term_coefficients(settings, self.same_tokenizer)
        has_valid = count_rows(context, "valid") > 0
        self.split = "valid" if has_valid else "train"
        self.aligned, self.left_out = self._aligned(self.temperature)
        is_own = self.loss is not None and self.compared == self.loss
        softens = is_own and TOKEN_LOSSES[str(self.loss)].over_tokens
        self.compared_temperature = self.temperature if softens else 1.0
        self.compared_rows = self.aligned
        if self.compared_temperature != self.temperature:
            self.compared_rows, _ = self._aligned(self.compared_temperature)
        needed = self.compared is not None or (is_live and distributions)
        self.needs_teacher = needed and bool(self.aligned)

    @property
    def facts(self) -> dict[str, Any]:
        """Which targets and which losses are measured."""
        return {
            "targets": {"rows": len(self.aligned), "set": self.split, "left_out": self.left_out},
            "token_loss": self.loss,
            "compared": self.compared,
            "sampled": self.reader.layout.sampled,
            "live": self.settings.teacher == "live",
            "reads_cache": self.reads_cache,
            "top_k": self.reader.layout.top_k,
            "temperature": self.compared_temperature,
        }

    @cached_property
    def groups(self) -> Any:
        """The token groups, where a loss needs them."""
        from mlx_distill.distill.token_losses import TOKEN_LOSSES

        needed = [TOKEN_LOSSES[name].needs for name in (self.loss, self.compared) if name]
        if "token_groups" not in needed:
            return None
        return self.pair.groups

    def _aligned(self, temperature: float) -> tuple[list[AlignedRow], int]:
        """The sampled targets as rows of the student, with their distributions at a temperature, and the
        number of those that are left out.
        """
        from mlx_distill.data.chat import render_many
        from mlx_distill.distill.align import with_answer

        sampled = self._targets()
        align = self.pair.aligner(temperature=temperature, with_chat=True)
        chats = [with_answer(row, targets) for row, targets in sampled]
        rows = []
        rendered = render_many(self.tokenizers["student"], chats) if chats else []
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
