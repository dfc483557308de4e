"""The two sides of a comparison as rows of predictions with true answers, whatever was given: a file of
predictions, an evaluation of a run, or a model whose answers were kept.

Nothing here imports mlx. Rows have the keys of ``predictions.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset, to_mapping
from mlx_distill.data.answers import valid_answer
from mlx_distill.data.files import ReadOptions, read_path
from mlx_distill.data.predictions import FILE_NAME, constrained_rows, read_predictions
from mlx_distill.data.rows import to_item
from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.evaluate.other_tools import answer_row, strict_parser
from mlx_distill.models.trained_on import is_model, is_run, read_trained_on
from mlx_distill.run_models import RESULTS, RUN_MODELS, run_model
from mlx_distill.storage import Manifest, digest, os_errors, read_json, read_jsonl, read_manifest, sha256
from mlx_distill.tasks.task import Task, load_task, parse_task, task_names
from mlx_distill.text import counted, listed

Row = Mapping[str, Any]
MAIN_SET = "test"
EVALUATIONS = "evaluations"
_NAMED = 5  # ids that an error names
_MODELS = tuple(RUN_MODELS)
_FINAL = (*reversed(RESULTS), "teacher")
_WEIGHT_FILES = (".safetensors", ".npz", ".gguf")
_PROMPT_KEYS = ("system", "user", "schema")


@dataclass(frozen=True)
class Side:
    """One of the two models of a comparison.

    Attributes:
        name: What it is called in tables.
        source: The file, run or model as it was given.
        kind: ``file``, ``run`` or ``model``.
        rows: Its answers, with the keys of ``predictions.jsonl``.
        task: The task that it was asked, where that is known.
        version: The model's folder or name.
        sha: A hash of the model's folder where that is known, else of the file of its answers.
        settings: How the answers were made: ``constrained``, ``batch_size``, ``temperature``, where known.
        size_bytes: Of its weights on disk, an adapter's base included; None where that is not known.
        peak_memory_bytes: While it answered; None where that is not known.
        run: The folder of the run that it belongs to.
    """

    name: str
    source: str
    kind: str
    rows: Sequence[Row]
    task: Task | None
    version: str
    sha: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Reference:
    """The rows of ``--rows``: by id their true answer, fields, title and input."""

    source: str
    task: Task
    rows: Mapping[str, Row]


def read_reference(spec: str | Path, task: Task) -> Reference:
    """Read the rows that both models answered, with their true answers.

    Args:
        spec: A file in any format that ``prepare`` reads, whose rows have an id, the fields of the task's
            prompt and ``answer``; a row without an answer has no true one.
        task: The task.

    Raises:
        DataError: no rows, a row without an id, an id that occurs twice, or a true answer that does not fit
            the task.
    """
    path = Path(resolve_asset(str(spec)))
    if not path.exists():
        raise DataError(f"{spec}: no such file", fix="check the path of --rows")
    rows: dict[str, Row] = {}
    checked: dict[str, Mapping[str, Any]] = {}
    for where, raw in read_path(path, str(spec), ReadOptions()):
        if raw.get(task.id, raw.get("id")) in (None, ""):
            raise DataError(
                f"{where}: no {task.id}", fix=f"give every row its {task.id}, by which answers are found"
            )
        item = to_item(raw, task, where)
        if item.id in rows:
            raise DataError(f"{where}: id {item.id!r} occurs twice", fix="give every row its own id")
        try:
            truth = _true_answer(raw, task, checked)
        except DataError as error:
            raise DataError(f"{where}: {error.message}", fix="correct the answer, or leave it out") from error
        title = item.fields.get(task.title) if task.title else None
        questions = [message.content for message in item.messages if message.role == "user"]
        rows[item.id] = {
            "id": item.id,
            "set": raw.get("set"),
            "fields": dict(item.fields),
            "title": None if title is None else str(title),
            "input": questions[-1] if questions else "",
            "truth": truth,
        }
    if not rows:
        raise DataError(f"{spec}: no rows", fix="add rows: one JSON object a line")
    return Reference(str(spec), task, rows)


def _true_answer(raw: Row, task: Task, checked: dict[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The true answer of a row: ``answer``, the last turn of a chat, or the answer's fields as columns.
    ``checked`` keeps those that were checked: equal ones are checked once.
    """
    messages, answer = raw.get("messages"), raw.get("answer")
    if answer is None and isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
        answer = messages[-1]["content"]
    elif answer is None and task.label and raw.get(task.label) is not None:
        answer = {name: raw[name] for name in task.schema["properties"] if raw.get(name) is not None}
    if answer is None:
        return None
    key = json.dumps(answer, sort_keys=True, default=str)
    if key not in checked:
        checked[key] = valid_answer(answer, task)
    return checked[key]


def file_side(
    path: Path,
    task: Task | None,
    reference: Reference | None,
    name: str | None = None,
    *,
    constrained: bool = False,
) -> Side:
    """A file of predictions: ours, or JSON lines of any tool with ``id`` and ``text``.

    Args:
        path: The file.
        task: The task of ``--task``; needed for files of other tools.
        reference: The rows of ``--rows``; needed for files of other tools.
        name: What the model is called; by default what the file says, else the file's name.
        constrained: Take the answers under the grammar of the task, of a file that has both.

    Raises:
        DataError: a line without an id or a text, or an id that occurs twice.
        ConfigError: a file of another tool without task or rows.
    """
    header = _header(path)
    if header is not None:
        return _predictions_side(path, task, name, constrained)
    if task is None or reference is None:
        missing = listed([flag for flag, value in (("--task", task), ("--rows", reference)) if value is None])
        raise ConfigError(
            f"{path}: not written by evaluate, so it does not say what was asked: {missing} missing",
            fix="add --task TASK --rows ROWS, where each row has id, the task's fields and answer",
        )
    parse = strict_parser(task)
    rows = [answer_row(raw, f"{path}:{number}", task, parse) for number, raw in read_jsonl(path)]
    if not rows:
        raise DataError(f"{path}: empty", fix="give one JSON object a line, with id and text")
    return Side(name or path.stem, str(path), "file", rows, task, path.name, sha256(path))


def _header(path: Path) -> Mapping[str, Any] | None:
    """The header of our own ``predictions.jsonl``; None for a file of another tool."""
    for _, first in read_jsonl(path):
        return first if "format" in first and "set_counts" in first else None
    return None


def _predictions_side(path: Path, task: Task | None, name: str | None, constrained: bool) -> Side:
    """A ``predictions.jsonl`` of the evaluate stage, with what its manifest says."""
    header, rows = read_predictions(path)
    if constrained and not header["constrained"]:
        raise ConfigError(
            f"{path}: has no answers under the task's grammar",
            fix="leave --constrained out, or evaluate with evaluate.constrain: true",
        )
    folder = path.parent
    manifest = read_manifest(folder) if path.name == FILE_NAME else None
    model, sha = str(header["model"]), sha256(path)
    facts: Mapping[str, Any] = manifest.recorded if manifest is not None else {}
    if manifest is not None:
        sha = manifest.parents.get(run_model(model).folder, sha)
    run = folder.parent.parent if manifest is not None and folder.parent.name == EVALUATIONS else None
    asked = _asked_task(path, header, manifest, task)
    known = header.get("settings", {})
    return Side(
        name or model,
        str(path),
        "file",
        constrained_rows(rows) if constrained else rows,
        asked,
        str(run / run_model(model).folder) if run else model,
        sha,
        {"constrained": constrained, "batch_size": known.get("batch_size"), "temperature": 0.0},
        size_bytes=weights_on_disk(run / run_model(model).folder) if run else None,
        peak_memory_bytes=facts.get("peak_memory_bytes"),
        run=run,
    )


def _asked_task(path: Path, header: Row, manifest: Manifest | None, given: Task | None) -> Task:
    """The task of an evaluation: the one that its manifest has, else the given one, else the packaged one of
    that name.
    """
    raw = manifest.config.get("task") if manifest is not None else None
    if isinstance(raw, Mapping) and "schema" in raw:
        return _whole_task(parse_task(raw, f"{path.parent}/manifest.json"), path.parent.parent.parent)
    task = given
    if task is None and header["task"] in task_names():
        task = load_task(header["task"])
    if task is None or list(task.labels) != list(header["labels"]):
        raise ConfigError(
            f"{path}: answers of the task {header['task']!r}, which is not known here",
            fix="name the task: --task task.yaml",
        )
    return task


def _whole_task(asked: Task, run: Path) -> Task:
    """The task with the settings of its metrics, which manifests do not hold: from a model of the run or the
    packaged one, where prompt and schema are the same.
    """
    models = (read_trained_on(run / model.folder) for model in RUN_MODELS.values() if model.trained)
    packaged = [load_task(asked.name)] if asked.name in task_names() else []
    known = (*(model.task for model in models if model is not None and model.task is not None), *packaged)
    wanted = [to_mapping(asked)[key] for key in _PROMPT_KEYS]
    same = (task for task in known if [to_mapping(task)[key] for key in _PROMPT_KEYS] == wanted)
    return next(same, asked)


def run_side(run: Path, model: str | None, task: Task | None, constrained: bool) -> Side:
    """A model of a finished run, with its answers to the held-out rows of the run.

    Args:
        run: The run's folder.
        model: Its name, such as ``student``; None for the model that the run is for: the quantized student,
            else the student, else the teacher.
        task: The task, for runs that do not say it.
        constrained: Take the answers under the grammar of the task.

    Raises:
        ModelError: the run has not evaluated such a model.
    """
    folder = run / EVALUATIONS
    measured = [name for name in _MODELS if (folder / name / FILE_NAME).is_file()]
    if model is None and measured:
        model = next((name for name in _FINAL if name in measured), measured[-1])
    if model not in measured:
        raise ModelError(
            f"{run}: no evaluation of {model or 'any model'} in this run",
            fix=f"name one of {', '.join(measured)}: {run}:{measured[-1]}"
            if measured
            else f"finish the run: mlx-distill run RECIPE --out {run}",
        )
    side = file_side(folder / model / FILE_NAME, task, None, constrained=constrained)
    return replace(side, source=f"{run}:{model}", kind="run")


def weights_on_disk(folder: Path) -> int | None:
    """Bytes of a model's weights, an adapter's base included; None where there are none."""
    if not folder.is_dir():
        return None
    with os_errors():
        own = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHT_FILES)
    config = folder / "adapter_config.json"
    base = read_json(config).get("base") if config.is_file() else None
    shared = weights_on_disk((folder / base).resolve()) if base else 0
    return (own or 0) + (shared or 0) or None


def read_side(
    spec: str | Path, task: Task | None, reference: Reference | None, *, constrained: bool = False
) -> Side | None:
    """The side that a path names: a file of predictions, the folder of an evaluation, a run or ``RUN:model``;
    None for a model, which has to answer first.

    Raises:
        DataError: there is no such file or folder.
    """
    path = Path(spec).expanduser()
    run, _, model = str(spec).rpartition(":")
    if not path.exists() and run and _is_run(Path(run).expanduser()):
        return run_side(Path(run).expanduser(), model, task, constrained)
    if path.is_file():
        return file_side(path, task, reference, constrained=constrained)
    if (path / FILE_NAME).is_file():
        return file_side(path / FILE_NAME, task, reference, constrained=constrained)
    if _is_run(path):
        return run_side(path, None, task, constrained)
    if is_model(path):
        return None
    raise DataError(
        f"{spec}: neither a file of predictions nor the folder of a run or a model", fix="check the path"
    )


def _is_run(path: Path) -> bool:
    return is_run(path) or (path / EVALUATIONS).is_dir()


@dataclass(frozen=True)
class Paired:
    """The rows of both sides in one order, by id, with what they have in common.

    Attributes:
        a, b: Rows with the same ids in the same order, each with the true answer.
        split: The set that they are of.
        dataset_sha: A hash of the ids, the inputs where these are the same, and the true answers.
        variables: What differs between the sides besides the model, as sentences: the prompt, the schema, how
            answers were generated.
    """

    a: Sequence[Row]
    b: Sequence[Row]
    split: str
    dataset_sha: str
    variables: Sequence[str]


def pair_sides(a: Side, b: Side, reference: Reference | None, set_name: str | None = None) -> Paired:
    """Align both sides by id.

    Args:
        a, b: The sides.
        reference: The rows of ``--rows``, which then say what the true answers are.
        set_name: The set of rows; ``test`` by default, or the only one.

    Raises:
        DataError: an id occurs twice, a side has other ids, or the sides are of different data: another true
            answer, other fields, or another input under the same prompt. Nothing is ever left out silently.
    """
    split = _split(a, b, reference, set_name)
    by_id = [_by_id(side.rows, side.source, split) for side in (a, b)]
    if reference is not None:
        known = {id: row for id, row in reference.rows.items() if row["set"] in (None, split)}
        by_id = [
            _with_reference(rows, side, replace(reference, rows=known))
            for rows, side in zip(by_id, (a, b), strict=True)
        ]
    _check_ids(by_id[0], a.source, by_id[1], b.source)
    _check_same_data(by_id[0], by_id[1], a, b, same_prompt=not _differing_prompt(a, b))
    first, second = list(by_id[0].values()), [by_id[1][id] for id in by_id[0]]
    facts = sorted(
        (
            [x["id"], x.get("truth"), x.get("input") if x.get("input") == y.get("input") else None]
            for x, y in zip(first, second, strict=True)
        ),
        key=lambda fact: str(fact[0]),
    )
    return Paired(first, second, split, digest(facts), _variables(a, b))


def _split(a: Side, b: Side, reference: Reference | None, set_name: str | None) -> str:
    """The set whose rows are compared."""
    rows = [*a.rows, *b.rows, *(reference.rows.values() if reference else ())]
    names = list(dict.fromkeys(row["set"] for row in rows if row.get("set") is not None)) or [MAIN_SET]
    if set_name is not None and set_name not in names:
        raise DataError(f"no rows of the set {set_name!r}", fix=f"the sets: {', '.join(names)}")
    return set_name or (MAIN_SET if MAIN_SET in names else names[0])


def _by_id(rows: Sequence[Row], source: str, split: str) -> dict[str, Row]:
    """The rows of a set by id, and those that do not say of which they are."""
    out: dict[str, Row] = {}
    for row in rows:
        if row.get("set") not in (None, split):
            continue
        if row["id"] in out:
            raise DataError(
                f"{source}: id {row['id']!r} occurs twice",
                fix="keep one answer of each row; repeats need their own ids",
            )
        out[row["id"]] = row
    return out


def _check_ids(
    first: Mapping[str, Row], first_name: str, second: Mapping[str, Row], second_name: str
) -> None:
    """Refuse sides whose ids differ; an inner join would compare other rows than either model was asked."""
    parts = []
    for rows, others, name in ((first, second, second_name), (second, first, first_name)):
        missing = [id for id in rows if id not in others]
        if missing:
            named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            parts.append(f"{name} lacks {counted(len(missing), 'row')} of the other: {named}")
    if parts:
        raise DataError("; ".join(parts), fix="let both answer the same rows: a comparison leaves none out")


def _with_reference(rows: Mapping[str, Row], side: Side, reference: Reference) -> dict[str, Row]:
    """A side's rows with the true answers, fields and inputs of ``--rows``."""
    _check_ids(reference.rows, reference.source, rows, side.source)
    out: dict[str, Row] = {}
    for id, known in reference.rows.items():
        row = rows[id]
        own = row.get("truth")
        if own is not None and known["truth"] is not None and own != known["truth"]:
            raise _other_data(id, "true answer", side.source, reference.source)
        out[id] = {**row, **known}
    return out


def _check_same_data(
    first: Mapping[str, Row], second: Mapping[str, Row], a: Side, b: Side, *, same_prompt: bool
) -> None:
    keys = {"truth": "true answer", "fields": "fields"}
    if same_prompt:
        keys["input"] = "input"
    for id, row in first.items():
        for key, name in keys.items():
            if row.get(key) != second[id].get(key):
                raise _other_data(id, name, a.source, b.source)


def _other_data(id: str, what: str, first: str, second: str) -> DataError:
    return DataError(
        f"row {id!r} has another {what} in {second} than in {first}: these are two data sets",
        fix="evaluate both models on the same rows",
    )


def _differing_prompt(a: Side, b: Side) -> list[str]:
    """The keys of the task in which the two prompts differ."""
    if a.task is None or b.task is None:
        return []
    first, second = to_mapping(a.task), to_mapping(b.task)
    return [key for key in _PROMPT_KEYS if first[key] != second[key]]


def _variables(a: Side, b: Side) -> list[str]:
    """What differs besides the model, as sentences."""
    titles = {"system": "system prompt", "user": "user prompt", "schema": "schema of the answer"}
    out = [f"the {titles[key]} differs" for key in _differing_prompt(a, b)]
    names = {"constrained": "constrained", "batch_size": "batch size", "temperature": "temperature"}
    for key, name in names.items():
        x, y = a.settings.get(key), b.settings.get(key)
        if x is not None and y is not None and x != y:
            out.append(f"{name}: {x} for A, {y} for B")
    return out
