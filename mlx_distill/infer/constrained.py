"""Answers that always parse: after each token, which tokens may come next under the grammar of the answer.

llguidance keeps the state of each answer and says which tokens are allowed, one bit a token; the bits of a
step's rows are filled at once, on several threads. The grammar is the canonical JSON of
:func:`~mlx_distill.tasks.answer.dump_answer`, without other white space, so a model that was trained on this
form writes the same answer with and without it. Once the answer is complete only a stop token is allowed.
Text before the answer, such as thinking, is not constrained.

A generation that reaches ``max_tokens`` before its answer is complete does not parse: see ``finish``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int32

from mlx_distill.data.chat import answer_ids, stop_ids
from mlx_distill.data.chat_template import encoder_of
from mlx_distill.errors import ModelError
from mlx_distill.infer.channels import AnswerStart, channels_of
from mlx_distill.losses.token_bytes import Vocabulary, backend_of, vocabulary
from mlx_distill.models.forward import head_columns
from mlx_distill.tasks.grammar import JSON_OPTIONS, check_schema, grammar_schema
from mlx_distill.tasks.task import Task

__all__ = [
    "AnswerConstraint",
    "AnswerGrammar",
    "check_schema",
    "check_tokenizer",
    "fill_masks",
    "task_grammar",
]

_ALL = np.int32(-1)
_CACHED_TABLES = 4
_CACHED_GRAMMARS = 64
_CACHED_TEXTS = 4096
_CORES_OF_SERIAL = 2  # with no more, llguidance's threads only wait for those that compute the model
_CORES = os.cpu_count() or 1


class TokenTable:
    """A tokenizer's tokens as llguidance reads them.

    Control tokens (:mod:`mlx_distill.data.chat_template`), stop tokens, tokens without bytes and columns
    without a token are never part of an answer.

    Args:
        tokenizer: A transformers tokenizer or mlx-lm's wrapper of one, with a chat template.
        width: The columns of the logits.
        stop: The tokens that end an answer; the tokenizer's own where None.

    Raises:
        ModelError: the tokens do not name their bytes, or no column is a stop token.
    """

    def __init__(self, tokenizer: Any, width: int, stop: Collection[int] | None = None) -> None:
        from llguidance import LLTokenizer

        known = _bytes_of(tokenizer)
        self.stop = frozenset(stop_ids(tokenizer) if stop is None else stop)
        in_width = sorted(token for token in self.stop if token < width)
        if not in_width:
            raise ModelError(
                f"no token that ends an answer is among the {width} columns of the logits",
                fix="use the tokenizer that the model was trained with",
            )
        encoder = encoder_of(tokenizer)
        control = {encoder.added[content][0] for content in encoder.control} | self.stop
        control |= {
            number
            for content, (number, _) in encoder.added.items()
            if content in ("<think>", "</think>")  # may be ordinary tokens, and say where the answer begins
        }
        self.width = width
        self.tokens = [
            b"" if number in control or number in known.special else token
            for number, token in enumerate(known.tokens[:width])
        ]
        self.tokens += [b""] * (width - len(self.tokens))
        self.end = in_width[0]
        self.prefix_space = known.prefix_space and self._begins_with_space(tokenizer)
        self.channels = channels_of(tokenizer)
        self._tokenizer, self._encoder = tokenizer, encoder  # the encoder refers to its tokenizer weakly
        # The rows of a schema ask for the same texts: that of its names of properties, above all.
        self._encoded: Callable[[str | bytes], list[int]] = lru_cache(maxsize=_CACHED_TEXTS)(self._encode)
        self.ll = LLTokenizer(_Described(self))

    def _begins_with_space(self, tokenizer: Any) -> bool:
        ids = answer_ids(tokenizer, '{"a"')
        return bool(ids) and ids[0] < self.width and self.tokens[ids[0]].startswith(b" ")

    def encode(self, text: str | bytes) -> list[int]:
        """The tokens of a text within an answer: the tokenizer's own where they have the text's bytes, else
        the longest ones from left to right.

        llguidance asks where only one text may follow; its tokens are then the only ones allowed.
        """
        return list(self._encoded(text))

    def _encode(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        pieces = list(self._encoder.pieces(data.decode(), "text"))
        tokens_of = self._encoder.encode(pieces)
        ids = [token for piece in pieces for token in tokens_of[piece]]
        known = all(token < self.width for token in ids)
        return ids if known and b"".join(self.tokens[i] for i in ids) == data else self._longest_tokens(data)

    def _longest_tokens(self, data: bytes) -> list[int]:
        out: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._numbers), None)
            if end is None:  # a vocabulary without single bytes
                return out
            out.append(self._numbers[data[start:end]])
            start = end
        return out

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {token: number for number, token in enumerate(self.tokens) if token}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._numbers))

    def bits(self, tokens: Collection[int], allowed: bool = True) -> Int32[np.ndarray, " w"]:
        """A row of a mask with these tokens, or all that exist but these."""
        row = np.zeros(-(-self.width // 32) * 32, dtype=bool)
        if not allowed:
            row[: self.width] = True
        row[[token for token in tokens if token < self.width]] = allowed
        return np.packbits(row, bitorder="little").view(np.int32)


def _bytes_of(tokenizer: Any) -> Vocabulary:
    try:
        return vocabulary(tokenizer)
    except ModelError as error:
        raise ModelError(
            f"no grammar with this tokenizer: {error.message}",
            fix="decode without the grammar (--no-constrain)",
        ) from error


class _Described:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenTable) -> None:
        self.eos_token_id = table.end
        self.tokens = table.tokens
        self.special_token_ids = [number for number, token in enumerate(table.tokens) if not token]
        self.encode = table.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text)


_tables: dict[tuple[int, int, frozenset[int] | None], TokenTable] = {}


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer whose tokens do not name their bytes.

    Raises:
        ModelError: it is one.
    """
    _bytes_of(tokenizer)


def token_table(tokenizer: Any, width: int, stop: Collection[int] | None = None) -> TokenTable:
    """The :class:`TokenTable` of a tokenizer; cached, since building one takes about a second for 150,000
    tokens.
    """
    # An entry holds its tokenizer, so that no other object can get the same id.
    key = (id(backend_of(tokenizer)), width, None if stop is None else frozenset(stop))
    if key not in _tables:
        while len(_tables) >= _CACHED_TABLES:
            _tables.pop(next(iter(_tables)))
        _tables[key] = TokenTable(tokenizer, width, stop)
    return _tables[key]


class AnswerGrammar:
    """The grammar of a task's answers in the tokens of one model.

    Args:
        tokenizer: A transformers tokenizer or mlx-lm's wrapper of one, with a chat template.
        schema: The JSON schema of the answer; None for any JSON object.
        width: The columns of the logits that the masks are for
            (:func:`~mlx_distill.models.forward.head_columns`).
        stop: The tokens that may follow a complete answer, and end it; the tokenizer's own where None.

    Raises:
        ConfigError: a keyword that a grammar cannot enforce (:func:`check_schema`).
        ModelError: the tokens do not name their bytes.
    """

    def __init__(
        self,
        tokenizer: Any,
        schema: Mapping[str, Any] | None,
        width: int,
        stop: Collection[int] | None = None,
    ) -> None:
        self.table = token_table(tokenizer, width, stop)
        self.schema = schema
        self._text = json.dumps(schema)
        if schema is not None:
            check_schema(schema)

    def constraint(self, prompt: Sequence[int] = (), *, thinking: bool = False) -> AnswerConstraint:
        """The state of one answer, before its first token.

        Args:
            prompt: The tokens before it. Where they end within thinking, the answer begins behind it.
            thinking: Whether the model may think first though the prompt does not begin it.
        """
        matcher = _matcher(self.table, self._text).deep_copy()
        return AnswerConstraint(self, matcher, AnswerStart(self.table.channels, prompt), thinking)

    @cached_property
    def stop_row(self) -> Int32[np.ndarray, " w"]:
        """The mask behind a complete answer."""
        return self.table.bits(self.table.stop)

    @cached_property
    def free_row(self) -> Int32[np.ndarray, " w"]:
        """The mask within thinking: all tokens but those that end a generation."""
        channels = self.table.channels
        return self.table.bits(self.table.stop - {channels.closes if channels else -1}, allowed=False)

    def allows(self, tokens: Sequence[int], prompt: Sequence[int] = (), *, whole: bool = True) -> bool:
        """Whether the grammar allows the tokens, one after the other.

        Args:
            tokens: A generation without its stop token.
            prompt: The tokens before it.
            whole: They must be a complete answer; False for one that was cut.
        """
        constraint = self.constraint(prompt)
        return constraint.accept_all(tokens) and (constraint.done or not whole)


def task_grammar(model: Any, tokenizer: Any, task: Task) -> AnswerGrammar:
    """The grammar of a task's answers for a model.

    Args:
        model: mlx-lm's, whose logits have :func:`~mlx_distill.models.forward.head_columns` columns.
        tokenizer: Its tokenizer.
        task: Its schema.

    Raises:
        ConfigError, ModelError: as :class:`AnswerGrammar`.
    """
    return AnswerGrammar(tokenizer, task.schema, head_columns(model))


@lru_cache(maxsize=_CACHED_GRAMMARS)
def _matcher(table: TokenTable, schema_text: str) -> Any:
    """The initial state of a grammar, to copy."""
    from llguidance import LLMatcher

    asked = json.loads(schema_text)
    schema = {"type": "object"} if asked is None else grammar_schema(asked)
    if table.prefix_space:
        answer = json.dumps({"x-guidance": JSON_OPTIONS, **schema}, ensure_ascii=False)
        grammar = LLMatcher.grammar_from_lark(f"start: SPACE answer\nSPACE: /[ ]?/\nanswer: %json {answer}")
    else:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    matcher = LLMatcher(table.ll, grammar, log_level=0)
    if matcher.is_error():
        raise ModelError(
            f"no grammar with this tokenizer: {' '.join(matcher.get_error().split())[:200]}",
            fix="decode without the grammar (--no-constrain)",
        )
    return matcher


class AnswerConstraint:
    """The state of one answer under its grammar.

    Attributes:
        done: The answer is complete; only a stop token may follow.
    """

    def __init__(self, grammar: AnswerGrammar, matcher: Any, place: AnswerStart, thinking: bool) -> None:
        self.grammar = grammar
        self.matcher = matcher
        self.done = False
        self._place = place
        self._thinking = thinking
        self._count = 0

    @property
    def waiting(self) -> bool:
        """Whether the answer has not begun: the model thinks, or a header of its template comes next."""
        return self._place.start is None or bool(self._place.forced)

    @property
    def before_answer(self) -> Int32[np.ndarray, " w"]:
        """The mask while :attr:`waiting`."""
        forced = self._place.forced
        return self.grammar.table.bits(forced[:1]) if forced else self.grammar.free_row

    @property
    def may_open(self) -> frozenset[int]:
        """The tokens that open thinking, where they may come next."""
        channels = self.grammar.table.channels
        may = channels is not None and self._thinking and not self._count and not self.waiting
        return channels.opens if channels is not None and may else frozenset()

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        if self.done:
            return token in self.grammar.table.stop
        if self._place.forced:
            return token == self._place.forced[0]
        if self.waiting:
            return self._place.ends(token) is False or token not in self.grammar.table.stop
        return token in self.may_open or self.matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        """Take the token that was chosen. Tokens behind a complete answer change nothing: engines that run
        one token ahead compute them.

        Raises:
            ModelError: the mask did not allow the token.
        """
        if self.done:
            return
        before = self.waiting or token in self.may_open
        self._place.accept(token)
        self._count += 1
        if before:
            return
        if not self.matcher.consume_token(token):
            raise ModelError(
                f"token {token} does not continue the answer: {_line(self.matcher.get_error())}",
                fix="choose tokens under the mask of fill_masks",
            )
        self.done = bool(self.matcher.is_accepting())

    def accept_all(self, tokens: Sequence[int]) -> bool:
        """Take tokens as far as they are allowed, and return whether all were."""
        for token in tokens:
            if self.done or not self.allows(token):
                return False
            try:
                self.accept(token)
            except ModelError:  # llguidance gave up
                return False
        return True


def fill_masks(
    constraints: Sequence[Any], mask: Int32[np.ndarray, "b w"], *, parallel: bool | None = None
) -> dict[int, ModelError]:
    """Fill the mask of each row's next token, in place: bit ``v % 32`` of word ``v // 32`` is set where token
    ``v`` is allowed.

    Args:
        constraints: An :class:`AnswerConstraint` a row, or None, which allows all.
        mask: C-contiguous, of at least as many columns as the grammars' tables.
        parallel: Fill the rows on several threads; where None on machines with more than two cores.

    Returns:
        The errors of the rows that llguidance gave up on, whose masks allow all. An answer that went on under
        such a mask would not be one of the grammar: it is to be ended.
    """
    errors: dict[int, ModelError] = {}
    matchers = []
    for row, constraint in enumerate(constraints):
        if constraint is None:
            mask[row] = _ALL
        elif constraint.done:
            mask[row] = constraint.grammar.stop_row
        elif constraint.waiting:
            mask[row] = constraint.before_answer
        else:
            matchers.append((constraint.matcher, row))
    if len(matchers) > 1 and (_CORES > _CORES_OF_SERIAL if parallel is None else parallel):
        from llguidance.numpy import fill_next_token_bitmask_par

        fill_next_token_bitmask_par(_executor(), matchers, mask)
    elif matchers:
        from llguidance.numpy import fill_next_token_bitmask

        for matcher, row in matchers:
            fill_next_token_bitmask(matcher, mask, row)
    for matcher, row in matchers:
        if matcher.is_error():
            mask[row] = _ALL
            errors[row] = ModelError(
                f"the grammar of the answer has no next token: {_line(matcher.get_error())}",
                fix="make the schema simpler, or decode without the grammar (--no-constrain)",
            )
            continue
        constraint = constraints[row]
        if constraint is not None and constraint.may_open:
            mask[row] |= constraint.grammar.table.bits(constraint.may_open)
    return errors


@lru_cache(maxsize=1)
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def _line(text: str) -> str:
    return " ".join(text.split("<state>")[0].split())[:200]
