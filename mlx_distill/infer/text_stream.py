"""The text of an answer while its tokens come in: whole characters, without thinking, up to a stop string.

What is shown piece by piece is exactly the text that the tokenizer makes of all tokens at once: a piece is
held back until no later token can change it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_distill.errors import ModelError
from mlx_distill.infer.channels import Channels
from mlx_distill.infer.requests import Generation, TokenEvent

_WINDOW = 96  # tokens that are decoded at once, at most
_CONTEXT = 16  # of them that stay when the window moves: what a token's text depends on
_CLEANED_UP = 8  # last characters that a tokenizer which cleans up spaces may still change
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\ufffd"  # what bytes that are no character yet are decoded to


class TextStream:
    """The text of tokens that come in one by one.

    Args:
        tokenizer: With ``decode(ids)``.

    >>> class Bytes:
    ...     def decode(self, ids): return bytes(ids).decode(errors="replace")
    >>> stream = TextStream(Bytes())
    >>> [stream.add([byte]) for byte in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = ""  # of the window's text
        cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._held = _CLEANED_UP if cleans else 0

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens, decoded together: the text that can be shown from them on, if any."""
        if not tokens:
            return ""
        self._window += tokens
        text = self._tokenizer.decode(self._window)
        if text.endswith(_UNFINISHED) or self._is_byte(tokens[-1]):
            return ""
        piece = self._piece(text[: max(0, len(text) - self._held)])
        if len(self._window) > _WINDOW:
            # What is shown of the new window ends where it ended in the old one.
            hidden = len(text) - len(self._shown)
            self._window = self._window[-_CONTEXT:]
            text = self._tokenizer.decode(self._window)
            self._shown = text[: len(text) - hidden]
        return piece

    def finish(self) -> str:
        """The rest, behind the last token."""
        return self._piece(self._tokenizer.decode(self._window)) if self._window else ""

    def _piece(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _is_byte(self, token: int) -> bool:
        """Whether a token is a byte of a tokenizer with byte fallback, which decodes a run of them at once:
        as text where all of it is text, else each byte as a replacement character.
        """
        name = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        text = name(token) if callable(name) else None
        return isinstance(text, str) and _BYTE_TOKEN.fullmatch(text) is not None


class StopStrings:
    """Ends a text before the first of some strings that is complete in it.

    ``hit``: whether one has come.

    Args:
        strings: None of them empty.

    >>> stops = StopStrings(["END"])
    >>> [stops.add(text) for text in ("one E", "a EN", "D two")], stops.hit
    (['one ', 'Ea ', ''], True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.hit = False
        self._held = ""

    def add(self, text: str) -> str:
        """Take the next text: what can be shown of it and of what was held back."""
        if self.hit or not self.strings:
            return "" if self.hit else text
        text = self._held + text
        places = [(text.find(string), string) for string in self.strings]
        ends = [(start + len(string), start) for start, string in places if start >= 0]
        if ends:
            self.hit = True
            return text[: min(ends)[1]]
        held = max(self._begun(text, string) for string in self.strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back at the end of the text."""
        held, self._held = ("" if self.hit else self._held), ""
        return held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """The length of the longest end of a text that a string begins with."""
        longest = min(len(text), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Piece(NamedTuple):
    """Text to show: of the answer, and of the thinking before it."""

    answer: str
    thinking: str = ""


class AnswerStream:
    """The texts of a request that streams, from its events.

    Once ``stopped`` the request can be cancelled. ``tokens`` and ``thinking_tokens`` count what has come so
    far.

    Args:
        tokenizer: Of the engine.
        channels: Of the tokenizer (:func:`~mlx_distill.infer.channels.channels_of`).
        prompt: The request's, which may end within thinking.
        stop: Strings that end the answer; they are not part of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        channels: Channels | None,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._answer, self._thinking = TextStream(tokenizer), TextStream(tokenizer)
        self._stop = StopStrings(stop)
        self._marks = _Marks(channels, prompt)
        self._sent: list[str] = []  # of the engine's text
        self._strip = False  # line breaks between thinking and the answer
        self.tokens = self.thinking_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.hit

    def add(self, events: Sequence[TokenEvent]) -> Piece:
        """Take the next tokens: the texts that can be shown from them on."""
        thinking = [event.token for event in events if event.thinking]
        answer = [event.token for event in events if not event.thinking]
        begins = bool(answer) and self.tokens == self.thinking_tokens
        self.tokens += len(events)
        self.thinking_tokens += len(thinking)
        self._strip |= bool(thinking)
        thought = self._thinking.add([token for token in thinking if self._marks.shows(token)])
        if begins:
            thought += self._thinking.finish()
        return Piece(self._take(self._answer.add(answer)), thought)

    def end(self, generation: Generation) -> Piece:
        """The rest of the texts, once the request has its answer.

        Raises:
            ModelError: the tokenizer writes the tokens differently one by one than together.
        """
        thinking = "" if self.tokens > self.thinking_tokens else self._thinking.finish()
        answer = self._take(self._answer.finish())
        if "".join(self._sent) != generation.text:
            raise ModelError(
                "the tokenizer writes the answer differently token by token than as a whole",
                fix="ask without stream",
            )
        return Piece(answer + self._stop.finish(), thinking)

    def _take(self, text: str) -> str:
        if self._strip:
            text = text.lstrip("\n")
            self._strip = not text
        self._sent.append(text)
        return self._stop.add(text)


def thinking_text(
    tokenizer: Any, channels: Channels | None, prompt: Sequence[int], generation: Generation
) -> str:
    """What a model thought before its answer, without what marks it.

    Args:
        tokenizer: Of the engine.
        channels: Of the tokenizer.
        prompt: The request's.
        generation: Its answer.
    """
    marks = _Marks(channels, prompt)
    shown = [token for token in generation.tokens[: generation.answer_start] if marks.shows(token)]
    return str(tokenizer.decode(shown)).strip() if shown else ""


class _Marks:
    """Which tokens of thinking are its text: neither what marks it, nor harmony's headers."""

    def __init__(self, channels: Channels | None, prompt: Sequence[int]) -> None:
        self._channels = channels
        self._in_header = self._closed = False
        if channels is not None and channels.final:
            begin = max((i for i, token in enumerate(prompt) if token in channels.opens), default=-1)
            self._in_header = begin >= 0 and channels.final[-1] not in prompt[begin:]

    def shows(self, token: int) -> bool:
        channels = self._channels
        if channels is None:
            return True
        if token in channels.opens:
            self._in_header, self._closed = bool(channels.final), False
            return False
        if token == channels.closes:
            self._closed = True
            return False
        if self._in_header:
            self._in_header = token != channels.final[-1]
            return False
        return not self._closed
