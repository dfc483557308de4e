"""A task's labels scored behind prompts: by which score, over which orders of the options, how calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mlx_distill.data.rows import Item
from mlx_distill.errors import ConfigError
from mlx_distill.infer.label_scoring import (
    check_label_place,
    label_probabilities,
    label_string_logprobs,
    scored_labels,
    task_label_strings,
)
from mlx_distill.infer.label_temperature import SMALLEST, read_label_temperature, usable_temperature
from mlx_distill.infer.long_items import CutItem
from mlx_distill.infer.predict import BAD_ROW
from mlx_distill.infer.shared_prefix import SharedPrefix
from mlx_distill.losses.numerics import check_temperature
from mlx_distill.metrics.calibration import scale
from mlx_distill.records import Classification, Prediction
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import thinking_budget

NORMALIZATIONS = ("none", "string", "tokens", "bytes")


@dataclass(frozen=True)
class LabelOptions:
    """How labels are scored.

    Attributes:
        normalize: One of :data:`NORMALIZATIONS`; see :class:`LabelScorer`.
        shuffle_options: The number of orders in which the prompt lists the labels, at most all that there
            are; 1 for the schema's own.
        seed: Of the orders.
        temperature: By which scores are divided; None for that of the model's folder, else 1.
    """

    normalize: str = "none"
    shuffle_options: int = 1
    seed: int = 0
    temperature: float | None = None


class LabelScorer:
    r"""The distribution over a task's labels behind prompts.

    A label's score is, by ``normalize``:

    ``none``
        the log-probability that the answer takes this label's way at every place where labels part: the
        ``label_probs`` of every evaluation (:func:`~mlx_distill.infer.label_scoring.label_probabilities`);
    ``string``
        :math:`\sum_t \log p(t)` over all tokens of the label with its closing quote (``acc`` of lm-eval);
    ``tokens``
        the same divided by the number of these tokens;
    ``bytes``
        the same divided by the label's bytes with the quote (lm-eval's ``acc_norm`` divides by the length of
        the choice's text; it favours no label for being short, and long ones whose end is certain).

    The probabilities are ``softmax(score / T)``. With several orders of the options the scores of each order
    are normalised to log-probabilities and averaged: what a model adds to a label's logit for its place in
    the list cancels where each label has each place equally often, as in as many orders as there are labels.
    Source: Zheng et al. 2024, https://arxiv.org/abs/2309.03882 (cyclic permutations).

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        task: Its label is the first property of the schema.
        options: Which score, how many orders, which temperature.
        batch_size: Prompts a forward pass.

    Raises:
        ConfigError: the task has no label, or it is not the answer's first property; a model that thinks
            first; an unknown ``normalize``; several orders, and the prompt has no place for the list of
            labels.
        ModelError: the tokenizer cannot write the labels.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        options: LabelOptions | None = None,
        *,
        batch_size: int = 16,
    ) -> None:
        options = options or LabelOptions()
        check_label_options(task, options)
        if thinking_budget(tokenizer):
            raise ConfigError(
                "the model thinks before it answers, so its labels cannot be scored right behind a prompt",
                fix="let it answer: evaluate and analyze read its label probabilities behind its thinking",
            )
        self.model, self.task, self.batch_size = model, task, batch_size
        self.normalize, self.temperature = options.normalize, options.temperature or 1.0
        count = options.shuffle_options
        self.shuffled = count > 1
        orders = label_orders(task.labels, count, options.seed) if self.shuffled else [task.labels]
        self.tasks = [task.with_label_order(order) for order in orders]
        before, self._trie = scored_labels(tokenizer, task)
        self._strings = None if self.normalize == "none" else task_label_strings(tokenizer, task)
        self._prefix = SharedPrefix(model)
        self._before = list(self._strings.before if self._strings else before)

    def log_probabilities(
        self, prompts: Sequence[Sequence[Sequence[int]]], on_done: Callable[[int], None] | None = None
    ) -> Float[np.ndarray, "n c"]:
        """The log-probabilities of the labels behind some prompts, in the order of ``task.labels``.

        Args:
            prompts: Of each item its tokens up to the answer, once for each of :attr:`tasks`.
            on_done: Called with the number of items scored so far.
        """
        k = len(self.tasks)
        flat = [[*prompt, *self._before] for orders in prompts for prompt in orders]
        settings: dict[str, Any] = {
            "batch_size": self.batch_size,
            "prefix": self._prefix,
            "on_done": on_done and (lambda done: on_done(done // k)),
        }
        if self._strings is None:
            table = label_probabilities(self.model, flat, self._trie, **settings)
            scores = np.log(np.maximum(table, SMALLEST))
        else:
            scores = label_string_logprobs(self.model, flat, self._strings, **settings)
            lengths = {"tokens": [len(path) for path in self._strings.paths], "bytes": self._strings.bytes}
            scores = scores / np.array(lengths.get(self.normalize, 1))
        orders = scale(scores, 1.0).reshape(len(prompts), k, -1)
        return scale(orders.mean(axis=1), self.temperature)

    def label_rows(
        self,
        rows: Sequence[tuple[str, Any]],
        to_prompt: Callable[[Any, str, Task], CutItem | Prediction],
        on_done: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """The most probable label of each row, and the distribution.

        Args:
            rows: ``(where, row)``.
            to_prompt: From a row, its place and the task to its item and prompt, or to the prediction of one
                that cannot be asked.
            on_done: Called with the number of rows done so far.
        """
        out: dict[int, Prediction] = {}
        asked: list[tuple[int, CutItem, list[list[int]]]] = []
        for i, (where, row) in enumerate(rows):
            own = to_prompt(row, where, self.task)
            parts = [to_prompt(row, where, task) for task in self.tasks] if self.shuffled else [own]
            prompts = [part.prompt for part in parts if not isinstance(part, Prediction)]
            if isinstance(own, Prediction) or len(prompts) < len(parts):
                out[i] = next(part for part in (own, *parts) if isinstance(part, Prediction))
            elif self.shuffled and prompts[0] == prompts[1]:
                out[i] = _unshuffled(own.item)
            else:
                asked.append((i, own, prompts))
        table = np.exp(self.log_probabilities([prompts for *_, prompts in asked], on_done)) if asked else []
        for (i, (item, _, cut), prompts), line in zip(asked, table, strict=True):
            probabilities = dict(zip(self.task.labels, map(float, line), strict=True))
            out[i] = Prediction(
                item.id,
                "",
                None,
                max(probabilities, key=probabilities.__getitem__),
                None,
                label_probs=probabilities,
                prompt_tokens=len(prompts[0]),
                fields=item.fields,
                cut=cut or None,
            )
        return [out[i] for i in range(len(rows))]


def check_label_options(task: Task, options: LabelOptions) -> None:
    """Refuse options that do not suit a task, before its model is loaded.

    Raises:
        ConfigError: see :class:`LabelScorer`.
    """
    check_label_place(task)
    normalize, orders, temperature = options.normalize, options.shuffle_options, options.temperature
    if normalize not in NORMALIZATIONS:
        raise ConfigError(f"normalize is {normalize!r}", fix=f"one of {', '.join(NORMALIZATIONS)}")
    if orders < 1:
        raise ConfigError(f"shuffle_options is {orders}", fix="give the number of orders, 1 or more")
    if temperature is not None:
        check_temperature(temperature)
    if orders > 1 and not task.lists_labels:
        raise ConfigError(
            f"shuffle_options: the prompt of the task {task.name!r} has no place for the list of labels",
            fix=f"write {{{task.label}:options}} in the task's prompt instead of the list",
        )


def folder_temperature(
    folder: str | Path, task: Task, options: LabelOptions
) -> tuple[float | None, str | None]:
    """The temperature in a model's folder for these scores, or None and the reason why there is none."""
    if options.shuffle_options > 1:
        return None, "its temperature is for one order of the options"
    folder = Path(folder).expanduser()
    return usable_temperature(read_label_temperature(folder), folder, task, options.normalize)


def label_orders(labels: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Some orders of the labels: seeded permutations, each in as many rotations as there are labels, so that
    in whole cycles each label has each place equally often.

    >>> label_orders(["a", "b", "c"], 4)
    [('c', 'a', 'b'), ('a', 'b', 'c'), ('b', 'c', 'a'), ('c', 'b', 'a')]
    """
    random, out = np.random.default_rng(seed), list[tuple[str, ...]]()
    most = min(count, math.factorial(len(labels)))
    while len(out) < most:
        order = tuple(labels[i] for i in random.permutation(len(labels)))
        if order not in out:
            out += [order[i:] + order[:i] for i in range(len(order))]
    return out[:most]


def to_classification(prediction: Prediction, calibrated: bool) -> Classification:
    """The classification in what :meth:`LabelScorer.label_rows` returns."""
    return Classification(
        id=prediction.id,
        label=prediction.label,
        probabilities=prediction.label_probs,
        calibrated=calibrated and prediction.label_probs is not None,
        error=prediction.error,
        error_kind=prediction.error_kind,
        prompt_tokens=prediction.prompt_tokens,
        fields=prediction.fields,
        cut=prediction.cut,
    )


def _unshuffled(item: Item) -> Prediction:
    error = "the row has a chat of its own, so the task's list of options is not in its prompt"
    return Prediction(item.id, "", None, None, None, error=error, error_kind=BAD_ROW, fields=item.fields)
