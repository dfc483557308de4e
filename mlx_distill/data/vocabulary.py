"""What rendering needs of one tokenizer: its special tokens, and its chat template taken apart once for each sequence of roles."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.errors import DataError, ModelError

# Templates ignore what they do not know.
_SETTINGS: dict[str, Any] = {"enable_thinking": False, "reasoning_effort": "low"}

# Templates that print the date must print the same one every day, or no two runs agree. transformers lets no function into a
# template, so a macro of the same name takes the place of its clock.
_DATE = {"%Y": "2025", "%y": "25", "%m": "01", "%d": "01", "%B": "January", "%b": "Jan", "%A": "Wednesday", "%a": "Wed", "%j": "001"}
_TIME = {"%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"}
_PIN = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f".replace('{code}', '{value}')" for code, value in {**_DATE, **_TIME}.items())
    + " -}}{%- endmacro -%}"
)

Turns = Sequence[tuple[str, str]]  # role and content


class Answer(str):
    """An assistant's content among the texts of a chat."""


@dataclass(frozen=True)
class _Part:
    """A special token of the template, or the place of a turn's content."""

    special: int | None = None
    turn: int = -1


class Vocabulary:
    """What rendering needs of one tokenizer: its added tokens, and its template's skeletons."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = weakref.proxy(tokenizer)
        added = {token.content: (int(number), token) for number, token in tokenizer.added_tokens_decoder.items()}
        self.ids = {content: number for content, (number, _) in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        # A token that swallows white space beside it does so here too.
        patterns = [
            (r"\s*" if added[c][1].lstrip else "") + f"({re.escape(c)})" + (r"\s*" if added[c][1].rstrip else "") for c in longest_first
        ]
        self.special = re.compile("|".join(patterns) or r"(?!)")
        # Runs of spaces are text, even where a tokenizer adds them as tokens; everything else added speaks to the model.
        controls = [c for c in longest_first if len(c) > 1 and not c.isspace()]
        self.control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self.skeletons: dict[tuple[str, ...], tuple[str | _Part, ...]] = {}

    def cut(self, text: str) -> Iterator[str]:
        """The pieces of a text that are encoded by themselves.

        The spelling of a special token is cut behind its first character, and so stays text.
        """
        while match := self.control.search(text):
            end = match.start() + 1
            yield text[:end]
            text = text[end:]
        if text:
            yield text

    def encode(self, text: str) -> list[int]:
        """Plain text to tokens."""
        encode = self.tokenizer.encode
        return [token for piece in self.cut(text) for token in encode(piece, add_special_tokens=False, verbose=False)]

    def encode_many(self, pieces: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of pieces of :meth:`cut`, all in one call of the tokenizer where that is the same."""
        from transformers import PreTrainedTokenizerBase

        pieces = list(pieces)
        inner: Any = self.tokenizer
        if not isinstance(inner, PreTrainedTokenizerBase):
            inner = getattr(inner, "_tokenizer", None)  # mlx-lm's wrapper cannot be called
        # Some tokenizers of mlx-lm change the text in an ``encode`` of their own, and there alone.
        if not pieces or getattr(inner.__class__, "encode", None) is not PreTrainedTokenizerBase.encode:
            return {piece: self.encode(piece) for piece in pieces}
        return dict(zip(pieces, inner(pieces, add_special_tokens=False, verbose=False)["input_ids"], strict=True))

    def parts(self, turns: Turns) -> Iterator[int | str]:
        """The special tokens and the texts between them, each to be encoded by itself; an assistant's content is an ``Answer``."""
        text = ""
        for part in self.skeleton(tuple(role for role, _ in turns)):
            if isinstance(part, str):
                text += part
            elif part.special is None and turns[part.turn][0] != "assistant":
                text += turns[part.turn][1]
            else:
                if text:
                    yield text
                yield part.special if part.special is not None else Answer(turns[part.turn][1])
                text = ""

    def skeleton(self, roles: tuple[str, ...]) -> tuple[str | _Part, ...]:
        """The template's text, special tokens and places for contents, for one sequence of roles."""
        if roles not in self.skeletons:
            self.skeletons[roles] = tuple(self._skeleton(roles))
        return self.skeletons[roles]

    def _skeleton(self, roles: tuple[str, ...]) -> Iterator[str | _Part]:
        marks = [f"xMARKx{turn}x" for turn in range(len(roles))]
        pieces = re.split(r"xMARKx(\d+)x", self._apply(roles, marks))
        order = [int(piece) for piece in pieces[1::2]]
        if order != list(range(len(roles))):
            lost = [roles[turn] for turn in range(len(roles)) if order.count(turn) != 1]
            what = f"does not show the {lost[0]} turn once" if lost else "changes the order of the turns"
            raise ModelError(f"the chat template {what}", fix="give the tokenizer a template that shows each turn as it is")
        for turn, piece in enumerate(pieces[::2]):
            if turn:
                yield _Part(turn=turn - 1)
            position = 0
            for match in self.special.finditer(piece):
                if match.start() > position:
                    yield piece[position : match.start()]
                content = next(group for group in match.groups() if group is not None)
                yield _Part(special=self.ids[content])
                position = match.end()
            if position < len(piece):
                yield piece[position:]
        if not self.special.search(pieces[-1]):
            yield self._end_of_text()

    def _apply(self, roles: tuple[str, ...], marks: Sequence[str]) -> str:
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        template = getattr(self.tokenizer, "chat_template", None)
        if not template and not getattr(self.tokenizer, "has_chat_template", False):
            raise ModelError("the tokenizer has no chat template", fix="add chat_template.jinja to the model's folder")
        settings = dict(_SETTINGS)
        if "strftime_now" in str(template):
            settings["chat_template"] = _PIN + self.tokenizer.get_chat_template()
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **settings))
        except Exception as error:  # a template is somebody else's program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the chat template refuses the turns {', '.join(roles)}: {reason}", fix="change the rows' turns, or use another template"
            ) from error

    def _end_of_text(self) -> _Part:
        if self.tokenizer.eos_token_id is None:
            raise ModelError("neither the chat template nor the tokenizer ends an answer", fix="set eos_token in tokenizer_config.json")
        return _Part(special=int(self.tokenizer.eos_token_id))


_vocabularies: weakref.WeakKeyDictionary[Any, tuple[object, Vocabulary]] = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer with its template, kept as long as the tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    known = _vocabularies.get(tokenizer)
    if known is None or known[0] != template:
        known = _vocabularies[tokenizer] = (template, Vocabulary(tokenizer))
    return known[1]
