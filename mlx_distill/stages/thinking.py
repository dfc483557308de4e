"""Thinking in a run: whether both models can be taught it, and what marks it in their vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ModelError
from mlx_distill.records import Message

if TYPE_CHECKING:
    from mlx_distill.losses.cross_tokenizer import TokenGroups
    from mlx_distill.recipe import Recipe


def check_thinking(recipe: Recipe, tokenizers: Mapping[str, Any]) -> None:
    """Refuse thinking that a model has no marks for.

    Args:
        recipe: With ``targets.thinking``.
        tokenizers: Those of ``teacher`` and ``student`` that are on this machine, with their chat templates.

    Raises:
        ModelError: a tokenizer without marks of thinking; or, of ``keep``, two that mark it differently.
        DataError: a chat template that does not write thinking.
    """
    from mlx_distill.data.chat import prompt_ids
    from mlx_distill.infer.channels import channels_of

    mode, marks = recipe.targets.thinking, {}
    thinking = {"teacher": recipe.teacher_thinking, "student": recipe.student_thinking}
    for name, tokenizer in tokenizers.items():
        if not thinking[name]:
            continue
        channels = channels_of(tokenizer)
        if channels is None:
            other = " or drop" if name == "student" else ""
            raise ModelError(
                f"targets.thinking: {mode}, and the {name}'s tokenizer has nothing that marks thinking",
                fix=f"set targets.thinking: none{other}, or use a model that thinks",
            )
        prompt_ids(tokenizer, [Message("user", "a")], thinking=True)
        marks[name] = tokenizer.convert_ids_to_tokens(channels.closes)
    if mode == "keep" and len(set(marks.values())) > 1:
        raise ModelError(
            "targets.thinking: keep, and the models end their thinking differently: the teacher with "
            f"{marks['teacher']}, the student with {marks['student']}",
            fix="set targets.thinking: map",
        )


def without_marks(groups: TokenGroups, student_tokenizer: Any, teacher_tokenizer: Any) -> TokenGroups:
    """Token groups in which what marks thinking has no counterpart: a mark such as ``</think>`` may be an
    ordinary token of its vocabulary, whose bytes the other model would be taught to write.
    """
    from mlx_distill.infer.channels import channels_of

    out = {}
    for name, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
        column, channels = getattr(groups, name).copy(), channels_of(tokenizer)
        if channels is not None:
            ids = [token for token in (*channels.opens, channels.closes) if token < len(column)]
            column[ids] = groups.outside
        out[name] = column
    return replace(groups, **out)
