"""How far a quantized model is from the model that it was made from, on rows that it was not fitted to.

The reference runs once: its last hidden states are kept, in memory or on disk, with its output head. Each
quantized model then runs over the same tokens. So two models need not fit into memory at once, and the
divergence is over the whole vocabulary, exactly, without a file of logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.data.chat import answer_ids, render_many
from mlx_distill.distill.teacher import TokenizedAnswer, answer_label_place
from mlx_distill.errors import DataError
from mlx_distill.infer.label_scoring import Project, prompt_label_logprobs
from mlx_distill.losses.labels import LabelTrie, label_logprobs
from mlx_distill.losses.output_head import project
from mlx_distill.models.forward import embedding_rows, head, head_columns, hidden_states, logits, softcap
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.storage.array_store import Store, StoreWriter
from mlx_distill.tasks.task import Task


@dataclass(frozen=True)
class QuantizationError:
    """The distance of a quantized model from its reference.

    Attributes:
        kl: KL(reference || quantized) in nats a token, over all tokens of the rows.
        answer_kl: The same over the tokens of the answers, with the token that ends each.
        flips: Rows whose most probable label is another one; 0 where no row has a label.
        tokens: Tokens that ``kl`` is the mean of: all but the first of each row.
        answer_tokens: Tokens that ``answer_kl`` is the mean of.
        rows: Rows.
        labelled: Rows that ``flips`` is counted over.
    """

    kl: float
    answer_kl: float
    flips: int
    tokens: int
    answer_tokens: int
    rows: int
    labelled: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ReferenceOutputs:
    """What :func:`quantization_error` needs of the reference model.

    Attributes:
        hidden: For each row its last hidden states ``[tokens - 1, d]``: an array, or one in a store.
        project: From hidden states to float32 logits, by the reference's own head.
        choices: For each row the number of its most probable label; None where it has none.
    """

    hidden: Sequence[mx.array]
    project: Project
    choices: Sequence[int | None]


def quantization_error(
    reference: Any,
    model: Any,
    answers: Sequence[TokenizedAnswer],
    *,
    labels: LabelTrie | None = None,
    batch_size: int = 16,
    max_logits: int = 1 << 23,
) -> QuantizationError:
    r"""The KL divergence of a quantized model from its reference, and the labels that quantizing flips.

    .. math:: \frac{1}{N} \sum_{i,t} \sum_v p_{it}(v) \log \frac{p_{it}(v)}{q_{it}(v)}

    with p of the reference and q of the quantized model, given the tokens before it, over every token t but
    the first of each row i: prompt and answer. Rows are padded to batches; padding counts nowhere. Logits are
    computed a few positions at a time.

    Args:
        reference: The unquantized model, or what :func:`reference_outputs` kept of it.
        model: The quantized model, with the same vocabulary.
        answers: Rendered rows, see :func:`tokenized_answers`.
        labels: The task's labels in these tokens; None counts no flips.
        batch_size: Rows a forward pass.
        max_logits: Numbers of logits that exist at the same time, of each of the two models.

    Raises:
        DataError: there are no rows.
        ModelError: a token beyond the model's embedding.
    """
    if not isinstance(reference, ReferenceOutputs):
        reference = reference_outputs(reference, answers, labels=labels, batch_size=batch_size)
    sums = np.zeros(2)
    flips = labelled = 0
    own = partial(logits, model)
    positions = max(1, max_logits // max(head_columns(model), 1))
    for rows, hidden in _batches(model, answers, batch_size):
        batch = [answers[i] for i in rows]
        lengths = [len(answer.tokens) - 1 for answer in batch]
        real = mx.concatenate([line[:length] for line, length in zip(hidden, lengths, strict=True)])
        expected = mx.concatenate([reference.hidden[i] for i in rows])
        kl = _divergence(expected, reference.project, real, own, positions)
        for part, answer in zip(np.split(kl, np.cumsum(lengths)[:-1]), batch, strict=True):
            sums += part.sum(dtype=np.float64), part[answer.start - 1 :].sum(dtype=np.float64)
        chosen = zip(_choices(model, own, hidden, batch, labels), rows, strict=True)
        pairs = [(choice, reference.choices[i]) for choice, i in chosen if choice is not None]
        labelled += len(pairs)
        flips += sum(choice != expected for choice, expected in pairs)
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    answered = sum(len(answer.tokens) - answer.start for answer in answers)
    return QuantizationError(
        float(sums[0] / tokens), float(sums[1] / answered), flips, tokens, answered, len(answers), labelled
    )


def reference_outputs(
    model: Any,
    answers: Sequence[TokenizedAnswer],
    *,
    labels: LabelTrie | None = None,
    batch_size: int = 16,
    folder: Path | None = None,
) -> ReferenceOutputs:
    """Run the reference once, and keep its last hidden states, its head and the labels that it chooses.

    Args:
        model: The unquantized model. Later changes of it do not change the result.
        answers: Rendered rows.
        labels: The task's labels in these tokens, or None.
        batch_size: Rows a forward pass.
        folder: Where the hidden states are written; None keeps them in memory. They take ``tokens x width``
            numbers of the model's type.

    Raises:
        DataError: there are no rows.
        ModelError: a token beyond the model's embedding.
    """
    layer, cap = copy.copy(head(model)), softcap(model)

    def own(hidden: mx.array) -> mx.array:
        return project(layer, hidden, cap).astype(mx.float32)

    states: dict[int, mx.array] = {}
    choices: list[int | None] = [None] * len(answers)
    with ExitStack() as stack:
        writer = stack.enter_context(StoreWriter(folder)) if folder is not None else None
        order: list[int] = []
        for rows, hidden in _batches(model, answers, batch_size):
            batch = [answers[i] for i in rows]
            for i, choice in zip(rows, _choices(model, own, hidden, batch, labels), strict=True):
                choices[i] = choice
            for line, i in zip(hidden, rows, strict=True):
                states[i] = mx.contiguous(line[: len(answers[i].tokens) - 1])
                mx.eval(states[i])
                if writer is not None:
                    writer.append(hidden=_bits(states.pop(i)))
            order += rows
    if folder is None:
        return ReferenceOutputs([states[i] for i in range(len(answers))], own, choices)
    dtype = hidden.dtype
    store = Store(folder, lambda hidden: mx.array(hidden).view(dtype))
    place = {i: number for number, i in enumerate(order)}
    return ReferenceOutputs(_Ordered(store, [place[i] for i in range(len(answers))]), own, choices)


def tokenized_answers(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    task: Task | None = None,
    labels: LabelTrie | None = None,
    *,
    max_length: int = 0,
) -> list[TokenizedAnswer]:
    """Prepared rows in a model's tokens, with the places of their answers and labels.

    Args:
        tokenizer: The model's.
        rows: Prepared rows: ``id`` and ``messages``, the answer last. Of a model that thinks an answer begins
            with its thinking, where the row has it.
        task: With ``labels``: the answers' schema.
        labels: The labels in the model's tokens; None for no places of labels.
        max_length: Longer rows are left out; 0 keeps all.
    """
    rows = list(rows)
    encode = partial(answer_ids, tokenizer)
    out = []
    for row, chat in zip(rows, render_many(tokenizer, [row["messages"] for row in rows]), strict=True):
        if max_length and len(chat) > max_length:
            continue
        tokens, text = chat.tokens.tolist(), row["messages"][-1]["content"]
        answer, place = chat.spans[-1][0], None
        if task is not None:
            place = answer_label_place(tokens, answer, text, task, encode, labels)
        out.append(TokenizedAnswer(tokens, chat.start, place and place[0], str(row.get("id", "")), text))
    return out


@dataclass(frozen=True)
class _Ordered(Sequence[mx.array]):
    """The rows of a store in another order."""

    store: Store[mx.array]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: Any) -> Any:
        return self.store[self.places[row]]


def _bits(value: mx.array) -> np.ndarray:
    """An array for a store; numpy has no bfloat16, so halves are written as their bits."""
    return np.array(value if value.dtype == mx.float32 else value.view(mx.uint16))


def _batches(
    model: Any, answers: Sequence[TokenizedAnswer], batch_size: int
) -> Iterator[tuple[list[int], Float[mx.array, "b l d"]]]:
    """Rows of about equal length, and their last hidden states; padding stands behind each row, where the
    causal mask hides it.
    """
    if not answers:
        raise DataError("no rows to measure the quantized model on", fix="give validation rows")
    check_token_ids([max(answer.tokens) for answer in answers], embedding_rows(model))
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].tokens), reverse=True)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        inputs = np.zeros((len(rows), len(answers[rows[0]].tokens)), dtype=np.int32)
        for line, i in zip(inputs, rows, strict=True):
            line[: len(answers[i].tokens)] = answers[i].tokens
        hidden = hidden_states(model, mx.array(inputs))
        mx.eval(hidden)
        yield rows, hidden


def _divergence(
    reference: Float[mx.array, "n d"],
    of_reference: Project,
    hidden: Float[mx.array, "n e"],
    own: Project,
    positions: int,
) -> Float[np.ndarray, " n"]:
    """KL(reference || model) at each position, computed ``positions`` at a time."""
    on_host = mx.default_device() == mx.cpu  # where NumPy's exp takes a tenth of the time of MLX's
    xp: Any = np if on_host else mx
    out = []
    for first in range(0, len(hidden), positions):
        at = slice(first, first + positions)
        z_p, z_q = of_reference(reference[at]), own(hidden[at])
        if on_host:
            z_p, z_q = np.array(z_p), np.array(z_q)
        z_p, z_q = (z - xp.max(z, axis=-1, keepdims=True) for z in (z_p, z_q))
        e_p = xp.exp(z_p)
        sum_p, sum_q = xp.sum(e_p, axis=-1), xp.sum(xp.exp(z_q), axis=-1)
        kl = xp.sum(e_p * (z_p - z_q), axis=-1) / sum_p - xp.log(sum_p) + xp.log(sum_q)
        out.append(np.array(kl))
    return np.concatenate(out)


def _choices(
    model: Any,
    own: Project,
    hidden: Float[mx.array, "b l d"],
    batch: Sequence[TokenizedAnswer],
    labels: LabelTrie | None,
) -> list[int | None]:
    """The most probable label of each row."""
    out: list[int | None] = [None] * len(batch)
    at = [(k, answer.label_start) for k, answer in enumerate(batch) if answer.label_start is not None]
    if labels is None or not at:
        return out
    rows, starts = (mx.array(column) for column in zip(*at, strict=True))
    if len(labels.nodes) == 1:
        scores = label_logprobs(own(hidden[rows, starts - 1]), labels.nodes[0])
    else:
        scores = prompt_label_logprobs(model, [batch[k].tokens[:start] for k, start in at], labels)
    best: Int[np.ndarray, " b"] = np.array(mx.argmax(scores, axis=-1))
    for (k, _), label in zip(at, best.tolist(), strict=True):
        out[k] = int(label)
    return out
