"""A chat in the tokens of one model, by that model's own chat template.

What the model reads is what transformers' ``apply_chat_template`` gives for the same messages, token for
token, but for control tokens that a row spells: they stay text (see
:mod:`mlx_distill.data.chat_template`). What precedes the assistant's answer is the same in training and at
inference::

    <|im_start|>user\\n [content] <|im_end|>\\n<|im_start|>assistant\\n [answer] <|im_end|>
    ----------------------------- prompt ----------------------------- ------ trained -----
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mlx_distill.data.chat_template import ChatEncoder, Element, Piece, RenderedChat, encoder_of
from mlx_distill.data.messages import message_from_row
from mlx_distill.errors import DataError
from mlx_distill.records import Example, Message
from mlx_distill.thinking import thinking_budget

_ENCODED_TOGETHER = 256  # rows that encode_rows holds in memory

Chat = Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    """One row in tokens. A rendered chat ends with the token that ends its last assistant turn.

    ``tokens [n]``; ``trained [n - 1]``: for each token but the first, whether it is a label of the training:
    the content of assistant turns and the token that ends them; ``spans``: (start, end) of the content of
    each trained turn, the last answer's at the end, empty for a row that was read back from a file; ``id``:
    the row's; ``thinking``: (start, end) of what the last turn thinks, up to the token that ends it, where
    the tokenizer's model thinks (:mod:`mlx_distill.thinking`): it is trained then too, with what marks it.
    """

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " m"]
    spans: tuple[tuple[int, int], ...] = ()
    id: str = ""
    thinking: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def start(self) -> int:
        """The first token that the model writes: of its thinking, or of the answer."""
        return self.spans[-1][0] if self.thinking is None else self.thinking[0]

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
    return render_many(tokenizer, [messages], loss_on=loss_on, ids=[id])[0]


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
    thinks = thinking_budget(tokenizer) > 0
    return _encode(encoder_of(tokenizer), chats, loss_on, ids or [""] * len(chats), thinks=thinks)


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
            if len(item) > max_length:
                report.too_long += 1
            elif all(start == end for start, end in item.spans):
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


def prompt_ids(tokenizer: Any, messages: Chat, *, thinking: bool | None = None) -> list[int]:
    """The tokens after which the model writes its answer: those that :func:`render` puts before it. Of a
    model that thinks first those before its thinking.

    Args:
        tokenizer: As in :func:`render`.
        messages: The turns so far. A last turn of the assistant is the answer, and is left out.
        thinking: Whether thinking is left to the model; None: as :mod:`mlx_distill.thinking` says.
    """
    turns = list(messages)
    last = turns[-1] if turns else None
    if last is not None and (last.role if isinstance(last, Message) else last["role"]) == "assistant":
        turns.pop()
    if thinking is None:
        thinking = thinking_budget(tokenizer) > 0
    own = Message("assistant", "", extra={"reasoning_content": "a"} if thinking else {})
    encoder = encoder_of(tokenizer)
    row = _encode(encoder, [[*turns, own]], "last", [""], thinks=thinking)[0]
    return [int(token) for token in row.tokens[: row.start]]


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an assistant's content, encoded as in :func:`render`: never control tokens, whatever the
    text says.
    """
    encoder = encoder_of(tokenizer)
    pieces = list(encoder.pieces(text, encoder.before_answer))
    tokens_of = encoder.encode(pieces)
    return [token for piece in pieces for token in tokens_of[piece]]


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: first the one of a last turn, then the one of an earlier turn, then the
    tokenizer's own.
    """
    user, assistant = Message("user", "a"), Message("assistant", "a")
    stops = [render(tokenizer, [user, assistant]).stop]
    try:
        two_turns = render(tokenizer, [user, assistant, user, assistant], loss_on="all")
        stops.append(_end_of_first(two_turns))
    except DataError:  # a template that takes only one turn
        pass
    own = getattr(tokenizer, "eos_token_ids", None)  # a set in mlx-lm's wrapper
    own = own if isinstance(own, (set, frozenset, list, tuple)) else [tokenizer.eos_token_id]
    stops += sorted(int(token) for token in own if token is not None)
    return tuple(dict.fromkeys(stops))


def _end_of_first(row: TokenizedRow) -> int:
    """The last trained token of a row's first trained turn."""
    untrained = np.flatnonzero(~row.trained[row.spans[0][0] :])
    return int(row.tokens[row.spans[0][0] + untrained[0]])


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


@dataclass(frozen=True)
class _Part:
    """An element of the text before the last answer. ``pieces``: of its text; ``cuts``: where the content of
    a trained turn begins or ends within it, the pieces before that place and those behind it.
    """

    element: Element
    pieces: tuple[Piece, ...] = ()
    cuts: Mapping[int, tuple[tuple[Piece, ...], tuple[Piece, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """A chat whose pieces are yet to be encoded: the parts before the last answer, the answer, the text that
    the template writes behind it, and the token that ends it.
    """

    parts: tuple[_Part, ...]
    answer: tuple[Piece, ...]
    after: tuple[Piece, ...]
    stop: int
    earlier: tuple[tuple[int, int], ...]
    answer_is_trained: bool
    thinking: tuple[int, int] | None = None

    @property
    def pieces(self) -> Iterator[Piece]:
        for part in self.parts:
            yield from part.pieces
            for pair in part.cuts.values():
                yield from (*pair[0], *pair[1])
        yield from (*self.answer, *self.after)


def _encode(
    encoder: ChatEncoder, chats: Sequence[Chat], loss_on: str, ids: Sequence[str], *, thinks: bool
) -> list[TokenizedRow]:
    plans = [_plan(encoder, messages, loss_on, thinks) for messages in chats]
    tokens_of = encoder.encode(piece for plan in plans for piece in plan.pieces)
    return [_row(plan, tokens_of, id) for plan, id in zip(plans, ids, strict=True)]


def _plan(encoder: ChatEncoder, messages: Chat, loss_on: str, thinks: bool) -> _Plan:
    turns = _turns(messages, loss_on)
    trained = [
        index
        for index, turn in enumerate(turns[:-1])
        if loss_on == "all" and turn.role == "assistant" and turn.trained
    ]
    chat = encoder.render(turns, trained)
    places = {place for span in chat.earlier for place in span}
    thinking = chat.thinking if thinks else None
    parts: list[_Part] = []
    for element in _elements(encoder, chat.before, thinking or ()):
        inside = [place for place in places if element.start < place < element.end]
        behind = encoder.last_of(chat.before[: element.start], [part.element for part in parts[-1:]])
        parts.append(_part(encoder, chat, element, behind, inside))
    end = next((item for item in encoder.elements(chat.after) if item.token is not None), None)
    after = chat.after if end is None else chat.after[: end.start]
    behind = encoder.last_of(chat.before, [part.element for part in parts])
    return _Plan(
        tuple(parts),
        tuple(encoder.pieces(chat.answer, behind, chat.spells)),
        tuple(encoder.pieces(after, "text", chat.spells)),
        encoder.end_of_text() if end is None or end.token is None else end.token,
        chat.earlier,
        turns[-1].trained,
        thinking,
    )


def _elements(encoder: ChatEncoder, text: str, cuts: Sequence[int]) -> Iterator[Element]:
    """The elements of a text, none of them over one of some places."""
    bounds = [0, *cuts, len(text)]
    for start, end in itertools.pairwise(bounds):
        for element in encoder.elements(text[start:end]):
            yield Element(start + element.start, start + element.end, element.token)


def _part(
    encoder: ChatEncoder, chat: RenderedChat, element: Element, behind: str, places: Sequence[int]
) -> _Part:
    """An element with the pieces of its text: those of a control token are none."""
    if element.token is not None:
        return _Part(element, cuts=dict.fromkeys(places, ((), ())))

    def pieces(start: int, end: int, behind: str) -> tuple[Piece, ...]:
        text = chat.before[start:end]
        if chat.spells:
            text = text.translate(chat.hidden)
        return tuple(encoder.pieces(text, behind, chat.spells))

    start, end = element.start, element.end
    cuts = {place: (pieces(start, place, behind), pieces(place, end, "text")) for place in places}
    return _Part(element, pieces(start, end, behind), cuts)


def _turns(messages: Chat, loss_on: str) -> list[Message]:
    turns = [message if isinstance(message, Message) else message_from_row(message) for message in messages]
    if not turns or turns[-1].role != "assistant":
        raise DataError(
            "the last turn is not the assistant's", fix="end the chat with the assistant's answer"
        )
    if loss_on not in ("last", "all"):
        raise DataError(f"loss_on: {loss_on!r} is not one of last, all", fix="choose one of them")
    if loss_on == "last" and not turns[-1].trained:
        raise DataError(
            "the last turn has weight 0, and only the last turn is trained",
            fix="drop the row, or train on all turns (loss_on: all)",
        )
    return turns


def _row(plan: _Plan, tokens_of: Mapping[Piece, list[int]], id: str) -> TokenizedRow:
    """Concatenate the tokens of a chat, and note where each trained content begins and ends."""

    def tokens(pieces: Iterable[Piece]) -> list[int]:
        return [token for piece in pieces for token in tokens_of[piece]]

    ids: list[int] = []
    starts: dict[int, int] = {}  # place in the text -> its first token
    ends: dict[int, int] = {}  # place in the text -> the token behind its last one
    stops: list[tuple[int, int]] = []  # (place behind a control token, the token behind it)
    for part in plan.parts:
        first = len(ids)
        starts[part.element.start] = ends[part.element.start] = first
        if part.element.token is not None:
            ids.append(part.element.token)
            for place in part.cuts:  # in white space that the token strips
                starts[place], ends[place] = len(ids), first
            stops.append((part.element.end, len(ids)))
            continue
        own = tokens(part.pieces)
        ids += own
        for place, (before, behind) in part.cuts.items():
            # A token over the place belongs to neither side.
            starts[place] = len(ids) - _common(own[::-1], tokens(behind)[::-1])
            ends[place] = first + _common(own, tokens(before))
    spans, trained = [], []
    for start, end in plan.earlier:
        stop = next((behind for place, behind in stops if place > end), ends[end])
        spans.append((starts[start], ends[end]))
        trained.append((starts[start], stop))
    answer = tokens(plan.answer)
    spans.append((len(ids), len(ids) + len(answer)))
    ids += [*answer, *tokens(plan.after), plan.stop]
    thinking = plan.thinking and (starts[plan.thinking[0]], starts[plan.thinking[1]])
    if plan.answer_is_trained:
        trained.append(((thinking or spans[-1])[0], len(ids)))
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in trained:
        mask[start:stop] = True
    return TokenizedRow(np.array(ids, dtype=np.int32), mask[1:], tuple(spans), id, thinking)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(a, b, strict=False)
    return next((index for index, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
