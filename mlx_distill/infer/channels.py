"""Where the answer begins in what a model writes: behind its thinking, if there is any.

Two conventions: a block ``<think> ... </think>``, and harmony's messages, each with a channel, of which
``final`` is the answer::

    <|channel|>analysis<|message|>It rains.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>

Prompts of :func:`~mlx_distill.data.chat.prompt_ids` have an empty block, or name the final channel: the
answer begins at once. Those of a model that thinks first (:mod:`mlx_distill.thinking`) end within its
thinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_distill.data.chat import prompt_ids
from mlx_distill.errors import DistillError
from mlx_distill.records import Message

_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_State = Literal["first token", "header", "thinking", "behind a block", "answer"]
_BLOCKS = (("<think>", "</think>"), ("<|think:start|>", "<|think:end|>"))


@dataclass(frozen=True)
class Channels:
    """How one tokenizer's models mark thinking.

    Args:
        opens: Tokens that begin a block of thinking, or the header of a message.
        closes: The token that ends thinking: of a block, or of any message.
        header: What the chat template writes between ``closes`` and the answer; of harmony the whole header
            of the answer's message.
        final: Of harmony the end of that header, from the channel on; empty for blocks.
    """

    opens: frozenset[int]
    closes: int
    header: tuple[int, ...] = ()
    final: tuple[int, ...] = ()

    def is_final(self, header: Sequence[int]) -> bool:
        """Whether a header is that of harmony's answer. Behind the channel a model may name the format of the
        content: ``<|channel|>final <|constrain|>json<|message|>``.
        """
        channel, *_, message = self.final
        if channel not in header or header[-1] != message:
            return False
        last = len(header) - 1 - list(reversed(header)).index(channel)
        return tuple(header[last:][: len(self.final) - 1]) == self.final[:-1]


def channels_of(tokenizer: Any) -> Channels | None:
    """How a tokenizer's models mark thinking; None for those that do not.

    Args:
        tokenizer: With ``get_vocab`` and a chat template; others have no channels.
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    vocabulary = get_vocab() if callable(get_vocab) else {}
    if all(text in vocabulary for text in _HARMONY):
        start, channel, message, end = (int(vocabulary[text]) for text in _HARMONY)
        header = _before_answer(tokenizer, start)
        if channel in header and header[-1] == message:
            final = header[header.index(channel) :]
            return Channels(frozenset((start, channel)), end, (start, *header), final)
    for opening, closing in _BLOCKS:
        if opening in vocabulary and closing in vocabulary:
            opens, closes = int(vocabulary[opening]), int(vocabulary[closing])
            return Channels(frozenset((opens,)), closes, _before_answer(tokenizer, closes))
    return None


def _before_answer(tokenizer: Any, marker: int) -> tuple[int, ...]:
    """The tokens from behind the last marker of a prompt to the answer; none where it has no marker."""
    try:
        prompt = prompt_ids(tokenizer, [Message("user", "a")], thinking=False)
    except DistillError:  # no chat template: the prompts are made elsewhere
        return ()
    return tuple(prompt[len(prompt) - prompt[::-1].index(marker) :]) if marker in prompt else ()


class AnswerStart:
    """Finds where the answer begins, while a model's tokens come in one by one.

    ``start``: the number of tokens before the answer; None while the model thinks. ``forced``: the tokens
    that the template has next, behind thinking that has ended; empty elsewhere.

    Args:
        channels: Of the tokenizer. None: the answer begins at once.
        prompt: What the model goes on from, which may end within a block of thinking or a header.

    >>> place = AnswerStart(Channels(opens=frozenset([7]), closes=8, header=(9,)))
    >>> for token in (7, 1, 8): place.accept(token)
    >>> place.forced
    (9,)
    >>> for token in (9, 2): place.accept(token)
    >>> place.start
    4
    """

    def __init__(self, channels: Channels | None, prompt: Sequence[int] = ()) -> None:
        self.channels = channels
        self.start: int | None = 0
        self.forced: tuple[int, ...] = ()
        self._count = 0
        self._header: list[int] = []
        self._state: _State = "first token"
        if channels is not None:
            self._read_prompt(channels, [int(token) for token in prompt])

    def _read_prompt(self, channels: Channels, prompt: list[int]) -> None:
        begin = max((place for place, token in enumerate(prompt) if token in channels.opens), default=-1)
        behind = prompt[begin:]
        if begin < 0 or channels.closes in behind:
            return
        self._state = "thinking"
        if channels.final:
            header = behind[: 1 + behind.index(channels.final[-1])] if channels.final[-1] in behind else []
            if header and channels.is_final(header):
                self._state = "first token" if header == behind else "answer"
                return
            self._state, self._header = ("thinking", []) if header else ("header", behind)
        self.start = None

    def accept(self, token: int) -> None:
        """Take the next token."""
        self._count += 1
        channels = self.channels
        if channels is None or self._state == "answer":
            return
        if self._state == "first token":
            self._state = "answer"
            if token in channels.opens:
                self.start = None
                self._state, self._header = ("header" if channels.final else "thinking"), [token]
        elif self._state == "thinking":
            if token == channels.closes:
                self.forced = channels.header
                self._state, self._header = ("header" if channels.final else "behind a block"), []
                self.start = None if channels.final else self._count
        elif self._state == "behind a block":
            if self.forced and token == self.forced[0]:
                self.start = self._count
            self.forced = self._rest(token)
            if not self.forced:
                self._state = "answer"
        else:
            self.forced = self._rest(token)
            self._header.append(token)
            if token == channels.final[-1]:
                final = channels.is_final(self._header)
                self.start = self._count if final else None
                self._state = "answer" if final else "thinking"

    def _rest(self, token: int) -> tuple[int, ...]:
        """What is still forced behind a token: nothing where the token is another."""
        return self.forced[1:] if self.forced and token == self.forced[0] else ()

    def ends(self, token: int) -> bool:
        """Whether a stop token ends the generation here: the end of a message of thinking does not."""
        channels = self.channels
        return not (channels and channels.final and self.start is None and token == channels.closes)


def split_thinking(
    tokens: Sequence[int], channels: Channels | None, prompt: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """The tokens of a generation before its answer, with what marks them, and those of the answer.

    Args:
        tokens: Without the stop token.
        channels: From :func:`channels_of`.
        prompt: What the model went on from.
    """
    place = AnswerStart(channels, prompt)
    for token in tokens:
        place.accept(token)
    start = len(tokens) if place.start is None else place.start
    return list(tokens[:start]), list(tokens[start:])
