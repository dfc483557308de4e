"""A model's distributions over single values along a given answer: a field, a character of a number, an item
of a list. What stands before the value is the answer's own text, so each distribution is conditional on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.data.chat import render_many
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.infer.kv_cache import forward, pad_right
from mlx_distill.infer.shared_prefix import SharedPrefix
from mlx_distill.losses.labels import LabelNode, label_logprobs
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.forward import hidden_states, logits
from mlx_distill.tasks.answer import dump_answer

_NAME = re.compile(r"(\w+)(?:\[(\d+)\])?")


@dataclass(frozen=True)
class ValueReadings:
    """What :func:`read_values` found.

    Attributes:
        distributions: By name of the value, for each answer the probabilities of its values and, last, of
            everything else; NaN where the value does not begin at a token's beginning.
        logprobs: The log-probability of each whole answer with its stop token.
        tokens: The number of tokens of each.
    """

    distributions: Mapping[str, Float[np.ndarray, "n c"]]
    logprobs: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, " n"]

    @property
    def missing(self) -> int:
        """How many distributions there are not."""
        return int(sum(np.isnan(table[:, 0]).sum() for table in self.distributions.values()))


def value_offset(answer: Mapping[str, Any], name: str, schema: Mapping[str, Any]) -> int | None:
    """The number of bytes before a value in the canonical text of an answer, its opening quote among them;
    None for a character or item that the answer does not have.

    Args:
        answer: The answer.
        name: A field, or ``field[i]``: item i of a list, character i of a number or text.
        schema: The task's; the order of its properties is that of the text.

    Raises:
        ConfigError: the answer has no such field.

    >>> answer = {"kind": "ham", "score": 85, "tags": ["a", "b"]}
    >>> text = dump_answer(answer, {})
    >>> [text[value_offset(answer, name, {}):][:3] for name in ("kind", "score[1]", "tags[1]")]
    ['ham', '5, ', 'b"]']
    """
    match = _NAME.fullmatch(name)
    field, index = (match[1], match[2]) if match else (name, None)
    if field not in answer:
        raise ConfigError(f"no value {name!r} in the answer", fix="name a field, or field[i]")
    order = [key for key in schema.get("properties", answer) if key in answer]
    before = {key: answer[key] for key in order[: order.index(field)]}
    start = dump_answer(before, schema)[:-1] + (", " if before else "") + json.dumps(field) + ": "
    value = answer[field]
    if isinstance(value, list) and index is not None:
        if int(index) >= len(value):
            return None
        start += json.dumps(value[: int(index)], ensure_ascii=False)[:-1] + (", " if int(index) else "")
        value, index = value[int(index)], None
    quoted = isinstance(value, str)
    text = json.dumps(value, ensure_ascii=False)[quoted : -1 if quoted else None]
    if index is not None and int(index) >= len(text):
        return None
    return len((start + '"' * quoted + text[: int(index or 0)]).encode())


def value_nodes(tokenizer: Any, values: Mapping[str, Sequence[str]]) -> dict[str, LabelNode]:
    """For each named value the tokens that begin each of its values, and no other of them.

    Args:
        tokenizer: The model's.
        values: Name of the value to its values: texts, which end at a quote, or single digits, which do not.

    Raises:
        ModelError: a value that no token begins alone.
    """
    spelled = vocabulary(tokenizer).tokens
    out = {}
    for name, texts in values.items():
        ends = [text.encode() if text.isdigit() else f'{text}"'.encode() for text in texts]
        ids: list[list[int]] = [[] for _ in ends]
        for token, data in enumerate(spelled):
            fits = [
                i for i, end in enumerate(ends) if data and (end.startswith(data) or data.startswith(end))
            ]
            if len(fits) == 1:
                ids[fits[0]].append(token)
        if not all(ids):
            text = texts[[bool(found) for found in ids].index(False)]
            raise ModelError(
                f"no token begins {text!r} and no other value of {name}", fix="read whole labels instead"
            )
        branches = tuple((i,) for i in range(len(texts)))
        out[name] = LabelNode((), branches, tuple(map(tuple, ids)))
    return out


def read_values(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    answers: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    values: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 64,
) -> ValueReadings:
    """A model's distributions over some values along given answers; what all chats begin with is read once.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        chats: Messages, the canonical text of the answer last.
        answers: These answers, parsed.
        schema: Of the answers.
        values: Name of the value (see :func:`value_offset`) to its values.
        batch_size: Chats a forward pass.
    """
    model.eval()
    rendered = render_many(tokenizer, chats)
    tokens = [row.tokens.tolist() for row in rendered]
    starts = [row.spans[-1][0] for row in rendered]
    nodes = value_nodes(tokenizer, values)
    spelled = vocabulary(tokenizer).tokens
    distributions = {name: np.full((len(chats), len(texts) + 1), np.nan) for name, texts in values.items()}
    logprobs = np.zeros(len(chats))
    prefix = SharedPrefix(model)
    shared = prefix.prepare([ids[: start - 1] for ids, start in zip(tokens, starts, strict=True)])
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        inputs = pad_right([tokens[i][shared:] for i in rows])
        lengths = [len(tokens[i]) - shared for i in rows]
        hidden = forward(partial(hidden_states, model), prefix.caches(len(rows)), inputs, lengths)
        for line, i in enumerate(rows):
            answer = np.arange(starts[i], len(tokens[i]))
            z = logits(model, hidden[line, mx.array(answer - 1 - shared)])
            own = mx.take_along_axis(z, mx.array(tokens[i])[mx.array(answer)][:, None], axis=1)[:, 0]
            logprobs[i] = float((own - mx.logsumexp(z, axis=1)).sum())
            ends = np.cumsum([0, *(len(spelled[token]) for token in tokens[i][starts[i] : -1])]).tolist()
            for name, node in nodes.items():
                offset = value_offset(answers[i], name, schema)
                if offset in ends:
                    at = label_logprobs(z[ends.index(offset)], node, rest=True)
                    distributions[name][i] = np.exp(np.array(at))
    counts = np.array([len(ids) - start for ids, start in zip(tokens, starts, strict=True)], dtype=float)
    return ValueReadings(distributions, logprobs, counts)
