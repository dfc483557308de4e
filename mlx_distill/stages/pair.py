"""The teacher and the student of a run, as what is made of both reads them: the targets, the two tokenizers,
and how the teacher's answers become rows of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ConfigError
from mlx_distill.recipe import DistillConfig
from mlx_distill.stages.context import Context, as_teacher, vocabulary_hash
from mlx_distill.stages.targets import check_tail, fingerprints
from mlx_distill.stages.thinking import without_marks
from mlx_distill.thinking import thinking_budget

if TYPE_CHECKING:
    from mlx_distill.distill.align import AlignedRow
    from mlx_distill.distill.teacher_cache import TargetReader
    from mlx_distill.losses.cross_tokenizer import TokenGroups
    from mlx_distill.losses.labels import LabelTrie
    from mlx_distill.losses.mid_token import MidTokens


@dataclass(frozen=True)
class Pair:
    """Teacher and student of a run with finished targets; :func:`open_pair` makes one.

    Attributes:
        context: Of the run.
        settings: ``label_weight`` and which token-level loss.
        student: The student's tokenizer.
        teacher: The teacher's.
        columns: Rows of the student's embedding; 0 for any number.
        reader: Of the targets.
        teacher_hash: Of the teacher's vocabulary.
        same_tokenizer: Whether the two vocabularies are equal.
        labels: The task's labels in the student's tokens; None without a label term.
        loss: The token-level loss, with ``auto`` resolved; None for none.
    """

    context: Context
    settings: DistillConfig
    student: Any
    teacher: Any
    columns: int
    reader: TargetReader
    teacher_hash: str
    same_tokenizer: bool
    labels: LabelTrie | None
    loss: str | None

    @property
    def is_live(self) -> bool:
        """Whether the loss reads the teacher's whole distributions."""
        return self.loss is not None and self.settings.teacher == "live"

    @cached_property
    def temperature(self) -> float:
        """The temperature of the cached distributions that the loss reads, which have to hold them."""
        from mlx_distill.distill.token_losses import TOKEN_LOSSES

        over_tokens = self.loss is not None and TOKEN_LOSSES[self.loss].over_tokens
        if self.is_live or not over_tokens or self.settings.temperature == 1:
            return 1.0
        check_tail(self.reader.index, self.reader.layout.top_k)
        return self.settings.temperature

    @cached_property
    def groups(self) -> TokenGroups:
        """The token groups, with the two stop tokens in one; where the student learns to think, what marks
        thinking is in none.

        Raises:
            ModelError: a stop token that the student's embedding has no row for.
        """
        from mlx_distill.data.chat import stop_ids
        from mlx_distill.losses.cross_tokenizer import build_token_groups
        from mlx_distill.models.token_ids import check_token_ids

        stop = stop_ids(self.student)[0]
        check_token_ids([stop], self.columns, self.student)
        groups = build_token_groups(
            self.student,
            self.teacher,
            student_stop=stop,
            teacher_stop=stop_ids(self.teacher)[0],
            student_columns=self.columns,
        )
        thinks = thinking_budget(self.student) > 0
        return without_marks(groups, self.student, self.teacher) if thinks else groups

    @cached_property
    def mid_tokens(self) -> MidTokens | None:
        """What makes the targets of token groups by context, and those in the middle of tokens if they are
        asked for; None for another loss, and for samples of distributions, which tell too little of the text
        behind.

        Raises:
            ConfigError: there are to be some in the middle of tokens, and the loss of the two models has
                none.
        """
        from mlx_distill.losses.mid_token import MidTokens

        in_middle = self.settings.mid_token_rows
        if in_middle and self.loss not in (None, "token_groups"):
            raise ConfigError(
                f"distill.mid_token_rows: true, and the token-level loss of these two models is {self.loss}",
                fix="set distill.mid_token_rows: false, or distill.token_loss: token_groups",
            )
        if self.loss != "token_groups" or self.context.recipe.targets.draws:
            return None
        return MidTokens(self.student, self.teacher, self.groups, in_middle=in_middle)

    def aligner(self, *, temperature: float, with_chat: bool) -> Callable[..., AlignedRow]:
        """What makes a row of the student from a target.

        Args:
            temperature: At which its distributions are read.
            with_chat: Whether the row has the chat as a live teacher reads it.
        """
        from mlx_distill.distill.align import aligner
        from mlx_distill.distill.live_teacher import with_teacher_tokens

        chat = partial(with_teacher_tokens, tokenizer=self.teacher, system=as_teacher(self.context).system)
        return aligner(
            self.context.task,
            self.student,
            self.teacher,
            self.labels,
            same_tokenizer=self.same_tokenizer,
            columns=self.columns,
            temperature=temperature,
            mid_tokens=self.mid_tokens,
            **({"finish": chat} if with_chat else {}),
        )


def open_pair(context: Context, settings: DistillConfig, student: Any, columns: int = 0) -> Pair:
    """The pair of a run.

    Args:
        context: Of the run, whose targets are finished.
        settings: ``label_weight`` and which token-level loss.
        student: The student's tokenizer.
        columns: Rows of the student's embedding; 0 for any number.

    Raises:
        DataError: the targets are of another teacher, or of other rows.
        ModelError: a label that the student's tokenizer cannot write, where ``label_weight`` is above 0.
    """
    from mlx_distill.distill.teacher_cache import TargetReader
    from mlx_distill.distill.token_losses import token_loss_name
    from mlx_distill.infer.label_scoring import find_label_trie
    from mlx_distill.models.load import load_tokenizer

    reader = TargetReader(context.run / "targets")
    teacher = load_tokenizer(context.run / "teacher")
    reader.check(fingerprints(context, teacher))
    teacher_hash = vocabulary_hash(teacher)
    same_tokenizer = vocabulary_hash(student) == teacher_hash
    return Pair(
        context,
        settings,
        student,
        teacher,
        columns,
        reader,
        teacher_hash,
        same_tokenizer,
        find_label_trie(student, context.task, settings.label_weight),
        token_loss_name(settings, same_tokenizer),
    )
