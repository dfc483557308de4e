"""Items of any number to predictions, by a model that is loaded once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill.data.rows import Item, to_item
from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.infer.label_scoring import label_prefix_tokens
from mlx_distill.infer.predict import BAD_ROW, answer_prompts, context_length, item_prompt, unread
from mlx_distill.models.trained_on import (
    TrainedOn,
    is_run,
    newest_model,
    prompt_notes,
    read_trained_on,
)
from mlx_distill.progress import Progress, make_progress
from mlx_distill.records import Prediction
from mlx_distill.tasks.task import Task, load_task, task_names

Row = Mapping[str, Any]

_BATCHES_IN_CHUNK = 8


class ModelSource(NamedTuple):
    """A model that need not be loaded yet, and what it is asked.

    ``model`` is the folder or the Hub id, or what ``md.load`` returned; ``task`` the task; ``trained_on``
    what the model was trained on, where that is known.
    """

    model: str | Path | tuple[Any, Any]
    task: Task
    trained_on: TrainedOn | None = None


class Analyzer:
    """A model that is loaded once and answers items, from several threads too.

    Args:
        model: A folder or Hub id for ``md.load``; the folder of a run, which means its newest usable model;
            what ``md.load`` returned: ``(model, tokenizer)``; or what :func:`find_model` returned.
        task: A packaged task's name, the path of a YAML file, a :class:`~mlx_distill.tasks.task.Task`, or
            None for the task that the model was trained on.
        constrain: Let the model write only what fits the task's schema.
        labels_only: Answer with the label and its distribution alone, without generating.
        batch_size: Items decoded together.
        max_tokens: Longest answer; the task's own where None.
        label_probs: Return the model's distribution over the labels too.
        max_prompt_tokens: Longer prompts are not read; the model's own length where None.
        progress: Is told where task or prompt are others than those that the model was trained on.

    Raises:
        ConfigError: no such task, or none given and the model does not say what it was trained on.
        ModelError: no such model.
    """

    def __init__(
        self,
        model: str | Path | tuple[Any, Any] | ModelSource,
        task: str | Path | Task | None = None,
        *,
        constrain: bool = True,
        labels_only: bool = False,
        batch_size: int = 16,
        max_tokens: int | None = None,
        label_probs: bool = True,
        max_prompt_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        progress = progress or make_progress()
        source = model if isinstance(model, ModelSource) else find_model(model, task, progress)
        self.task = source.task
        self.constrain, self.labels_only, self.batch_size = constrain, labels_only, batch_size
        self.max_tokens = max_tokens or self.task.max_answer_tokens
        self.model, self.tokenizer = source.model if isinstance(source.model, tuple) else _load(source.model)
        self.max_prompt_tokens = max_prompt_tokens or context_length(self.model)
        self.label_probs = (
            label_probs and label_prefix_tokens(self.tokenizer, self.task, progress.note) is not None
        )
        self._lock = threading.Lock()

    def analyze(self, items: Sequence[Mapping[str, Any] | str]) -> list[Prediction]:
        """The predictions of items, in their order. An item that cannot be asked has an error instead of an
        answer.

        Args:
            items: Rows of any format that ``prepare`` reads, with or without an answer; a plain text where
                the task's prompt names one field.

        Raises:
            DataError: one item alone instead of a list.
        """
        check_list(items)
        return list(self.iter(items))

    def iter(self, items: Iterable[Mapping[str, Any] | str]) -> Iterator[Prediction]:
        """Yield the predictions of items in their order; a few batches of them are in memory at a time."""
        return self.iter_rows((f"item {number}", item) for number, item in enumerate(items, 1))

    def classify(self, items: Sequence[Mapping[str, Any] | str]) -> list[Prediction]:
        """The label of each item and its distribution, from one pass over its prompt, without generating."""
        raise NotImplementedError

    @property
    def chunk_size(self) -> int:
        """The number of rows that are answered together: chunks are the same in every run, since the
        composition of a batch can change the last digits of a probability.
        """
        return self.batch_size * _BATCHES_IN_CHUNK

    def iter_rows(
        self,
        rows: Iterable[tuple[str, Row | str | DataError]],
        on_done: Callable[[int], None] | None = None,
    ) -> Iterator[Prediction]:
        """Yield the predictions of rows with their places.

        Args:
            rows: ``(where, row)``, or ``(where, error)`` of a row that could not be read.
            on_done: Called with the number of rows answered so far.
        """
        iterator, done = iter(rows), 0
        while chunk := list(itertools.islice(iterator, self.chunk_size)):
            with self._lock:
                answers = self._answer(
                    chunk,
                    on_done and (lambda count, done=done: on_done(done + count)),  # type: ignore[misc]
                )
            done += len(chunk)
            if on_done is not None:
                on_done(done)
            yield from answers

    def _answer(
        self,
        rows: Sequence[tuple[str, Row | str | DataError]],
        on_done: Callable[[int], None] | None,
    ) -> list[Prediction]:
        """The predictions of one chunk."""
        answers: dict[int, Prediction] = {}
        asked: list[tuple[Item, list[int]]] = []
        for i, (where, row) in enumerate(rows):
            item = self._prompt(row, where)
            if isinstance(item, Prediction):
                answers[i] = item
            else:
                asked.append(item)
        predictions = iter(
            self._ask([item for item, _ in asked], [prompt for _, prompt in asked], on_done) if asked else ()
        )
        return [answers.get(i) or next(predictions) for i in range(len(rows))]

    def _ask(
        self,
        items: Sequence[Item],
        prompts: Sequence[Sequence[int]],
        on_done: Callable[[int], None] | None,
    ) -> list[Prediction]:
        """The model's answers to prompts that are short enough."""
        if self.labels_only:
            raise NotImplementedError
        return answer_prompts(
            self.model,
            self.tokenizer,
            self.task,
            items,
            prompts,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            label_probs=self.label_probs,
            constrain=self.constrain,
            on_done=on_done,
        )

    def _prompt(self, row: Row | str | DataError, where: str) -> tuple[Item, list[int]] | Prediction:
        """An item and its prompt, or the prediction of one that cannot be asked."""
        try:
            if isinstance(row, DataError):
                raise row
            item = to_item(row, self.task, where)
            prompt = item_prompt(self.tokenizer, item)
        except DataError as error:
            own = row.get(self.task.id, row.get("id")) if isinstance(row, Mapping) else None
            id = str(own) if isinstance(own, (str, int)) and own != "" else where
            return Prediction(id, "", None, None, None, error=str(error), error_kind=BAD_ROW)
        if self.max_prompt_tokens is not None and len(prompt) > self.max_prompt_tokens:
            return unread(item, len(prompt), self.max_prompt_tokens)
        return item, prompt


def analyze(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task | None,
    items: Sequence[Mapping[str, Any] | str],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Prediction]:
    """Generate the model's answer for each item, greedily.

    Args:
        model: A folder or Hub id for ``md.load``; the folder of a run, which means its newest usable model;
            or what ``md.load`` returned: ``(model, tokenizer)``.
        task: A packaged task's name, the path of a YAML file, a :class:`~mlx_distill.tasks.task.Task`, or
            None for the task that the model was trained on.
        items: Rows of any format that ``prepare`` reads, with or without an answer; a plain text where the
            task's prompt names one field.
        progress: Where progress is shown; on standard error by default. It is told too where task or prompt
            are others than those that the model was trained on.
        **settings: The other arguments of :class:`Analyzer`, such as ``batch_size``.

    Returns:
        One :class:`~mlx_distill.records.Prediction` an item, in the items' order; ``answer`` is None and
        ``error`` says why where the item lacks a field, where the prompt is longer than what is read, and
        where the text does not fit the task's schema.

    Raises:
        DataError: none of the items can be asked, or one item alone instead of a list.
        ConfigError: no such task, or none given and the model does not say what it was trained on.
        ModelError: no such model.
    """
    return list(iter_analysis(model, task, items, progress=progress, **settings))


def iter_analysis(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task | None,
    items: Sequence[Mapping[str, Any] | str],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Iterator[Prediction]:
    """Yield the predictions of :func:`analyze` in the items' order, some batches at a time.

    The arguments are those of :func:`analyze`. The items are checked before the model is loaded.
    """
    check_list(items)
    progress = progress or make_progress()
    source = find_model(model, task, progress)
    check_items(items, source, progress)
    analyzer = Analyzer(source, progress=progress, **settings)
    with progress.task("analyze", total=len(items), unit="item") as bar:
        rows = ((f"item {number}", item) for number, item in enumerate(items, 1))
        yield from analyzer.iter_rows(rows, bar.update)


def check_list(items: Any) -> None:
    """Refuse one item where a list is needed."""
    if isinstance(items, (str, Mapping)):
        raise DataError("items: one item alone", fix="give a list: [item]")


def check_items(items: Sequence[Mapping[str, Any] | str], source: ModelSource, progress: Progress) -> None:
    """Note where items ask with another prompt than the model was trained on.

    Raises:
        DataError: none of the items can be asked: that of the first one.
    """
    first: DataError | None = None
    systems: list[str] = []
    for number, row in enumerate(items, 1):
        try:
            item = to_item(row, source.task, f"item {number}")
        except DataError as error:
            first = first or error
        else:
            systems.append("".join(m.content for m in item.messages[:1] if m.role == "system"))
    if first is not None and not systems:
        raise first
    for text in prompt_notes(source.trained_on, source.task, systems, len(systems)):
        progress.note(f"note: {text}")


def find_model(
    model: str | Path | tuple[Any, Any], task: str | Path | Task | None, progress: Progress
) -> ModelSource:
    """The model and its task, without loading it. The arguments are those of :class:`Analyzer`."""
    folder = None
    if not isinstance(model, tuple):
        model = folder = newest_model(model, progress.note) if is_run(model) else model
    trained_on = read_trained_on(folder) if folder is not None else None
    return ModelSource(model, _task_of(task, trained_on, folder), trained_on)


def _load(folder: str | Path) -> tuple[Any, Any]:
    from mlx_distill.models.load import load

    return load(folder)


def _task_of(task: str | Path | Task | None, trained_on: TrainedOn | None, folder: str | Path | None) -> Task:
    if isinstance(task, Task):
        return task
    if task is not None:
        return load_task(str(task))
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ModelError(
            f"{folder}: no such folder", fix="check the path; for a Hub model name the task: --task TASK"
        )
    if trained_on is None:
        where = "a loaded model" if folder is None else str(folder)
        raise ConfigError(
            f"{where}: no record of the task that the model was trained on",
            fix=f"name it: --task TASK; packaged: {', '.join(task_names())}; or a YAML file",
        )
    return trained_on.task
