"""Chat templates in the structure of public model families, written for the tests: what they do with contents
(take thinking out, trim, move, refuse) is what those families' templates do, the words are not theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """The tokens that a template writes; ``rstrip`` tokens strip the white space behind them; with ``joined``
    other text than a token stands before the answer and merges with it.
    """

    special: tuple[str, ...]
    eos: str
    ordinary: tuple[str, ...] = ()
    rstrip: bool = False
    joined: bool = False


def template(name: str) -> str:
    """The template of a family."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


_CHATML = ("<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
_CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

FAMILIES = {
    "qwen3": Family(_CHATML, "<|im_end|>", (*_THINK, *_CALLS)),
    "qwen3.5": Family(_CHATML, "<|im_end|>", (*_THINK, *_CALLS)),
    "deepseek": Family(
        (
            *("<｜User｜>", "<｜Assistant｜>", "<｜call｜>"),
            *("<｜outputs｜>", "<｜output｜>", "<｜end of outputs｜>"),
        ),
        "<｜end of sentence｜>",
        _THINK,
    ),
    "glm": Family(
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|endoftext|>",
        (*_THINK, *_CALLS),
    ),
    "nemotron": Family((*_CHATML, *_THINK), "<|im_end|>", _CALLS),
    "lfm2": Family(_CHATML, "<|im_end|>"),
    "llama3": Family(("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    "mistral": Family(
        (
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "</s>",
        joined=True,
    ),
    "gemma": Family(("<start_of_turn>", "<end_of_turn>"), "<eos>"),
    "harmony": Family(
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        "<|return|>",
    ),
    "phi3": Family(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", rstrip=True),
    "zephyr": Family((), "</s>"),
    "plain": Family((), "</s>", joined=True),
}
