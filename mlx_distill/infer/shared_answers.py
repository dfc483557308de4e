"""Rows to predictions by an engine that others use at the same time: many callers share its batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_distill.errors import DataError, DistillError
from mlx_distill.infer.label_scorer import LabelOptions, LabelScorer, folder_temperature, to_classification
from mlx_distill.infer.long_items import CutItem
from mlx_distill.infer.predict import (
    AnswerRequests,
    begins_with_label,
    context_length,
    label_distributions,
    shortest,
    to_prediction,
)
from mlx_distill.infer.requests import Generation
from mlx_distill.infer.row_prompts import Row, RowPrompts
from mlx_distill.infer.shared_calls import SharedCalls
from mlx_distill.infer.worker import Cancelled, EngineWorker, Handle
from mlx_distill.records import Classification, Prediction
from mlx_distill.tasks.grammar import check_schema
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import thinking_budget

PlacedRow = tuple[str, Row | str | DataError]
_POLL = 1.0  # seconds between two looks whether the caller is still there
_SCORERS = 8  # kept, each with the cache of a system prompt


class SharedAnswers:
    """A model's answers to rows of one task, from any thread, through its worker.

    The prompts, the constraints, the hook of the labels and the parsing are those of
    :class:`~mlx_distill.infer.analyze.Analyzer`. The answers are equal to its; what can differ in its last
    digits is a probability, since rows of others may stand in the same batch.

    Args:
        worker: Of the model's engine.
        task: Prompt, schema, label and score.
        folder: The model's, for the temperature of its labels; None for none.
        context: Tokens of prompt and answer; the model's own length where None, and never more than that.
    """

    def __init__(
        self, worker: EngineWorker, task: Task, folder: Path | None = None, context: int | None = None
    ) -> None:
        self.worker, self.task, self.folder, self.context = worker, task, folder, context
        self.model, self.tokenizer = worker.engine.model, worker.engine.tokenizer
        self.batch_size = worker.engine.batch_size
        self._lock = threading.Lock()
        self._requests: dict[tuple[bool, bool], AnswerRequests] = {}
        self._scorers: dict[LabelOptions, tuple[LabelScorer, bool, SharedCalls]] = {}

    def answer(
        self,
        rows: Sequence[PlacedRow],
        *,
        constrain: bool = True,
        label_probs: bool = True,
        max_tokens: int | None = None,
        long: str = "refuse",
        gone: Callable[[], bool] = lambda: False,
    ) -> list[Prediction]:
        """The predictions of rows, in their order. A batch of them is in the engine at a time, so that a long
        list leaves room for others.

        Args:
            rows: ``(where, row)``; at a row that cannot be asked the prediction has an error.
            constrain: Let the model write only what fits the task's schema.
            label_probs: Return the distribution over the labels too.
            max_tokens: Longest answer; the task's where None.
            long: ``refuse`` or ``cut``.
            gone: Is asked from time to time; True gives the rows up.

        Raises:
            ConfigError: a schema that a grammar cannot enforce.
            Cancelled: the worker was closed, or the caller is gone.
        """
        asked = self._asked(constrain, label_probs)
        most = max_tokens or self.task.max_answer_tokens
        prompts = self._prompts(long, most + thinking_budget(self.tokenizer))
        items = [prompts(row, where) for where, row in rows]
        handles = self._handles(asked, [item for item in items if isinstance(item, CutItem)], most, gone)
        out = []
        for item in items:
            if isinstance(item, Prediction):
                out.append(item)
                continue
            generation = next(handles)
            distribution = self._distribution(asked, item, generation) if asked.prefix else None
            prediction = to_prediction(item.item, generation, distribution, self.task)
            out.append(replace(prediction, cut=item.cut) if item.cut else prediction)
        return out

    def classify(
        self, rows: Sequence[PlacedRow], options: LabelOptions | None = None, *, long: str = "refuse"
    ) -> list[Classification]:
        """The label of each row and the probabilities of all labels, without generating.

        Args:
            rows: As for :meth:`answer`.
            options: How labels are scored.
            long: ``refuse`` or ``cut``.

        Raises:
            ConfigError: labels cannot be scored.
        """
        scorer, calibrated, calls = self._scorer(options or LabelOptions())
        prompts = self._prompts(long, 0)
        tasks = [scorer.task, *(scorer.tasks if scorer.shuffled else ())]

        def score(placed: Sequence[Any], on_done: Any) -> list[Prediction]:
            return self.worker.call(lambda: scorer.label_rows(placed, _prepared)).result()

        out: list[Prediction] = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            prepared = [
                (where, {id(task): prompts(row, where, task) for task in tasks}) for where, row in part
            ]
            out += calls(_Same(score, scorer), prepared)
        return [to_classification(prediction, calibrated) for prediction in out]

    def _asked(self, constrain: bool, label_probs: bool) -> AnswerRequests:
        with self._lock:
            asked = self._requests.get((constrain, label_probs))
            if asked is None:
                if constrain:
                    check_schema(self.task.schema, f"task {self.task.name}: schema")
                asked = AnswerRequests(
                    self.model, self.tokenizer, self.task, label_probs=label_probs, constrain=constrain
                )
                self._requests[constrain, label_probs] = asked
            return asked

    def _prompts(self, long: str, answer_tokens: int) -> RowPrompts:
        length = shortest(context_length(self.model), self.context)
        limit = None if length is None else max(1, length - answer_tokens)
        return RowPrompts(self.tokenizer, self.task, limit, long)

    def _handles(
        self, asked: AnswerRequests, items: Sequence[CutItem], most: int, gone: Callable[[], bool]
    ) -> Iterator[Generation]:
        """The generations of items, a batch of which is in the engine."""
        under_way: deque[tuple[CutItem, Handle]] = deque()
        left = deque(items)
        try:
            while left or under_way:
                while left and len(under_way) < self.batch_size:
                    item = left.popleft()
                    under_way.append((item, self.worker.submit(asked.request(item.prompt, most))))
                item, handle = under_way[0]
                yield _result(item, handle, gone)
                under_way.popleft()
        finally:
            for _, handle in under_way:
                handle.cancel()

    def _distribution(
        self, asked: AnswerRequests, item: CutItem, generation: Generation
    ) -> dict[str, float] | None:
        prefix = asked.prefix
        assert prefix is not None

        thinks = thinking_budget(self.tokenizer) > 0

        def read() -> dict[str, float] | None:
            return label_distributions(self.model, [item.prompt], [generation], prefix, thinks=thinks)[0]

        # The hook's output is read here; another pass over the prompt is the model's.
        return read() if begins_with_label(generation, prefix[0]) else self.worker.call(read).result()

    def _scorer(self, options: LabelOptions) -> tuple[LabelScorer, bool, SharedCalls]:
        with self._lock:
            made = self._scorers.get(options)
            if made is None:
                temperature, calibrated = options.temperature, False
                if temperature is None and self.folder is not None:
                    temperature, _ = folder_temperature(self.folder, self.task, options)
                    calibrated = temperature is not None
                scorer = self.worker.call(
                    lambda: LabelScorer(
                        self.model,
                        self.tokenizer,
                        self.task,
                        replace(options, temperature=temperature),
                        batch_size=self.batch_size,
                    )
                ).result()
                made = scorer, calibrated, SharedCalls(self.batch_size)
                while len(self._scorers) >= _SCORERS:
                    del self._scorers[next(iter(self._scorers))]
                self._scorers[options] = made
            return made


class _Same:
    """A function that is equal to those of other threads with the same scorer, so that calls are joined."""

    def __init__(self, function: Callable[..., Any], scorer: LabelScorer) -> None:
        self.function, self.scorer = function, scorer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.scorer is self.scorer

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, rows: Sequence[Any], on_done: Any) -> list[Any]:
        return self.function(rows, on_done)


def _prepared(prompts: Any, where: str, task: Task) -> CutItem | Prediction:
    """A prompt that the caller's thread has made."""
    prompt: CutItem | Prediction = prompts[id(task)]
    return prompt


def _result(item: CutItem, handle: Handle, gone: Callable[[], bool]) -> Generation:
    """The answer of a request; an error of its own where its constraint or hook failed."""
    while True:
        try:
            return handle.result(timeout=_POLL)
        except TimeoutError:
            if gone():
                handle.cancel()
                raise Cancelled("the caller is gone", fix="ask again") from None
        except Cancelled:
            raise
        except DistillError as error:
            return Generation("", (), len(item.prompt), "error", 0.0, error=error)
