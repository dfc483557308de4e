"""The artifact that ships: do the merged, the quantized, the exported and the reloaded model give the
answers of the trained one?

Each model of the chain answers the same rows greedily and without a grammar, one model in memory at a time,
all computing in float32, so that a difference comes from the weights, the config or the tokenizer that a step
wrote. Consecutive models are compared row by row.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

from mlx_distill.errors import DataError, DistillError, FileError, ModelError, QualityGateError
from mlx_distill.progress import Progress
from mlx_distill.records import Prediction
from mlx_distill.storage import os_errors, read_json, read_manifest, write_json
from mlx_distill.tasks.answer import THINKING, dump_answer
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, listed

FILE_NAME = "artifact.json"
DEFAULT_ROWS = 50
NEAR_TIE = 0.1
"""Nats between the two most probable labels of a row: closer ones are a near tie, which rounding can turn."""
_TOO_FAR = 0.5  # nats between a label's log-probability before and after a step that must change no answer
_FORMAT = 1
_EXAMPLES = 5  # differing rows that are listed for a step
_SMALLEST = 1e-30  # probability, below which float32 has no digits left
_TITLES = {
    "model": "the model",
    "adapter": "the trained model with its adapter",
    "merged": "the adapter merged",
    "quantized": "the quantized model",
    "exported": "the exported folder",
    "reloaded": "the export converted again",
}


@dataclass(frozen=True)
class Step:
    """A model of the chain.

    Attributes:
        name: A key of the titles: ``model``, ``adapter``, ``merged``, ``quantized``, ``exported``,
            ``reloaded``.
        load: Loads it: the model and its tokenizer.
        must_agree: Whether its answers must be those of the step before it.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]
    must_agree: bool = True


def check_artifact(
    model: str | Path,
    destination: str | Path,
    rows: Sequence[tuple[str, Any]],
    task: Task,
    *,
    to: str = "hf",
    adapter: str = "merge",
    batch_size: int = 16,
    progress: Progress,
) -> dict[str, Any]:
    """Let each model of the chain that led to an export answer rows, and compare each with the one before it.

    Args:
        model: The folder of the MLX model or adapter that was exported.
        destination: The exported folder.
        rows: ``(where, row)``, what is asked.
        task: The task that they are asked.
        to: Its layout: ``hf`` or ``peft``.
        adapter: What the export did with an adapter: ``merge`` or ``keep``.
        batch_size: Rows that are answered together.
        progress: Where progress is shown.

    Returns:
        ``passed``; ``parted_at``, the first step that must agree with the one before it and does not, or
        None; ``sentence``; ``rows``, how many were answered, and ``not_asked``, how many could not be, or
        have no answer of the first model since its thinking did not end; and
        ``steps``, each with ``step``, ``before``, ``rows``, ``same``, ``must_agree``,
        ``max_label_logprob_difference`` (None where the task has no labels), ``near_ties`` and ``examples``.

    Raises:
        DataError: no rows that can be asked: two models that answer nothing would agree.
        ModelError: the trained model cannot be loaded. A later step that cannot is one that does not agree,
            with its ``error``.
    """
    model, destination = Path(model), Path(destination)
    answers: list[tuple[Step, list[Prediction]]] = []
    asked, failed = rows, list[dict[str, Any]]()
    with _work_folder(destination) as work:
        for step in artifact_chain(model, destination, work, to=to, adapter=adapter):
            try:
                predictions = _answer(step, asked, task, batch_size, progress)
            except (ModelError, DataError, FileError) as error:
                if not answers or not step.must_agree:
                    raise
                failed.append(_failed_step(answers[-1][0], step, len(asked), error))
                break
            if not answers:  # what the first model does not answer is asked of no other
                has_text = [not _is_silent(prediction) for prediction in predictions]
                asked, predictions = list(compress(rows, has_text)), list(compress(predictions, has_text))
            if not asked:
                raise DataError(
                    "no rows that the model can be asked, or whose thinking it ends",
                    fix="give others: --rows ROWS; or check nothing: --check 0",
                )
            answers.append((step, predictions))
    steps = [compare_step(before, after, task) for before, after in pairwise(answers)] + failed
    parted = next((step for step in steps if step["must_agree"] and step["same"] < step["rows"]), None)
    return {
        "model": model.resolve().name,
        "content": _content(model),
        "to": to,
        "adapter": adapter,
        "destination": destination.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": task.name,
        "rows": len(asked),
        "not_asked": len(rows) - len(asked),
        "compute_dtype": "float32",
        "near_tie": NEAR_TIE,
        "first": answers[0][0].name,
        "steps": steps,
        "passed": parted is None,
        "parted_at": parted and parted["step"],
        "sentence": _sentence(steps, parted),
    }


def artifact_chain(model: Path, destination: Path, work: Path, *, to: str, adapter: str) -> list[Step]:
    """The models from the trained one to the reloaded export, those that exist, in their order.

    Args:
        model: The folder that was exported.
        destination: The exported folder.
        work: An empty folder for the reloaded export.
        to: The layout of the export.
        adapter: What it did with an adapter.
    """
    from mlx_distill.models.config_files import is_adapter
    from mlx_distill.models.load import load, load_tokenizer
    from mlx_distill.models.merged import load_merged

    def plain(folder: Path) -> Callable[[], tuple[Any, Any]]:
        return lambda: load(folder, dtype="float32")

    def merged(folder: Path) -> Step:
        return Step("merged", lambda: (load_merged(folder)[0], load_tokenizer(folder)))

    trained = _quantized_from(model)
    if trained is not None:
        steps = [Step("adapter", plain(trained))]
        if not is_adapter(model):
            steps.append(merged(trained))
        steps.append(Step("quantized", plain(model), must_agree=False))
    else:
        steps = [Step("adapter" if is_adapter(model) else "model", plain(model))]
    if to == "hf" and (adapter == "merge" or not is_adapter(model)):
        if is_adapter(model):
            steps.append(merged(model))
        steps.append(Step("exported", plain(destination)))
    return [*steps, Step("reloaded", lambda: _reload(model, destination, work, to))]


def _reload(model: Path, destination: Path, work: Path, to: str) -> tuple[Any, Any]:
    """The export as its users get it back: converted to an MLX folder, an adapter beside its base."""
    from mlx_distill.models.config_files import adapter_base
    from mlx_distill.models.convert import convert
    from mlx_distill.models.load import load

    converted = work / "model"
    if to == "peft":
        convert(destination, converted, base=adapter_base(model))
    else:
        convert(destination, converted)
        if (destination / "adapter" / "adapter_config.json").is_file():
            convert(destination / "adapter", work / "adapter", base=converted)
            converted = work / "adapter"
    return load(converted, dtype="float32")


def _quantized_from(model: Path) -> Path | None:
    """The adapter folder that a quantized model was made from, where it is still the same."""
    from mlx_distill.models.config_files import is_adapter
    from mlx_distill.models.folder import source_key

    manifest = read_manifest(model)
    if manifest is None or manifest.stage not in ("quantized", "quantize"):
        return None
    for name, content in manifest.parents.items():
        if manifest.stage == "quantized":  # of a run, whose parents are its stages
            folder = model.resolve().parent / name
            is_same = _content(folder) == content
        else:  # of quantize_folder, which records its source
            folder = Path(str(manifest.recorded.get("source")))
            is_same = folder.is_dir() and is_adapter(folder) and source_key(folder) == content
        if is_same and is_adapter(folder):
            return folder
    return None


@contextmanager
def _work_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside the export, on the same disk; what a killed check left there is removed."""
    work = destination.resolve().with_name(f".{destination.resolve().name}.check")
    shutil.rmtree(work, ignore_errors=True)
    with os_errors():
        work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _answer(
    step: Step, rows: Sequence[tuple[str, Any]], task: Task, batch_size: int, progress: Progress
) -> list[Prediction]:
    """The answers of one model, which is in memory only as long as this function runs."""
    import mlx.core as mx

    from mlx_distill.infer.analyze import Analyzer, ModelSource

    with progress.task(f"check: {_TITLES[step.name]}", total=len(rows), unit="row") as bar:
        analyzer = Analyzer(
            ModelSource(step.load(), task), constrain=False, batch_size=batch_size, progress=progress
        )
        chunks = analyzer.iter_chunks(rows, lambda count: bar.update(count))
        predictions = [prediction for chunk in chunks for prediction in chunk]
        del analyzer, chunks
    gc.collect()  # so that the next model is not loaded beside this one
    mx.clear_cache()
    return predictions


def _is_silent(prediction: Prediction) -> bool:
    """Whether there is no text to compare: the row was not asked, since it has none or its prompt is too
    long, or the model's thinking did not end.
    """
    from mlx_distill.infer.predict import BAD_ROW, LONG_PROMPT

    return prediction.error_kind in (BAD_ROW, LONG_PROMPT, THINKING)


def compare_step(
    before: tuple[Step, Sequence[Prediction]], after: tuple[Step, Sequence[Prediction]], task: Task
) -> dict[str, Any]:
    """Whether the answers of a step are those of the step before it; see :func:`check_artifact`.

    Args:
        before: The step before, and its answers.
        after: The step, and its answers to the same rows.
        task: What was asked.
    """
    step, pairs = after[0], list(zip(before[1], after[1], strict=True))
    differences = [_label_difference(a.label_probs, b.label_probs) for a, b in pairs]
    known = [difference for difference in differences if difference is not None]
    changed = [
        (a, b)
        for (a, b), difference in zip(pairs, differences, strict=True)
        if _canonical(a, task) != _canonical(b, task) or (difference is not None and math.isnan(difference))
    ]
    out = {
        "step": step.name,
        "title": _TITLES[step.name],
        "before": before[0].name,
        "must_agree": step.must_agree,
        "rows": len(pairs),
        "same": len(pairs) - len(changed),
        "max_label_logprob_difference": max(known) if known and not any(map(math.isnan, known)) else None,
        "not_numbers": sum(map(math.isnan, known)),
        "near_ties": sum(_is_near_tie(a, b) for a, b in changed),
        "examples": [
            {
                "id": a.id,
                "labels": [a.label, b.label],
                "margin": _margin(a.label_probs),
                "answers": [_canonical(a, task), _canonical(b, task)],
            }
            for a, b in changed[:_EXAMPLES]
        ],
    }
    return {**out, "sentence": _step_sentence(out)}


def _failed_step(before: Step, step: Step, rows: int, error: DistillError) -> dict[str, Any]:
    """A step whose model could not be loaded or asked at all."""
    return {
        "step": step.name,
        "title": _TITLES[step.name],
        "before": before.name,
        "must_agree": step.must_agree,
        "rows": rows,
        "same": 0,
        "max_label_logprob_difference": None,
        "not_numbers": 0,
        "near_ties": 0,
        "examples": [],
        "error": str(error),
        "sentence": f"{_TITLES[step.name]}: it cannot be used: {error}",
    }


def _canonical(prediction: Prediction, task: Task) -> str:
    """What is compared: the valid answer in its canonical form, else the text."""
    return prediction.text if prediction.answer is None else dump_answer(prediction.answer, task.schema)


def _label_difference(first: Mapping[str, float] | None, second: Mapping[str, float] | None) -> float | None:
    """The largest difference of a label's log-probability; NaN where one is no number, None without labels.

    >>> round(_label_difference({"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75}), 4)
    0.6931
    """
    if first is None or second is None:
        return None
    differences = [abs(_log(first[label]) - _log(second[label])) for label in first]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _log(probability: float) -> float:
    return math.nan if math.isnan(probability) else math.log(max(probability, _SMALLEST))


def _margin(probabilities: Mapping[str, float] | None) -> float | None:
    """The log-probability of the most probable label less that of the next; None where it is not known."""
    values = [_log(value) for value in (probabilities or {}).values()]
    if len(values) < 2 or any(map(math.isnan, values)):
        return None
    second, first = sorted(values)[-2:]
    return first - second


def _is_near_tie(before: Prediction, after: Prediction) -> bool:
    """Whether a changed row is explained by two labels that were almost equally probable: its label changed,
    and the margin was small.
    """
    margin = _margin(before.label_probs)
    return before.label != after.label and margin is not None and margin <= NEAR_TIE


def _step_sentence(step: Mapping[str, Any]) -> str:
    changed, rows = step["rows"] - step["same"], step["rows"]
    if not changed:
        text = f"the same answers on {rows:,} of {rows:,} rows"
    else:
        ids = [str(example["id"]) for example in step["examples"]]
        named = ", ".join([*ids, *(["..."] if changed > len(ids) else [])])
        text = f"other answers on {changed:,} of {rows:,} rows ({named})"
        if not step["must_agree"]:
            text += ", which quantization may do"
    if step["not_numbers"]:
        text += f"; the label probabilities of {counted(step['not_numbers'], 'row')} are not numbers"
    elif step["max_label_logprob_difference"] is not None:
        largest = step["max_label_logprob_difference"]
        text += f"; the log-probability of a label differs by {largest:.2g} at most"
        if step["must_agree"] and largest > _TOO_FAR:
            text += ", more than rounding explains: other rows may have other answers"
    if changed and step["near_ties"] == changed:
        which = "that row" if changed == 1 else "all these rows"
        text += (
            f"; the log-probabilities of the two most probable labels of {which} lay within {NEAR_TIE}: "
            "near ties, which rounding can turn"
        )
    elif step["near_ties"]:
        text += f"; {step['near_ties']:,} of these rows are near ties of two labels, the others are not"
    return f"{step['title']}: {text}"


def _sentence(steps: Sequence[Mapping[str, Any]], parted: Mapping[str, Any] | None) -> str:
    """The result in one sentence."""
    if parted is not None:
        where, _, what = parted["sentence"].partition(": ")
        return f"not the same answers: they part at the step {parted['step']} ({where}): {what}"
    exact = [step for step in steps if step["must_agree"]]
    rows = steps[0]["rows"]
    names = listed([step["step"] for step in exact])
    text = f"{names}: the same answers on {rows:,} of {rows:,} rows"
    for step in steps:
        if not step["must_agree"]:
            text += f"; quantization changes {counted(step['rows'] - step['same'], 'answer')}"
    return text


def require_same_answers(check: Mapping[str, Any] | None) -> None:
    """Raise where a checked export does not give the trained model's answers.

    Raises:
        QualityGateError: it names the step at which they part.
    """
    if check is not None and not check["passed"]:
        raise QualityGateError(
            str(check["sentence"]), fix=f"see {FILE_NAME} in the exported folder", facts=dict(check)
        )


def write_check(folder: str | Path, checks: Sequence[Mapping[str, Any]], *, with_answers: bool) -> Path:
    """Write ``artifact.json``.

    Args:
        folder: The exported folder, or the run's.
        checks: What :func:`check_artifact` returned.
        with_answers: Write the answers to differing rows, not their ids and labels alone: an exported folder
            is published, and answers may quote the rows.
    """
    path = Path(folder) / FILE_NAME
    kept = checks if with_answers else [_without_answers(check) for check in checks]
    write_json(path, {"format": _FORMAT, "checks": list(kept)})
    return path


def _without_answers(check: Mapping[str, Any]) -> dict[str, Any]:
    steps = [
        {
            **step,
            "examples": [
                {key: value for key, value in example.items() if key != "answers"}
                for example in step["examples"]
            ],
        }
        for step in check["steps"]
    ]
    return {**check, "steps": steps}


def add_check(run: Path, check: Mapping[str, Any]) -> None:
    """Keep a check in the folder of its run, instead of the last one of the same model and layout."""
    same = ("model", "to", "adapter")
    others = [old for old in read_checks(run) if any(old[key] != check[key] for key in same)]
    write_check(run, [*others, check], with_answers=True)


def read_checks(run: str | Path) -> list[dict[str, Any]]:
    """The checks of a run's exports, without those of models that were made again since."""
    path = Path(run) / FILE_NAME
    if not path.is_file():
        return []
    read = read_json(path)
    checks = read["checks"] if isinstance(read, Mapping) and read.get("format") == _FORMAT else []
    return [check for check in checks if check["content"] == _content(Path(run) / check["model"])]


def _content(folder: Path) -> str | None:
    manifest = read_manifest(folder)
    return manifest.content if manifest else None
