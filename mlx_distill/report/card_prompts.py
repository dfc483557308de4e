"""What a model card says of prompts: tools that have the chat template alone make others than those that the
model was trained on, where the template's defaults are others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError
from mlx_distill.text import counted

_MESSAGE = "xMESSAGEx"


def prompt_section(folder: Path) -> list[str]:
    """The lines of the section on the prompts of a model or an adapter; none where its tokenizer has no chat
    template, or where the template alone makes the prompts of a model that does not mark thinking.
    """
    from mlx_distill.models.load import load_tokenizer

    try:
        lines = prompt_lines(load_tokenizer(folder))
    except DistillError:
        return []
    return ["", "## Prompts", "", *lines] if lines else []


def prompt_lines(tokenizer: Any) -> list[str]:
    """Whether the model thinks, and how its prompts end, with the call of transformers that makes them.

    Args:
        tokenizer: As :func:`~mlx_distill.models.load.load_tokenizer` reads it.

    Raises:
        DistillError: it has no chat template.
    """
    from mlx_distill.data.chat import prompt_ids
    from mlx_distill.infer.channels import channels_of
    from mlx_distill.records import Message
    from mlx_distill.thinking import thinking_budget

    thinks = thinking_budget(tokenizer)
    prompt = tokenizer.decode(prompt_ids(tokenizer, [Message("user", _MESSAGE)]))
    _, found, end = prompt.partition(_MESSAGE)
    if not found:  # a tokenizer that does not write its text back
        return []
    options = {"reasoning_effort": "low"} if "reasoning_effort" in str(tokenizer.chat_template) else {}
    calls: list[dict[str, Any]] = [options, {**options, "enable_thinking": thinks > 0}]
    ends = [_generation_prompt(tokenizer, call) for call in calls]
    marks = channels_of(tokenizer) is not None
    if not marks and not options and ends[0] == end:
        return []
    best = max(range(len(calls)), key=lambda i: (ends[i] == end, end.startswith(ends[i]), -i))
    call = _call(calls[best])
    if ends[best] == end:
        how = f"{call} makes them so"
    elif end.startswith(ends[best]):
        how = f"behind what {call} makes, add {_code(end[len(ends[best]) :])}"
    else:
        how = f"{call} makes others"
    first = "It answers at once, without thinking. " if marks else ""
    if thinks:
        first = f"It thinks before it answers, in at most {counted(thinks, 'token')}. "
    return [f"{first}Behind the last message its prompts end with {_code(end)}: {how}."]


def _generation_prompt(tokenizer: Any, options: dict[str, Any]) -> str:
    """What the chat template by itself writes behind a message; where it fails, what ends no prompt."""
    turns = [{"role": "user", "content": _MESSAGE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except Exception:  # a template is a program from elsewhere and may raise anything
        return _MESSAGE
    return str(text).partition(_MESSAGE)[2]


def _call(options: dict[str, Any]) -> str:
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"`apply_chat_template(messages, add_generation_prompt=True{given})`"


def _code(text: str) -> str:
    escaped = text.replace("\n", "\\n")
    return f"`{escaped}`"
