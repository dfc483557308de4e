"""A chat in the tokens of one model, by that model's own template.

The template is rendered once for each sequence of roles, with a marker in place of every content. The text
between the markers is the template's: its special tokens become token ids. The contents are put in afterwards
as plain text, so nothing that a row says can become a special token, and what stands before the assistant's
content is the same in training and at inference.

    <|im_start|>user\\n  [content]  <|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n  [answer]
    <|im_end|> ------------------------------- prompt -----------------------------------------------------
    ---------- trained -
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from mlx_distill.errors import DataError, ModelError
from mlx_distill.records import Message

# Templates ignore what they do not know.
_SETTINGS: dict[str, Any] = {"enable_thinking": False, "reasoning_effort": "low"}

# Templates that print the date must print the same one every day, or no two runs agree. transformers lets no
# function into a template, so a macro of the same name takes the place of its clock.
_DATE = {
    "%Y": "2025",
    "%y": "25",
    "%m": "01",
    "%d": "01",
    "%B": "January",
    "%b": "Jan",
    "%A": "Wednesday",
    "%a": "Wed",
    "%j": "001",
}
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
        added = {
            token.content: (int(number), token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        self.ids = {content: number for content, (number, _) in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        # A token that swallows white space beside it does so here too.
        patterns = [
            (r"\s*" if added[c][1].lstrip else "")
            + f"({re.escape(c)})"
            + (r"\s*" if added[c][1].rstrip else "")
            for c in longest_first
        ]
        self.special = re.compile("|".join(patterns) or r"(?!)")
        # Runs of spaces are text, even where a tokenizer adds them as tokens; everything else added speaks to
        # the model.
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
        return [
            token
            for piece in self.cut(text)
            for token in encode(piece, add_special_tokens=False, verbose=False)
        ]

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
        return dict(
            zip(pieces, inner(pieces, add_special_tokens=False, verbose=False)["input_ids"], strict=True)
        )

    def parts(self, turns: Turns) -> Iterator[int | str]:
        """The special tokens and the texts between them, each to be encoded by itself; an assistant's content
        is an ``Answer``.
        """
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
            raise ModelError(
                f"the chat template {what}", fix="give the tokenizer a template that shows each turn as it is"
            )
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
            raise ModelError(
                "the tokenizer has no chat template", fix="add chat_template.jinja to the model's folder"
            )
        settings = dict(_SETTINGS)
        if "strftime_now" in str(template):
            settings["chat_template"] = _PIN + self.tokenizer.get_chat_template()
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=False, **settings
                )
            )
        except Exception as error:  # a template is somebody else's program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the chat template refuses the turns {', '.join(roles)}: {reason}",
                fix="change the rows' turns, or use another template",
            ) from error

    def _end_of_text(self) -> _Part:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "neither the chat template nor the tokenizer ends an answer",
                fix="set eos_token in tokenizer_config.json",
            )
        return _Part(special=int(self.tokenizer.eos_token_id))


_vocabularies: weakref.WeakKeyDictionary[Any, tuple[object, Vocabulary]] = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer with its template, kept as long as the tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    known = _vocabularies.get(tokenizer)
    if known is None or known[0] != template:
        known = _vocabularies[tokenizer] = (template, Vocabulary(tokenizer))
    return known[1]


Chat = Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One chat in tokens. It ends with the token that ends the last assistant turn.

    ``tokens [n]``; ``mask [n]``, true on what is trained: the content of assistant turns and the token that
    ends them;
    ``spans``: tokens from and to of each assistant turn's content; ``trained``: which of the spans are
    learned; ``id``: the row's.
    """

    tokens: Int32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n"]
    spans: tuple[tuple[int, int], ...]
    trained: tuple[int, ...]
    id: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> Int32[np.ndarray, " p"]:
        """The tokens before the last answer: what the model is given."""
        return self.tokens[: self.spans[-1][0]]

    @property
    def answer(self) -> Int32[np.ndarray, " a"]:
        """The tokens of the last answer's content, without the one that ends it."""
        start, end = self.spans[-1]
        return self.tokens[start:end]

    @property
    def stop(self) -> int:
        """The token that ends the last answer."""
        return int(self.tokens[-1])


def render(tokenizer: Any, messages: Chat, *, loss_on: str = "last", id: str = "") -> Encoded:
    """The chat in tokens, with a mask over what is trained.

    Args:
        tokenizer: A transformers tokenizer or mlx-lm's wrapper of one, with a chat template.
        messages: Turns whose last one is the assistant's.
        loss_on: ``last`` trains on the last assistant turn, ``all`` on each.
        id: Kept in the result.

    Raises:
        DataError: the last turn is not the assistant's, or the template refuses the sequence of roles.
        ModelError: no chat template, or one that drops a turn.
    """
    vocabulary = vocabulary_of(tokenizer)
    return _render(vocabulary, _turns(messages, loss_on), vocabulary.encode, loss_on, id)


def render_many(
    tokenizer: Any, chats: Sequence[Chat], *, loss_on: str = "last", ids: Sequence[str] = ()
) -> list[Encoded]:
    """:func:`render` of each chat; the tokenizer is called once, and for a text that stands in several of
    them once.

    Args:
        tokenizer: As in :func:`render`.
        chats: As many as their tokens may stand in memory.
        loss_on: As in :func:`render`.
        ids: Of the chats, or none.

    Raises:
        DataError, ModelError: as :func:`render`.
    """
    vocabulary = vocabulary_of(tokenizer)
    rows = [_turns(messages, loss_on) for messages in chats]
    texts = (part for turns in rows for part in vocabulary.parts(turns) if isinstance(part, str))
    known = vocabulary.encode_many(dict.fromkeys(piece for text in texts for piece in vocabulary.cut(text)))

    def encode(text: str) -> list[int]:
        return [token for piece in vocabulary.cut(text) for token in known[piece]]

    return [
        _render(vocabulary, turns, encode, loss_on, id)
        for turns, id in zip(rows, ids or [""] * len(rows), strict=True)
    ]


def _turns(messages: Chat, loss_on: str) -> list[tuple[str, str]]:
    turns = [(str(_get(m, "role")), str(_get(m, "content"))) for m in messages]
    if not turns or turns[-1][0] != "assistant":
        raise DataError(
            "the last turn is not the assistant's", fix="end the chat with the assistant's answer"
        )
    if loss_on not in ("last", "all"):
        raise DataError(f"loss_on: {loss_on!r} is not one of last, all", fix="choose one of them")
    return turns


def _render(
    vocabulary: Vocabulary, turns: Turns, encode: Callable[[str], list[int]], loss_on: str, id: str
) -> Encoded:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    ends: list[int] = []
    closing = False  # between an answer and the token that ends it
    for part in vocabulary.parts(turns):
        start = len(ids)
        if isinstance(part, int):
            ids.append(part)
            if closing:
                ends.append(len(ids))
                closing = False
        else:
            ids += encode(part)
            if isinstance(part, Answer):
                spans.append((start, len(ids)))
                closing = True
    return _encoded(ids[: ends[-1]], spans, ends, loss_on, id)


def _encoded(ids: list[int], spans: list[tuple[int, int]], ends: list[int], loss_on: str, id: str) -> Encoded:
    trained = tuple(range(len(spans))) if loss_on == "all" else (len(spans) - 1,)
    mask = np.zeros(len(ids), dtype=bool)
    for turn in trained:
        mask[spans[turn][0] : ends[turn]] = True
    return Encoded(np.array(ids, dtype=np.int32), mask, tuple(spans), trained, id)


def prompt_ids(tokenizer: Any, messages: Chat) -> list[int]:
    """The tokens after which the model writes its answer: the same ones that :func:`render` puts before it.

    Args:
        tokenizer: As in :func:`render`.
        messages: The turns so far, without the answer. Where the last one is the assistant's it is taken for
            the answer and left out.
    """
    turns = list(messages)
    if turns and _get(turns[-1], "role") == "assistant":
        turns.pop()
    return [int(token) for token in render(tokenizer, [*turns, Message("assistant", "")]).prompt]


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an assistant's content, encoded as :func:`render` does: without special tokens, whatever
    it says.
    """
    return vocabulary_of(tokenizer).encode(text)


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the one of a last turn first, then the one of an earlier turn, then the
    tokenizer's own.
    """
    user, assistant = Message("user", "a"), Message("assistant", "")
    last = render(tokenizer, [user, assistant])
    found = [last.stop]
    try:
        earlier = render(tokenizer, [user, assistant, user, assistant], loss_on="all")
        found.append(int(earlier.tokens[np.flatnonzero(earlier.mask)[0]]))
    except DataError:  # a template for one turn alone
        pass
    own = getattr(tokenizer, "eos_token_ids", None)  # a set in mlx-lm's wrapper
    own = own if isinstance(own, (set, frozenset, list, tuple)) else [tokenizer.eos_token_id]
    found += sorted(int(token) for token in own if token is not None)
    return tuple(dict.fromkeys(found))


def pad_id(tokenizer: Any) -> int:
    """A token to fill rows with: the tokenizer's padding token, else its end of text, else 0. Pads are never
    trained.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _get(message: Message | Mapping[str, Any], name: str) -> Any:
    return message[name] if isinstance(message, Mapping) else getattr(message, name)
