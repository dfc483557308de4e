"""A tokenizer with its chat template: messages to text, and that text to tokens.

The template is rendered with the real contents, so what it does with them (take thinking out of earlier
turns, trim, cut) is done as it is at inference. Two things are hidden from it behind characters of Unicode's
private planes, which stand for them while it is rendered:

- a control token spelled in a content. It is put back as text, so nothing that a row says can end a turn or
  begin another one;
- the last answer. It is what the model writes, which no template sees, so the tokens before it are the same
  in training and at inference.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_distill.data.messages import texts_of
from mlx_distill.errors import DataError, ModelError
from mlx_distill.records import Message

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

# Around thinking. Templates look for them in the assistant's contents, so they are never hidden there.
_THINKING = frozenset({"<think>", "</think>"})
# What a message may hold besides its content, and the names under which templates read it.
_EXTRAS = {
    "tools": ("tools",),
    "tool_calls": ("tool_calls",),
    "reasoning_content": ("reasoning_content", "thinking"),
}
_THOUGHT = "reasoning_content"
_TEMPLATE_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_PRIVATE = range(0xF0000, 0xFFFFE)  # code points without a meaning
_PRIVATE_TEXT = re.compile("[\U000f0000-\U0010ffff]")
# Texts that may stand before a text to encode it as the continuation of another one.
_ANCHORS = ("\n", "|", "a", "\uf8ff")

Turns = Sequence[Message]
Piece = tuple[str, str]  # what precedes the text when it is encoded, and the text


@dataclass(frozen=True)
class RenderedChat:
    """A chat as its template writes it.

    ``before`` and ``after``: the text around the last answer; ``answer``: the last answer; ``hidden``: code
    points in ``before``, and the control tokens in their place; ``earlier``: (start, end) in ``before`` of
    the content of each earlier turn that is trained; ``thinking``: (start, end) in ``before`` of what the
    last turn thinks, up to the token that ends it, or None.
    """

    before: str
    answer: str
    after: str
    hidden: Mapping[int, str]
    earlier: tuple[tuple[int, int], ...]
    thinking: tuple[int, int] | None = None

    @property
    def spells(self) -> bool:
        """Whether a turn spells a control token."""
        return bool(self.hidden)


@dataclass(frozen=True)
class Element:
    """A part of a rendered text from ``start`` to ``end``: one control token, or the text between two."""

    start: int
    end: int
    token: int | None


class ChatEncoder:
    """What is known about a tokenizer and its template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = weakref.proxy(tokenizer)
        self.added = {
            token.content: (int(number), token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        self.checked_shapes: set[tuple[Any, ...]] = set()
        # Runs of spaces are text even where a tokenizer adds them as special tokens.
        words = [content for content in self.added if len(content) > 1 and not content.isspace()]
        special = {content for content in words if self.added[content][1].special}
        self.template_text = str(getattr(tokenizer, "chat_template", None) or "")
        self.taken = set(_PRIVATE_TEXT.findall(self.template_text))
        self._set_control(special)
        ordinary = set(words) - special - _THINKING
        if ordinary:
            self._set_control(special | self._written_by_template(ordinary))

    def _set_control(self, control: set[str]) -> None:
        """Set the tokens that control the model: contents cannot contain them."""
        self.control = control
        longest_first = sorted(control, key=len, reverse=True)
        # A token that strips white space beside it (lstrip, rstrip) does so in what the template writes.
        patterns = [
            (r"\s*" if self.added[content][1].lstrip else "")
            + re.escape(content)
            + (r"\s*" if self.added[content][1].rstrip else "")
            for content in longest_first
        ]
        self.written = re.compile("|".join(patterns) or r"(?!)")
        self.spelled = _alternatives(longest_first)
        # Found in the normalized text too, where another spelling (in capitals, full width) becomes theirs.
        self.normalized = {self.added[content][0] for content in control if self.added[content][1].normalized}
        self.normalized.discard(self.tokenizer.unk_token_id)
        self.spelled_by_assistant = _alternatives([text for text in longest_first if text not in _THINKING])
        self.anchors = _Anchors(self)

    def _written_by_template(self, ordinary: set[str]) -> set[str]:
        """The added tokens that are not marked as special and that the template writes around turns."""
        user, assistant = Message("user", "a"), Message("assistant", "b")
        for turns in ([user, assistant, user, assistant], [user, assistant]):
            try:
                text = self._apply(turns)
            except DataError:
                continue
            return {token for token in ordinary if token in text}
        return set()

    # --- messages to text ---------------------------------------------------------------------------------

    def render(self, turns: Turns, trained: Sequence[int]) -> RenderedChat:
        """The chat as its template writes it.

        Args:
            turns: The last one is the answer.
            trained: The earlier turns whose contents are located.

        Raises:
            DataError: the template refuses the turns, or ignores what a turn holds besides its content.
            ModelError: no chat template, or one that does not show a turn.
        """
        self._check_shape(turns)
        (answer, place), characters = self._private_characters(turns)
        last = self._hide(turns[-1], characters) if turns[-1].extra else turns[-1]
        shown = [*(self._hide(turn, characters) for turn in turns[:-1]), _with_content(last, answer)]
        text = self._apply(shown)
        escaped = [json.dumps(character)[1:-1] for character in characters.values()]
        if text.count(answer) != 1 or any(code in text for code in escaped):
            raise ModelError(
                "the chat template does not write contents as they are",
                fix="give the tokenizer a template that shows each turn as it is",
            )
        spans = [self._locate(shown, index, place, text) for index in trained]
        before, _, after = text.partition(answer)
        hidden = {ord(character): token for token, character in characters.items()}
        thinking = self._locate_thinking(shown, place, before) if shown[-1].extra.get(_THOUGHT) else None
        return RenderedChat(before, turns[-1].content, after, hidden, tuple(spans), thinking)

    def _check_shape(self, turns: Turns) -> None:
        """Refuse a template that does not show every turn: checked once for each sequence of roles."""
        shape = tuple((turn.role, bool(turn.content), *turn.extra) for turn in turns)
        if shape in self.checked_shapes:
            return
        keys = {key for turn in turns for key in turn.extra}
        code = " ".join(_TEMPLATE_CODE.findall(self.template_text))
        for key, names in _EXTRAS.items():
            known = any(re.search(rf"\b{name}\b", code) for name in names)
            # A template that is a function of mlx-lm has no text to look at.
            if key in keys and self.template_text and not known:
                raise DataError(
                    f"the chat template does not know {key}, which the row has",
                    fix="remove it from the rows, or use a model whose template shows it",
                )
        markers = [f"xMARKx{index}x" if turn.content else "" for index, turn in enumerate(turns)]
        markers[-1] = f'xMARKx"<{len(turns) - 1}>"x'  # an answer must be written as it is, without escapes
        marked = map(_with_content, turns, markers)
        text = self._apply(list(marked))
        places = [text.find(marker) for marker in markers]
        lost = next((turn for turn, place in zip(turns, places, strict=True) if place < 0), None)
        reason = None
        if lost is not None or text.count(markers[-1]) > 1:
            reason = f"does not show the {(lost or turns[-1]).role} turn once"
        elif max(places) != places[-1]:
            reason = "changes the order of the turns"
        if reason:
            raise ModelError(
                f"the chat template {reason}",
                fix="give the tokenizer a template that shows each turn as it is",
            )
        self.checked_shapes.add(shape)

    def _private_characters(self, turns: Turns) -> tuple[tuple[str, str], dict[str, str]]:
        """Two characters for contents, and one for each control token that a turn spells."""
        contents = [turn.content for turn in turns]
        extras = [text for turn in turns if turn.extra for text in texts_of(turn.extra)]
        spelled = sorted({token for text in (*contents, *extras) for token in self.spelled.findall(text)})
        taken = self.taken.union(*map(_PRIVATE_TEXT.findall, (*contents, *extras)))
        free = (chr(point) for point in _PRIVATE if chr(point) not in taken)
        return (next(free), next(free)), {token: next(free) for token in spelled}

    def _hide(self, turn: Message, characters: Mapping[str, str]) -> Message:
        """The turn with a character in place of each control token that it spells."""
        if not characters:
            return turn
        spelled = self.spelled_by_assistant if turn.role == "assistant" else self.spelled

        def hide(value: Any, spelled: re.Pattern[str] = spelled) -> Any:
            if isinstance(value, str):
                return spelled.sub(lambda match: characters[match[0]], value)
            if isinstance(value, Mapping):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, (list, tuple)) else value

        return Message(turn.role, hide(turn.content), turn.trained, hide(turn.extra))

    def _locate(self, turns: Turns, index: int, place: str, text: str) -> tuple[int, int]:
        """Where the template writes the content of an earlier turn: what differs between the chat's text and
        the text with one character, ``place``, as that content.
        """
        changed = [*turns[:index], _with_content(turns[index], place), *turns[index + 1 :]]
        before, found, after = self._apply(changed).partition(place)
        end = len(text) - len(after)
        if not found or place in after or not text.startswith(before) or not text.endswith(after):
            end = -1
        if end < len(before):
            raise DataError(
                f"messages[{index}]: the chat template does not write the content as one text",
                fix="train on the last turns only (loss_on: last), or give this turn weight 0",
            )
        return len(before), end

    def _locate_thinking(self, shown: list[Message], place: str, before: str) -> tuple[int, int]:
        """Where the template writes what the last turn thinks, up to the token that marks its end."""
        last = shown[-1]
        changed = Message(last.role, last.content, last.trained, {**last.extra, _THOUGHT: place})
        start, found, rest = self._apply([*shown[:-1], changed]).partition(place)
        after = rest.partition(last.content)[0]
        content_end = len(before) - len(after)
        marks = [content for content in self.added if content.strip() and content in after]
        if not found or not marks or not before.startswith(start) or not before.endswith(after):
            content_end = -1
        if content_end <= len(start) or any(
            mark in before[len(start) : content_end] for mark in (*marks, *_THINKING)
        ):
            raise DataError(
                "the chat template does not write the thinking of the last turn as one text with an end",
                fix="use a model whose template marks thinking, and no marks within the thinking",
            )
        return len(start), content_end + min(after.index(mark) for mark in marks)

    def _apply(self, turns: Turns) -> str:
        """The text of some turns."""
        template = getattr(self.tokenizer, "chat_template", None)
        if not template and not getattr(self.tokenizer, "has_chat_template", False):
            raise ModelError(
                "the tokenizer has no chat template", fix="add chat_template.jinja to the model's folder"
            )
        settings = dict(_SETTINGS)
        tools = [tool for turn in turns for tool in turn.extra.get("tools", ())]
        if tools:
            settings["tools"] = tools
        if "strftime_now" in self.template_text:
            settings["chat_template"] = _FIXED_CLOCK + self.tokenizer.get_chat_template(tools=tools or None)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [_template_message(turn) for turn in turns],
                    tokenize=False,
                    add_generation_prompt=False,
                    **settings,
                )
            )
        except Exception as error:  # a template is a program from elsewhere and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"the chat template refuses the turns {', '.join(turn.role for turn in turns)}: {reason}",
                fix="change the rows' turns, or use another template",
            ) from error

    # --- text to tokens -----------------------------------------------------------------------------------

    def elements(self, text: str) -> Iterator[Element]:
        """The control tokens that the template wrote, and the texts between them."""
        position = 0
        for match in self.written.finditer(text):
            if match.start() > position:
                yield Element(position, match.start(), None)
            content = match[0] if match[0] in self.added else match[0].strip()
            yield Element(match.start(), match.end(), self.added[content][0])
            position = match.end()
        if position < len(text):
            yield Element(position, len(text), None)

    def pieces(self, text: str, behind: str, spells: bool = True) -> Iterator[Piece]:
        """The pieces of a text that are encoded one by one: a control token's spelling is split behind its
        first character, and so stays text.

        Args:
            text: Without hidden characters.
            behind: What stands before it: ``token``, ``text``, or nothing at the beginning of a chat.
            spells: False where it is known that no control token is spelled in it.
        """
        anchor = self.anchors.of[behind]
        while spells and (match := self.spelled.search(text)):
            end = match.start() + 1
            yield anchor, text[:end]
            anchor, text = self.anchors.of["text"], text[end:]
        if text:
            yield anchor, text

    def encode(self, pieces: Iterable[Piece]) -> dict[Piece, list[int]]:
        """The tokens of pieces, in one call of the tokenizer where that gives the same."""
        from transformers import PreTrainedTokenizerBase

        pieces = list(dict.fromkeys(pieces))
        texts = [anchor + text for anchor, text in pieces]
        inner: Any = self.tokenizer
        if not isinstance(inner, PreTrainedTokenizerBase):
            inner = getattr(inner, "_tokenizer", None)  # mlx-lm's wrapper cannot be called
        # Some tokenizers of mlx-lm override ``encode`` and change the text there and nowhere else.
        if len(texts) < 2 or getattr(inner.__class__, "encode", None) is not PreTrainedTokenizerBase.encode:
            encode = self.tokenizer.encode
            tokens = [encode(text, add_special_tokens=False, verbose=False) for text in texts]
        else:
            tokens = inner(texts, add_special_tokens=False, verbose=False)["input_ids"]
        out = {}
        for piece, ids in zip(pieces, tokens, strict=True):
            own = self.anchors.remove(piece[0], ids)
            out[piece] = self.anchors.encode_again(piece[1]) if own is None else own
            if self.normalized:
                self._check_normalized(out[piece])
        return out

    def _check_normalized(self, tokens: Sequence[int]) -> None:
        """Refuse a text that becomes a control token once the tokenizer has normalized it."""
        found = self.normalized.intersection(tokens)
        content = next((text for text in self.control if self.added[text][0] in found), None)
        if content is not None:
            raise DataError(
                f"a text has another spelling of the control token {content!r}, and is read as it",
                fix=f"set normalized: false for {content!r} in tokenizer.json, or remove the text",
            )

    def last_of(self, text: str, elements: Sequence[Element]) -> str:
        """What a text of these elements ends with: ``token``, ``text``, or nothing where it is empty."""
        if not elements:
            return ""
        # Other added tokens than the control tokens are found by the tokenizer, within the text.
        is_token = elements[-1].token is not None or text.endswith(tuple(self.added))
        return "token" if is_token else "text"

    @cached_property
    def before_answer(self) -> str:
        """What stands before an answer, as :meth:`pieces` needs it."""
        question = [Message("user", "a"), Message("assistant", "")]
        text = self.render(question, ()).before
        return self.last_of(text, list(self.elements(text)))

    def end_of_text(self) -> int:
        """The tokenizer's own token that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "neither the chat template nor the tokenizer ends an answer",
                fix="set eos_token in tokenizer_config.json",
            )
        return int(self.tokenizer.eos_token_id)


class _Anchors:
    """What to put before a text, so that it is encoded as it is within a chat.

    Byte-level tokenizers encode a text in the same way wherever it stands. Others put a word mark (``▁``)
    before every text, or before the first one: within a chat, behind a token or behind other text, there may
    be none. Such a text is encoded behind an anchor, whose tokens are removed.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self.stable: dict[str, list[int]] = {"": []}  # anchors that stay tokens of their own
        self.of = {"": "", "token": "", "text": ""}
        probes = ['{"a": "b"}', "ab c", "\u4e00"]
        plain = [self._encode(probe) for probe in probes]
        for anchor in _ANCHORS:
            self.stable[anchor] = self._encode(anchor)
            continued = [self.remove(anchor, self._encode(anchor + probe)) for probe in probes]
            if encoder.tokenizer.unk_token_id in self.stable[anchor] or not all(continued):
                del self.stable[anchor]
            elif continued == plain:
                return
            elif not self.of["text"]:
                self.of["text"] = anchor
                if self._behind_token(probes) == continued:
                    self.of["token"] = anchor

    def _encode(self, text: str) -> list[int]:
        ids = self.encoder.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return [int(token) for token in ids]

    def _behind_token(self, probes: Sequence[str]) -> list[list[int]] | None:
        for content in sorted(self.encoder.control):
            number = self.encoder.added[content][0]
            ids = [self._encode(content + probe) for probe in probes]
            if all(line[:1] == [number] for line in ids):
                return [line[1:] for line in ids]
        return None

    def remove(self, anchor: str, tokens: Sequence[int]) -> list[int] | None:
        """The tokens without the anchor's, or None where the tokenizer merged them with the text."""
        expected = self.stable[anchor]
        return list(tokens[len(expected) :]) if list(tokens[: len(expected)]) == expected else None

    def encode_again(self, text: str) -> list[int]:
        """A text whose first characters merge with its anchor, behind another one."""
        for anchor in list(self.stable)[1:]:
            tokens = self.remove(anchor, self._encode(anchor + text))
            if tokens is not None:
                return tokens
        raise ModelError(
            f"the tokenizer cannot continue a text with {text[:20]!r}",
            fix="use a model with a byte-level tokenizer",
        )


def _alternatives(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _with_content(turn: Message, content: str) -> Message:
    return Message(turn.role, content, turn.trained, turn.extra)


def _template_message(turn: Message) -> dict[str, Any]:
    """The turn as a template reads it; gpt-oss's reads thinking under a name of its own."""
    message = {"role": turn.role, "content": turn.content, **turn.extra}
    message.pop("tools", None)
    if "reasoning_content" in message:
        message["thinking"] = message["reasoning_content"]
    return message


_encoders: weakref.WeakKeyDictionary[Any, tuple[object, ChatEncoder]] = weakref.WeakKeyDictionary()


def encoder_of(tokenizer: Any) -> ChatEncoder:
    """The encoder of a tokenizer with its current template, cached as long as the tokenizer lives."""
    template = getattr(tokenizer, "chat_template", None)
    cached = _encoders.get(tokenizer)
    if cached is None or cached[0] != template:
        cached = _encoders[tokenizer] = (template, ChatEncoder(tokenizer))
    return cached[1]
