"""The distribution over a task's labels behind a prompt, and where the label stands in an answer's tokens.

Where the labels' first tokens differ, one forward pass gives the distribution. The further nodes of a
:class:`~mlx_distill.losses.labels.LabelTrie` are short continuations of the prompt, which is read once: each
goes on from a copy of the cache of the node before it (:func:`~mlx_distill.infer.kv_cache.continue_from`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.data.chat import answer_ids
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.infer.kv_cache import (
    Caches,
    continue_from,
    fork,
    forward,
    merge,
    pad_right,
    read,
    row_cache,
)
from mlx_distill.infer.shared_prefix import SharedPrefix
from mlx_distill.losses.labels import (
    LabelStrings,
    LabelTrie,
    class_logprobs,
    label_logprobs,
    label_strings,
    label_trie,
)
from mlx_distill.losses.numerics import log_softmax
from mlx_distill.models.forward import embedding_rows, hidden_states, logits
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.tasks.answer import label_prefix
from mlx_distill.tasks.task import Task

# From hidden states to logits.
Project = Callable[[mx.array], mx.array]


def label_probabilities(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: LabelTrie,
    *,
    batch_size: int = 16,
    prefix: SharedPrefix | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n c"]:
    """The distribution over the labels behind each prompt, which is read once; what all prompts begin with is
    read once for all of them.

    A label has the product, over the nodes on its path, of the mass of the tokens that count for its branch
    (:func:`~mlx_distill.losses.labels.label_logprobs`), renormalised over the labels.

    Args:
        model: An mlx-lm model with trunk ``model.model``.
        prompts: Token ids that end at the root of ``labels``.
        labels: From :func:`label_prefix_tokens`, with this model's tokenizer.
        batch_size: Prompts a forward pass.
        prefix: Of an earlier call with the same model, whose prompts begin alike.
        on_done: Called after each batch with the number of prompts scored so far.

    Returns:
        Probabilities that sum to 1 in each row, in the order of ``labels.labels``.

    Raises:
        ModelError: a token of a prompt is beyond the model's embedding.
    """
    paths = [node.path for node in labels.nodes if node.path]
    check_token_ids([max(tokens) for tokens in [*prompts, *paths]], embedding_rows(model))

    def score(hidden: mx.array, caches: Caches) -> mx.array:
        return continued_label_logprobs(model, labels, logits(model, hidden), caches)

    scores = _score_batches(model, prompts, len(labels.labels), score, batch_size, prefix, on_done)
    return np.exp(scores, dtype=np.float32)


def label_string_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    strings: LabelStrings,
    *,
    batch_size: int = 16,
    prefix: SharedPrefix | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n c"]:
    """The log-probability of each whole label behind each prompt: the sum over its tokens, with the one that
    closes its quote, over the whole vocabulary and not renormalised.

    The arguments are those of :func:`label_probabilities`; the prompts end with ``strings.before``.
    """
    check_token_ids([max(tokens) for tokens in [*prompts, *strings.paths]], embedding_rows(model))

    def score(hidden: mx.array, caches: Caches) -> mx.array:
        first, columns = log_softmax(logits(model, hidden)), []
        for path in strings.paths:
            total = first[:, path[0]]
            if len(path) > 1:
                inputs = np.tile(np.array(path[:-1], dtype=np.int32), (len(first), 1))
                lengths = [len(path) - 1] * len(first)
                behind = forward(partial(hidden_states, model), fork(caches), inputs, lengths)
                z = log_softmax(logits(model, behind))
                total = total + z[:, mx.arange(len(path) - 1), mx.array(path[1:])].sum(axis=-1)
            mx.eval(total)  # so that the logits of one label exist at a time
            columns.append(total)
        return mx.stack(columns, axis=-1)

    return _score_batches(model, prompts, len(strings.paths), score, batch_size, prefix, on_done)


def _score_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    columns: int,
    score: Callable[[mx.array, Caches], mx.array],
    batch_size: int,
    prefix: SharedPrefix | None,
    on_done: Callable[[int], None] | None,
) -> Float[np.ndarray, "n c"]:
    """``score(hidden [b, d], caches)`` of prompts of similar length together, in the prompts' order."""
    out = np.zeros((len(prompts), columns), dtype=np.float32)
    prefix = prefix or SharedPrefix(model)
    if prompts:
        prefix.prepare(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        out[rows] = np.array(score(*prefix.read([prompts[i] for i in rows])))
        if on_done is not None:
            on_done(start + len(rows))
    return out


def prompt_label_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: LabelTrie,
    *,
    rest: bool = False,
    cached: bool = True,
    project: Project | None = None,
) -> Float[mx.array, "b c"]:
    """Log-probabilities of the labels behind some prompts, in one batch.

    Args:
        model: An mlx-lm model.
        prompts: Token ids that end at the root of ``labels``.
        labels: The trie for this model's tokenizer.
        rest: Add a last class for everything else, instead of renormalising over the labels.
        cached: Read each prompt once. Else each further node costs one more pass over the prompts.
        project: To the logits; the model's own where None.
    """
    project = project or partial(logits, model)
    if len(labels.nodes) > 1 and cached:
        caches = merge([row_cache(model)] * len(prompts))
        at_root = project(read(model, caches, prompts))
        return continued_label_logprobs(model, labels, at_root, caches, rest=rest, project=project)
    branches = {}
    for number, node in enumerate(labels.nodes):
        z = project(_last_hidden(model, [[*prompt, *node.path] for prompt in prompts]))
        if len(labels.nodes) == 1:
            return label_logprobs(z, node, rest=rest)
        branches[number] = label_logprobs(z, node, rest=True)
        mx.eval(branches[number])
    return _whole_labels(labels, branches, rest)


def continued_label_logprobs(
    model: Any,
    labels: LabelTrie,
    at_root: Float[mx.array, "b v"],
    caches: Caches,
    *,
    rest: bool = False,
    project: Project | None = None,
) -> Float[mx.array, "b c"]:
    """Log-probabilities of the labels, from a cache that ends at their root and is left as it is.

    Args:
        model: An mlx-lm model.
        labels: The trie for this model's tokenizer.
        at_root: The logits there.
        caches: Of the prompts: a batch cache of :mod:`mlx_distill.infer.kv_cache`.
        rest: Add a last class for everything else, instead of renormalising over the labels.
        project: To the logits; the model's own where None.
    """
    if len(labels.nodes) == 1:
        return label_logprobs(at_root, labels.nodes[0], rest=rest)
    project = project or partial(logits, model)
    branches: dict[int, mx.array] = {}

    def visit(number: int, z: mx.array, caches: Caches) -> None:
        node = labels.nodes[number]
        branches[number] = label_logprobs(z, node, rest=True)
        mx.eval(branches[number])  # so that the logits of one node exist at a time
        for child in (labels.children.get((number, k)) for k in range(len(node.branches))):
            if child is not None:
                path = mx.array(labels.nodes[child].path[len(node.path) :], dtype=mx.int32)
                hidden, behind = continue_from(model, caches, mx.broadcast_to(path, (z.shape[0], path.size)))
                visit(child, project(hidden), behind)

    visit(0, at_root, caches)
    return _whole_labels(labels, branches, rest)


def _whole_labels(labels: LabelTrie, branches: Mapping[int, mx.array], rest: bool) -> mx.array:
    logprobs = class_logprobs(labels, branches)
    if rest:
        return logprobs
    return logprobs[:, :-1] - mx.logsumexp(logprobs[:, :-1], axis=-1, keepdims=True)


def _last_hidden(model: Any, prompts: Sequence[Sequence[int]]) -> mx.array:
    # Padding follows the prompts, where the causal mask hides it; the head sees one position a row.
    ends = mx.array([len(prompt) - 1 for prompt in prompts])
    return hidden_states(model, mx.array(pad_right(prompts)))[mx.arange(len(prompts)), ends]


def label_place(
    tokens: Sequence[int], start: int, before: Sequence[int], labels: LabelTrie
) -> tuple[int, int] | None:
    """The position of the first token behind the root of the labels, and the last node that the answer
    reaches; None where the answer does not begin as the labels have it.

    Args:
        tokens: A chat's token ids.
        start: Where the answer begins.
        before: The tokens of :func:`~mlx_distill.tasks.answer.label_prefix`.
        labels: The trie for the same tokenizer.

    >>> from mlx_distill.losses.labels import LabelNode
    >>> label_place([9, 9, 1, 2, 7, 8], 2, [1, 2], LabelTrie(("a", "b"), (LabelNode((), (), ()),)))
    (4, 0)
    """
    prompt = labels.prompt(before)
    root = start + len(prompt)
    if list(tokens[start:root]) != prompt:
        return None
    behind = tuple(tokens[root:])
    reached = [n for n, node in enumerate(labels.nodes) if behind[: len(node.path)] == node.path != behind]
    return (root, reached[-1]) if reached else None


def task_label_trie(tokenizer: Any, task: Task) -> LabelTrie:
    """The trie of a task's labels, as a tokenizer writes them in an answer.

    Raises:
        ConfigError: the task has no label.
        ModelError: the tokens do not name their bytes, or cannot write a label.
    """
    return label_trie(tokenizer, task.labels, partial(answer_ids, tokenizer), **_around_label(task))


def task_label_strings(tokenizer: Any, task: Task) -> LabelStrings:
    """A task's labels as whole sequences of tokens; errors as in :func:`scored_labels`."""
    scored_labels(tokenizer, task)
    return label_strings(tokenizer, task.labels, partial(answer_ids, tokenizer), **_around_label(task))


def _around_label(task: Task) -> dict[str, str]:
    """What an answer has before and behind its label, where that is the first property."""
    if task.label is None:
        raise ConfigError(
            f"the task {task.name!r} has no label", fix="name the field with the classes as label in the task"
        )
    after = '"}' if list(task.schema["properties"])[-1] == task.label else '", "'
    return {"before": label_prefix({"properties": {task.label: {}}}, task.label), "after": after}


def find_label_trie(tokenizer: Any, task: Task, label_weight: float = 0.0) -> LabelTrie | None:
    """:func:`task_label_trie`; None for a task without a label, and where there is no trie and no label loss
    is asked for.

    Args:
        tokenizer: The model's.
        task: Its schema and label.
        label_weight: Of ``distill``.

    Raises:
        ModelError: ``label_weight`` is above 0, and the tokenizer has no trie.
    """
    if task.label is None:
        return None
    try:
        return task_label_trie(tokenizer, task)
    except (ConfigError, ModelError) as error:
        if label_weight > 0:
            raise ModelError(
                f"no distribution over the labels, which distill.label_weight {label_weight:g} needs: "
                f"{error.message}",
                fix=f"{error.fix}; or set distill.label_weight: 0",
            ) from error
        return None


LabelPrefix = tuple[list[int], LabelTrie]


def label_prefix_tokens(
    tokenizer: Any, task: Task, note: Callable[[str], None] | None = None
) -> LabelPrefix | None:
    """The tokens that every answer begins with up to the root of the labels, and the labels there.

    None where labels are not scored: the task has none, it is not the answer's first property, or the
    tokenizer cannot write it.

    Args:
        tokenizer: The model's.
        task: Its schema and label.
        note: Called with the reason, where the task has a label.
    """
    if task.label is None:
        return None
    try:
        return scored_labels(tokenizer, task)
    except (ConfigError, ModelError) as error:
        if note is not None:
            note(f"no distribution over the labels, only answers as text: {error.message}")
        return None


def scored_labels(tokenizer: Any, task: Task) -> LabelPrefix:
    """As :func:`label_prefix_tokens`, and an error where labels cannot be scored.

    Raises:
        ConfigError: the task has no label, or it is not the answer's first property: what stands before it
            would have to be generated first.
        ModelError: the tokenizer cannot write it.
    """
    check_label_place(task)
    labels = task_label_trie(tokenizer, task)
    return labels.prompt(answer_ids(tokenizer, label_prefix(task.schema, task.label or ""))), labels


def check_label_place(task: Task) -> None:
    """Refuse a task whose labels have no distribution before an answer is generated.

    Raises:
        ConfigError: it has no label, or the label is not the answer's first property.
    """
    first = next(iter(task.schema["properties"]))
    if task.label is None:
        raise ConfigError(
            f"the task {task.name!r} has no label", fix="name the field with the classes as label in the task"
        )
    if first != task.label:
        raise ConfigError(
            f"{task.label!r} is not the first property of the schema, so it has no distribution before the "
            f"answer's {first!r} is generated",
            fix=f"make {task.label!r} the first property and train on such answers; or let the model "
            "generate whole answers: md.analyze, or analyze without --labels-only",
        )
