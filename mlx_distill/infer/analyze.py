"""Items of any number to predictions, by a model that is loaded once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill.data.rows import Item
from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.infer.label_scorer import (
    LabelOptions,
    LabelScorer,
    check_label_options,
    folder_temperature,
    to_classification,
)
from mlx_distill.infer.label_scoring import label_prefix_tokens
from mlx_distill.infer.predict import answer_prompts, context_length
from mlx_distill.infer.row_prompts import RowPrompts, check_long, checked_item
from mlx_distill.infer.shared_calls import SharedCalls
from mlx_distill.models.trained_on import (
    TrainedOn,
    is_model,
    is_run,
    newest_model,
    prompt_notes,
    read_trained_on,
)
from mlx_distill.progress import Progress, make_progress
from mlx_distill.records import Classification, Prediction
from mlx_distill.tasks.grammar import check_schema
from mlx_distill.tasks.task import Task, load_task, task_names
from mlx_distill.text import counted
from mlx_distill.thinking import thinking_budget

Row = Mapping[str, Any]

_BATCHES_IN_CHUNK = 8


def chunk_size(batch_size: int) -> int:
    """The number of rows that are answered together. Chunks are the same in every run, since the composition
    of a batch can change the last digits of a probability.
    """
    return batch_size * _BATCHES_IN_CHUNK


class ModelSource(NamedTuple):
    """A model that need not be loaded yet, and what it is asked.

    ``model`` is the folder or the Hub id, or what ``md.load`` returned; ``task`` the task; ``trained_on``
    what the model was trained on, where that is known.
    """

    model: str | Path | tuple[Any, Any]
    task: Task
    trained_on: TrainedOn | None = None


class Analyzer:
    """A model that is loaded once and answers items, from several threads too: calls that wait for each other
    are answered together.

    Args:
        model: A folder or Hub id for ``md.load``; the folder of a run, which means its newest usable model;
            what ``md.load`` returned: ``(model, tokenizer)``; or what :func:`find_model` returned.
        task: A packaged task's name, the path of a YAML file, a :class:`~mlx_distill.tasks.task.Task`, or
            None for the task that the model was trained on.
        constrain: Let the model write only what fits the task's schema: its canonical JSON, with the listed
            properties alone. It makes answers parse, it does not make them right.
        labels_only: Answer with a :class:`~mlx_distill.records.Classification`, without generating.
        batch_size: Items decoded together.
        max_tokens: Longest answer; the task's own where None.
        label_probs: Return the model's distribution over the labels too.
        label_options: How labels are scored without generating: the fields of
            :class:`~mlx_distill.infer.label_scorer.LabelOptions`.
        max_prompt_tokens: The longest prompt that is read; the model's own length less that of the longest
            answer where None.
        long: What becomes of items with a longer prompt: ``refuse`` makes them an error, ``cut`` leaves out
            the middle of their longest text, which ``cut`` of the prediction says.
        progress: Is told where task or prompt are others than those that the model was trained on.

    Raises:
        ConfigError: no such task, or none given and the model does not say what it was trained on; or a
            setting that is out of range.
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
        label_options: Mapping[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        long: str = "refuse",
        progress: Progress | None = None,
    ) -> None:
        check_long(long)
        if batch_size < 1 or (max_tokens or 1) < 1 or (max_prompt_tokens or 1) < 1:
            raise ConfigError("batch_size, max_tokens or max_prompt_tokens below 1", fix="give 1 or more")
        progress = progress or make_progress()
        source = model if isinstance(model, ModelSource) else find_model(model, task, progress)
        self.task, self._source, self._progress = source.task, source.model, progress
        self.label_options = LabelOptions(**(label_options or {}))
        if labels_only:
            check_label_options(self.task, self.label_options)
        elif constrain:
            check_schema(self.task.schema, f"task {self.task.name}: schema")
        self.constrain, self.labels_only, self.batch_size = constrain, labels_only, batch_size
        self.max_tokens = max_tokens or self.task.max_answer_tokens
        self.model, self.tokenizer = source.model if isinstance(source.model, tuple) else _load(source.model)
        self.long = long
        length = context_length(self.model)
        if max_prompt_tokens is None and length is not None:
            most = self.max_tokens + thinking_budget(self.tokenizer)
            max_prompt_tokens = max(1, length - (0 if labels_only else most))
        self.max_prompt_tokens = max_prompt_tokens
        self._rows = RowPrompts(self.tokenizer, self.task, max_prompt_tokens, long, progress.note)
        self.label_probs = (
            label_probs and label_prefix_tokens(self.tokenizer, self.task, progress.note) is not None
        )
        self._scorer: LabelScorer | None = None
        self.calibrated = False  # whether labels are scored at the temperature in the model's folder
        self._calls = SharedCalls(self.chunk_size)

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
        return itertools.chain.from_iterable(self.iter_chunks(_numbered(items)))

    def classify(self, items: Sequence[Mapping[str, Any] | str]) -> list[Classification]:
        """The label of each item and the probabilities of all labels, from one pass over its prompt, without
        generating; see :func:`~mlx_distill.infer.classify.classify`.

        Args:
            items: As for :meth:`analyze`.

        Raises:
            ConfigError: labels cannot be scored, see there.
        """
        check_list(items)
        chunks = self._iter_chunks(_numbered(items), self._label, None, self.chunk_size)
        return list(itertools.chain.from_iterable(chunks))

    @property
    def chunk_size(self) -> int:
        """The number of rows that are answered together."""
        return chunk_size(self.batch_size)

    def iter_chunks(
        self,
        rows: Iterable[tuple[str, Row | str | DataError]],
        on_done: Callable[[int], None] | None = None,
        chunk_size: int | None = None,
    ) -> Iterator[list[Any]]:
        """Yield the predictions of rows with their places, chunk by chunk; the classifications where
        ``labels_only``.

        Args:
            rows: ``(where, row)``, or ``(where, error)`` of a row that could not be read.
            on_done: Called with the number of rows answered so far.
            chunk_size: Rows a chunk; :attr:`chunk_size` where None.
        """
        answer = self._label if self.labels_only else self._answer
        return self._iter_chunks(rows, answer, on_done, chunk_size or self.chunk_size)

    def _iter_chunks(
        self,
        rows: Iterable[tuple[str, Row | str | DataError]],
        answer: Callable[[Sequence[Any], Callable[[int], None] | None], list[Any]],
        on_done: Callable[[int], None] | None,
        chunk_size: int,
    ) -> Iterator[list[Any]]:
        iterator, done = iter(rows), 0
        while chunk := list(itertools.islice(iterator, chunk_size)):
            answers = self._calls(
                answer,
                chunk,
                on_done and (lambda count, done=done: on_done(done + count)),  # type: ignore[misc]
            )
            done += len(chunk)
            yield answers

    def _label(
        self,
        rows: Sequence[tuple[str, Row | str | DataError]],
        on_done: Callable[[int], None] | None,
    ) -> list[Classification]:
        """The classifications of one chunk."""
        if self._scorer is None:
            options = self.label_options
            if options.temperature is None and not isinstance(self._source, tuple):
                temperature, reason = folder_temperature(self._source, self.task, options)
                self.calibrated = temperature is not None
                if temperature is None:
                    state = f"not calibrated, since {reason}"
                else:
                    state = f"calibrated at temperature {temperature:.3g}"
                self._progress.note(f"label probabilities: {state}")
                options = replace(options, temperature=temperature)
            self._scorer = LabelScorer(
                self.model, self.tokenizer, self.task, options, batch_size=self.batch_size
            )
        predictions = self._scorer.label_rows(rows, self._rows, on_done)
        return [to_classification(prediction, self.calibrated) for prediction in predictions]

    def _answer(
        self,
        rows: Sequence[tuple[str, Row | str | DataError]],
        on_done: Callable[[int], None] | None,
    ) -> list[Prediction]:
        """The predictions of one chunk."""
        answers: dict[int, Prediction] = {}
        asked: list[tuple[int, Item, list[int]]] = []
        cuts: dict[int, Mapping[str, Any]] = {}
        for i, (where, row) in enumerate(rows):
            item = self._rows(row, where)
            if isinstance(item, Prediction):
                answers[i] = item
                continue
            asked.append((i, item.item, item.prompt))
            if item.cut:
                cuts[i] = item.cut
        if asked:
            numbers, items, prompts = zip(*asked, strict=True)
            for i, prediction in zip(numbers, self._ask(items, prompts, on_done), strict=True):
                answers[i] = replace(prediction, cut=cuts[i]) if i in cuts else prediction
        return [answers[i] for i in range(len(rows))]

    def _ask(
        self,
        items: Sequence[Item],
        prompts: Sequence[Sequence[int]],
        on_done: Callable[[int], None] | None,
    ) -> list[Prediction]:
        """The model's answers to prompts that are short enough."""
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
) -> Iterator[Any]:
    """Yield the predictions of :func:`analyze` in the items' order, some batches at a time; with
    ``labels_only=True`` the classifications of :func:`~mlx_distill.infer.classify.classify`.

    The arguments are those of :func:`analyze`. The items are checked before the model is loaded.
    """
    check_list(items)
    progress = progress or make_progress()
    source = find_model(model, task, progress)
    check_rows(_numbered(items), source, progress)
    analyzer = Analyzer(source, progress=progress, **settings)
    with progress.task("analyze", total=len(items), unit="item") as bar:
        done = 0
        for predictions in analyzer.iter_chunks(_numbered(items), bar.update):
            yield from predictions
            done += len(predictions)
            bar.update(done)


def _numbered(items: Iterable[Row | str]) -> Iterator[tuple[str, Row | str]]:
    return ((f"item {number}", item) for number, item in enumerate(items, 1))


def check_list(items: Any) -> None:
    """Refuse one item where a list is needed."""
    if isinstance(items, (str, Mapping)):
        raise DataError("items: one item alone", fix="give a list: [item]")


def check_rows(
    rows: Iterable[tuple[str, Row | str | DataError]], source: ModelSource, progress: Progress
) -> tuple[int, int]:
    """Check rows before the model is loaded, and note where they ask with another prompt than it was trained
    on, and where several have one id.

    Returns:
        The number of rows, and how many of them cannot be asked.

    Raises:
        DataError: none of them can be asked: that of the first one.
    """
    total, bad, repeated, example = 0, 0, 0, ""
    first: DataError | None = None
    ids = set[int]()  # hashes: a hundred thousand ids would take more memory than a batch

    def systems() -> Iterator[str]:
        nonlocal total, bad, first, repeated, example
        for where, row in rows:
            total += 1
            try:
                item = checked_item(row, source.task, where)
            except DataError as error:
                bad, first = bad + 1, first or error
            else:
                if hash(item.id) in ids:
                    repeated, example = repeated + 1, example or item.id
                ids.add(hash(item.id))
                yield "".join(m.content for m in item.messages[:1] if m.role == "system")

    notes = prompt_notes(source.trained_on, source.task, systems())
    if first is not None and bad == total:
        if total == 1:
            raise first
        raise DataError(f"none of the {total:,} rows can be asked: {first.message}", fix=first.fix)
    for text in notes:
        progress.note(f"note: {text}")
    if repeated:
        progress.note(
            f"note: {counted(repeated, 'row')} with the id of an earlier row, such as {example!r}: their "
            "answers are told apart by the order alone"
        )
    return total, bad


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
    if trained_on is None or trained_on.task is None:
        if folder is not None and not is_model(folder):
            raise ModelError(
                f"{folder}: no model: neither config.json nor adapter_config.json is in it",
                fix="give the folder of a model, or of a run with finished stages",
            )
        where = "a loaded model" if folder is None else str(folder)
        record = "no record of the task that the model was trained on"
        if trained_on is not None:
            record = "the model was trained on chats of any kind, which have no task"
        raise ConfigError(
            f"{where}: {record}",
            fix=f"name it: --task TASK; packaged: {', '.join(task_names())}; or a YAML file",
        )
    return trained_on.task
