"""A chat in the tokens of one model, by that model's own template.

The template is rendered once for each sequence of roles, with a marker in place of every content. The text between the markers is
the template's: its special tokens become token ids. The contents are put in afterwards as plain text, so nothing that a row says
can become a special token, and what stands before the assistant's content is the same in training and at inference.

    <|im_start|>user\\n  [content]  <|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n  [answer]  <|im_end|>
    ------------------------------- prompt -----------------------------------------------------   ---------- trained -
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from mlx_distill.data.vocabulary import Answer, Turns, Vocabulary, vocabulary_of
from mlx_distill.errors import DataError
from mlx_distill.records import Message

Chat = Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One chat in tokens. It ends with the token that ends the last assistant turn.

    ``tokens [n]``; ``mask [n]``, true on what is trained: the content of assistant turns and the token that ends them;
    ``spans``: tokens from and to of each assistant turn's content; ``trained``: which of the spans are learned; ``id``: the row's.
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


def render_many(tokenizer: Any, chats: Sequence[Chat], *, loss_on: str = "last", ids: Sequence[str] = ()) -> list[Encoded]:
    """:func:`render` of each chat; the tokenizer is called once, and for a text that stands in several of them once.

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

    return [_render(vocabulary, turns, encode, loss_on, id) for turns, id in zip(rows, ids or [""] * len(rows), strict=True)]


def _turns(messages: Chat, loss_on: str) -> list[tuple[str, str]]:
    turns = [(str(_get(m, "role")), str(_get(m, "content"))) for m in messages]
    if not turns or turns[-1][0] != "assistant":
        raise DataError("the last turn is not the assistant's", fix="end the chat with the assistant's answer")
    if loss_on not in ("last", "all"):
        raise DataError(f"loss_on: {loss_on!r} is not one of last, all", fix="choose one of them")
    return turns


def _render(vocabulary: Vocabulary, turns: Turns, encode: Callable[[str], list[int]], loss_on: str, id: str) -> Encoded:
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
        messages: The turns so far, without the answer. Where the last one is the assistant's it is taken for the answer and left out.
    """
    turns = list(messages)
    if turns and _get(turns[-1], "role") == "assistant":
        turns.pop()
    return [int(token) for token in render(tokenizer, [*turns, Message("assistant", "")]).prompt]


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an assistant's content, encoded as :func:`render` does: without special tokens, whatever it says."""
    return vocabulary_of(tokenizer).encode(text)


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the one of a last turn first, then the one of an earlier turn, then the tokenizer's own."""
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
    """A token to fill rows with: the tokenizer's padding token, else its end of text, else 0. Pads are never trained."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _get(message: Message | Mapping[str, Any], name: str) -> Any:
    return message[name] if isinstance(message, Mapping) else getattr(message, name)
