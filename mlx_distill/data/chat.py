"""A chat in the tokens of one model, by that model's own chat template.

The template is rendered once for each sequence of roles, with a marker in place of every content. The text
between the markers comes from the template: its special tokens become token ids. The contents are inserted
afterwards as plain text, so nothing that a row says can become a special token, and what precedes the
assistant's content is the same in training and at inference::

    <|im_start|>user\\n [content] <|im_end|>\\n<|im_start|>assistant\\n [answer] <|im_end|>
    ----------------------------- prompt ----------------------------- ------ trained -----
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mlx_distill.errors import DataError, ModelError
from mlx_distill.records import Example, Message

# Variables of chat templates; a template ignores those that it does not use.
_SETTINGS: dict[str, Any] = {"enable_thinking": False, "reasoning_effort": "low"}

# Templates that print the date must print the same one every day, or no two runs agree. transformers passes
# no function into a template, so a macro of the same name shadows its clock.
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
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f".replace('{code}', '{value}')" for code, value in {**_DATE, **_TIME}.items())
    + " -}}{%- endmacro -%}"
)

_ENCODED_TOGETHER = 256  # rows that encode_rows holds in memory

Chat = Sequence[Message | Mapping[str, Any]]
Turns = Sequence[tuple[str, str]]  # role and content


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    """One row in tokens. A rendered chat ends with the token that ends its last assistant turn.

    ``tokens [n]``; ``trained [n - 1]``: for each token but the first, whether it is a label of the training:
    the content of assistant turns and the token that ends them; ``spans``: (start, end) of the content of
    each assistant turn, empty for a row that was read back from a file; ``id``: the row's.
    """

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " m"]
    spans: tuple[tuple[int, int], ...] = ()
    id: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> Int[np.ndarray, " p"]:
        """The tokens before the last answer: the model's input at inference."""
        return self.tokens[: self.spans[-1][0]]

    @property
    def answer(self) -> Int[np.ndarray, " a"]:
        """The tokens of the last answer's content, without the one that ends it."""
        start, end = self.spans[-1]
        return self.tokens[start:end]

    @property
    def stop(self) -> int:
        """The token that ends the last answer."""
        return int(self.tokens[-1])


def render(tokenizer: Any, messages: Chat, *, loss_on: str = "last", id: str = "") -> TokenizedRow:
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
    encoder = _encoder_of(tokenizer)
    return _render(encoder, _turns(messages, loss_on), encoder.encode, loss_on, id)


def render_many(
    tokenizer: Any, chats: Sequence[Chat], *, loss_on: str = "last", ids: Sequence[str] = ()
) -> list[TokenizedRow]:
    """:func:`render` of each chat, with one call of the tokenizer; a text that occurs in several chats is
    encoded once.

    Args:
        tokenizer: As in :func:`render`.
        chats: As many as fit into memory in tokens.
        loss_on: As in :func:`render`.
        ids: Of the chats, or none.

    Raises:
        DataError, ModelError: as :func:`render`.
    """
    encoder = _encoder_of(tokenizer)
    rows = [_turns(messages, loss_on) for messages in chats]
    texts = (part for turns in rows for part in encoder.parts(turns) if isinstance(part, str))
    pieces = dict.fromkeys(piece for text in texts for piece in encoder.split(text))
    tokens_of = encoder.encode_pieces(pieces)

    def encode(text: str) -> list[int]:
        return [token for piece in encoder.split(text) for token in tokens_of[piece]]

    return [
        _render(encoder, turns, encode, loss_on, id)
        for turns, id in zip(rows, ids or [""] * len(rows), strict=True)
    ]


@dataclass
class EncodeReport:
    """How many rows were kept and left out, counted while they are encoded.

    ``kept``: rows to train on; ``too_long`` and ``nothing_to_train``: rows left out because they have more
    tokens than allowed, or no answer; ``longest``: tokens of the longest row, left out or not.
    """

    kept: int = 0
    too_long: int = 0
    nothing_to_train: int = 0
    longest: int = 0

    @property
    def left_out(self) -> int:
        """Rows that are not trained on."""
        return self.too_long + self.nothing_to_train

    def __str__(self) -> str:
        parts = [f"{self.kept} rows"]
        if self.too_long:
            parts.append(f"{self.too_long} too long and left out (the longest has {self.longest} tokens)")
        if self.nothing_to_train:
            parts.append(f"{self.nothing_to_train} with nothing to train and left out")
        return ", ".join(parts)


def encode_rows(
    rows: Iterable[Example],
    tokenizer: Any,
    max_length: int,
    loss_on: str,
    report: EncodeReport,
    *,
    where: str = "the rows",
) -> Iterator[TokenizedRow]:
    """Render each row with a tokenizer; a row that is too long is left out as a whole, never truncated: a
    truncated answer teaches the model to stop in the middle.

    Args:
        rows: Prepared rows; 256 of them are in memory at a time.
        tokenizer: With a chat template.
        max_length: Most tokens of a row.
        loss_on: ``last`` or ``all`` assistant turns.
        report: Is updated while rows are encoded.
        where: What the rows are, for the error message.

    Raises:
        DataError: at the end, where no row was kept.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, _ENCODED_TOGETHER)):
        chats, ids = [row.messages for row in chunk], [row.id for row in chunk]
        for item in render_many(tokenizer, chats, loss_on=loss_on, ids=ids):
            report.longest = max(report.longest, len(item))
            answers = item.spans if loss_on == "all" else item.spans[-1:]
            if len(item) > max_length:
                report.too_long += 1
            elif all(start == end for start, end in answers):
                report.nothing_to_train += 1
            else:
                report.kept += 1
                yield item
    if not report.kept:
        raise DataError(
            f"{where}: none of {report.left_out} rows has an answer and at most {max_length} tokens "
            f"(the longest: {report.longest})",
            fix=f"raise max_length, to {report.longest} for all of them",
        )


def prompt_ids(tokenizer: Any, messages: Chat) -> list[int]:
    """The tokens after which the model writes its answer: those that :func:`render` puts before it.

    Args:
        tokenizer: As in :func:`render`.
        messages: The turns so far. A last turn of the assistant is the answer, and is left out.
    """
    turns = list(messages)
    if turns and _get(turns[-1], "role") == "assistant":
        turns.pop()
    return [int(token) for token in render(tokenizer, [*turns, Message("assistant", "")]).prompt]


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an assistant's content, encoded as in :func:`render`: never special tokens, whatever the
    text says.
    """
    return _encoder_of(tokenizer).encode(text)


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: first the one of a last turn, then the one of an earlier turn, then the
    tokenizer's own.
    """
    user, assistant = Message("user", "a"), Message("assistant", "")
    stops = [render(tokenizer, [user, assistant]).stop]
    try:
        two_turns = render(tokenizer, [user, assistant, user, assistant], loss_on="all")
        stops.append(int(two_turns.tokens[1:][two_turns.trained][0]))
    except DataError:  # a template that takes only one turn
        pass
    own = getattr(tokenizer, "eos_token_ids", None)  # a set in mlx-lm's wrapper
    own = own if isinstance(own, (set, frozenset, list, tuple)) else [tokenizer.eos_token_id]
    stops += sorted(int(token) for token in own if token is not None)
    return tuple(dict.fromkeys(stops))


def pad_id(tokenizer: Any, rows: int = 0) -> int:
    """The token to pad with: the tokenizer's padding token, else its end of text, else 0. Padding is never
    trained.

    Args:
        tokenizer: As in :func:`render`.
        rows: Of the model's embedding: a padding token that was added without a row in it (a habit with
            Llama 2) is not used. 0 for any number.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (not rows or token < rows):
            return int(token)
    return 0


def _turns(messages: Chat, loss_on: str) -> list[tuple[str, str]]:
    turns = [(str(_get(message, "role")), str(_get(message, "content"))) for message in messages]
    if not turns or turns[-1][0] != "assistant":
        raise DataError(
            "the last turn is not the assistant's", fix="end the chat with the assistant's answer"
        )
    if loss_on not in ("last", "all"):
        raise DataError(f"loss_on: {loss_on!r} is not one of last, all", fix="choose one of them")
    return turns


def _get(message: Message | Mapping[str, Any], name: str) -> Any:
    return message[name] if isinstance(message, Mapping) else getattr(message, name)


def _render(
    encoder: _ChatEncoder, turns: Turns, encode: Callable[[str], list[int]], loss_on: str, id: str
) -> TokenizedRow:
    """Concatenate the tokens of a chat, and note where each answer begins and ends."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []  # the content of each answer
    ends: list[int] = []  # behind the token that ends each answer
    in_answer = False  # between an answer's content and the token that ends it
    for part in encoder.parts(turns):
        start = len(ids)
        if isinstance(part, int):
            ids.append(part)
            if in_answer:
                ends.append(len(ids))
                in_answer = False
        else:
            ids += encode(part)
            if isinstance(part, _AnswerText):
                spans.append((start, len(ids)))
                in_answer = True
    ids = ids[: ends[-1]]
    mask = np.zeros(len(ids), dtype=bool)
    for turn in range(len(spans)) if loss_on == "all" else [len(spans) - 1]:
        mask[spans[turn][0] : ends[turn]] = True
    return TokenizedRow(np.array(ids, dtype=np.int32), mask[1:], tuple(spans), id)


class _AnswerText(str):
    """An assistant's content, told apart from the other texts of a chat by its type."""


@dataclass(frozen=True)
class _Slot:
    """One element of a template's skeleton that is not text: a special token, or the place of a turn's
    content.
    """

    special: int | None = None
    turn: int = -1


class _ChatEncoder:
    """A tokenizer with its chat template: the template's skeleton for each sequence of roles, and texts to
    tokens without special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = weakref.proxy(tokenizer)
        added = {
            token.content: (int(number), token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        self.special_ids = {content: number for content, (number, _) in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        # A special token that strips white space beside it (lstrip, rstrip) does so in a skeleton too.
        patterns = [
            (r"\s*" if added[content][1].lstrip else "")
            + f"({re.escape(content)})"
            + (r"\s*" if added[content][1].rstrip else "")
            for content in longest_first
        ]
        self.special = re.compile("|".join(patterns) or r"(?!)")
        # Runs of spaces are text even where a tokenizer adds them as tokens; every other added token controls
        # the model.
        controls = [content for content in longest_first if len(content) > 1 and not content.isspace()]
        self.control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self.skeletons: dict[tuple[str, ...], tuple[str | _Slot, ...]] = {}

    def split(self, text: str) -> Iterator[str]:
        """The pieces of a text that are encoded one by one: a special token's spelling is split behind its
        first character, and so stays text.
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
            for piece in self.split(text)
            for token in encode(piece, add_special_tokens=False, verbose=False)
        ]

    def encode_pieces(self, pieces: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of pieces from :meth:`split`, in one call of the tokenizer where that gives the same."""
        from transformers import PreTrainedTokenizerBase

        pieces = list(pieces)
        inner: Any = self.tokenizer
        if not isinstance(inner, PreTrainedTokenizerBase):
            inner = getattr(inner, "_tokenizer", None)  # mlx-lm's wrapper cannot be called
        # Some tokenizers of mlx-lm override ``encode`` and change the text there and nowhere else.
        if not pieces or getattr(inner.__class__, "encode", None) is not PreTrainedTokenizerBase.encode:
            return {piece: self.encode(piece) for piece in pieces}
        tokens = inner(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        return dict(zip(pieces, tokens, strict=True))

    def parts(self, turns: Turns) -> Iterator[int | str]:
        """The special tokens of a chat and the texts between them, each to be encoded separately; an
        assistant's content is an :class:`_AnswerText`.
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
                yield part.special if part.special is not None else _AnswerText(turns[part.turn][1])
                text = ""

    def skeleton(self, roles: tuple[str, ...]) -> tuple[str | _Slot, ...]:
        """The template's text, special tokens and places of contents, for one sequence of roles."""
        if roles not in self.skeletons:
            self.skeletons[roles] = tuple(self._skeleton(roles))
        return self.skeletons[roles]

    def _skeleton(self, roles: tuple[str, ...]) -> Iterator[str | _Slot]:
        markers = [f"xMARKx{turn}x" for turn in range(len(roles))]
        pieces = re.split(r"xMARKx(\d+)x", self._apply_template(roles, markers))
        order = [int(piece) for piece in pieces[1::2]]
        if order != list(range(len(roles))):
            lost = [roles[turn] for turn in range(len(roles)) if order.count(turn) != 1]
            reason = f"does not show the {lost[0]} turn once" if lost else "changes the order of the turns"
            raise ModelError(
                f"the chat template {reason}",
                fix="give the tokenizer a template that shows each turn as it is",
            )
        for turn, piece in enumerate(pieces[::2]):
            if turn:
                yield _Slot(turn=turn - 1)
            position = 0
            for match in self.special.finditer(piece):
                if match.start() > position:
                    yield piece[position : match.start()]
                content = next(group for group in match.groups() if group is not None)
                yield _Slot(special=self.special_ids[content])
                position = match.end()
            if position < len(piece):
                yield piece[position:]
        if not self.special.search(pieces[-1]):
            yield self._end_of_text()

    def _apply_template(self, roles: tuple[str, ...], contents: Sequence[str]) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        template = getattr(self.tokenizer, "chat_template", None)
        if not template and not getattr(self.tokenizer, "has_chat_template", False):
            raise ModelError(
                "the tokenizer has no chat template", fix="add chat_template.jinja to the model's folder"
            )
        settings = dict(_SETTINGS)
        if "strftime_now" in str(template):
            settings["chat_template"] = _FIXED_CLOCK + self.tokenizer.get_chat_template()
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=False, **settings
                )
            )
        except Exception as error:  # a template is a program from elsewhere and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the chat template refuses the turns {', '.join(roles)}: {reason}",
                fix="change the rows' turns, or use another template",
            ) from error

    def _end_of_text(self) -> _Slot:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "neither the chat template nor the tokenizer ends an answer",
                fix="set eos_token in tokenizer_config.json",
            )
        return _Slot(special=int(self.tokenizer.eos_token_id))


_encoders: weakref.WeakKeyDictionary[Any, tuple[object, _ChatEncoder]] = weakref.WeakKeyDictionary()


def _encoder_of(tokenizer: Any) -> _ChatEncoder:
    """The encoder of a tokenizer with its current template, cached as long as the tokenizer lives."""
    template = getattr(tokenizer, "chat_template", None)
    cached = _encoders.get(tokenizer)
    if cached is None or cached[0] != template:
        cached = _encoders[tokenizer] = (template, _ChatEncoder(tokenizer))
    return cached[1]
