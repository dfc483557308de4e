"""Edge cases: unusual rows with the behaviour that is expected of a model, and how often it behaves so.

A line of the file is a row of the task with

- ``id``, and ``kind``, by which cases are counted;
- ``expect``: a list of alternatives, one of which has to hold: ``{"answer": SCHEMA}``, a valid answer that
  also fits this JSON schema, or ``{"error": KIND}``, an error of this kind, such as ``bad row`` or ``prompt
  too long``;
- ``why``: one line for people.

A long text is written as ``{"text": "la la la\\n", "repeat": 12000}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.references import make_checker
from mlx_distill.metrics.intervals import rate
from mlx_distill.records import Prediction
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.answer import CUT, FAILED, NOT_JSON, NOT_VALID, check_answer
from mlx_distill.tasks.schema import validator_of
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names

FILE_NAME = "edge_cases.jsonl"
BAD_ROW, LONG_PROMPT = "bad row", "prompt too long"
ERRORS = (BAD_ROW, LONG_PROMPT, NOT_JSON, NOT_VALID, CUT, FAILED)
"""The kinds of errors of :mod:`mlx_distill.infer.predict` and :mod:`mlx_distill.tasks.answer`."""
_OWN_KEYS = frozenset({"kind", "expect", "why"})


@dataclass(frozen=True)
class EdgeCase:
    """One case: its row, and what is expected. ``least_tokens`` is a number of tokens that the prompt has at
    least, so that a text that was shortened without a word is noticed.
    """

    id: str
    kind: str
    row: Mapping[str, Any]
    expect: tuple[Mapping[str, Any], ...]
    why: str
    least_tokens: int = 0


def load_edge_cases(path: str | Path) -> list[EdgeCase]:
    """The cases of a file, with repeated texts written out.

    Raises:
        DataError: a line without id, kind or a valid ``expect``, or an id that occurs twice; with its number.
    """
    cases: list[EdgeCase] = []
    ids: set[str] = set()
    for number, line in read_jsonl(path):
        where = f"{path}:{number}"
        case = _case(line, where)
        if case.id in ids:
            raise DataError(f"{where}: id {case.id!r} occurs twice", fix="give every case its own id")
        ids.add(case.id)
        cases.append(case)
    if not cases:
        raise DataError(f"{path}: no edge cases", fix="write one a line")
    return cases


def _case(line: Mapping[str, Any], where: str) -> EdgeCase:
    for key in ("id", "kind"):
        if not isinstance(line.get(key), str) or not line[key]:
            raise DataError(f"{where}: no {key}", fix=f"add {key}, a text")
    expect = line.get("expect")
    if not isinstance(expect, list) or not expect:
        raise DataError(f"{where}: no expect", fix='add "expect": [{"answer": {}}] or [{"error": "bad row"}]')
    for one in expect:
        _check_expectation(one, where)
    row: dict[str, Any] = {}
    least = 0
    for key, written in line.items():
        value: Any = written
        if isinstance(value, Mapping) and value.keys() == {"text", "repeat"}:
            if not isinstance(value["text"], str) or not isinstance(value["repeat"], int):
                raise DataError(
                    f"{where}: {key}: text or repeat is none", fix="give a text and a whole number"
                )
            value, least = value["text"] * value["repeat"], value["repeat"]
        if key not in _OWN_KEYS:
            row[key] = value
    return EdgeCase(line["id"], line["kind"], row, tuple(expect), str(line.get("why") or ""), least)


def _check_expectation(one: Any, where: str) -> None:
    key = next(iter(one), None) if isinstance(one, Mapping) and len(one) == 1 else None
    if key == "answer" and isinstance(one["answer"], Mapping):
        try:
            validator_of(one["answer"], f"{where}: expect: answer")
        except ConfigError as error:
            raise DataError(error.message, fix=error.fix) from error
    elif key != "error":
        raise DataError(f"{where}: expect: {one!r}", fix='write {"answer": SCHEMA} or {"error": KIND}')
    elif one["error"] not in ERRORS:
        raise DataError(
            f"{where}: expect: no error {one['error']!r}",
            fix=known_names(str(one["error"]), ERRORS, "errors are"),
        )


def edge_case_file(task: Task) -> Path:
    """The file of a task's edge cases, which are read to see that they can be.

    Raises:
        ConfigError: the task names none.
        DataError: a line that is no case.
    """
    if task.edge_cases is None:
        raise ConfigError(f"{task.name}: no edge_cases", fix="name a file of cases in the task")
    path = task.file(task.edge_cases)
    load_edge_cases(path)
    return path


def run_edge_cases(
    model: Any, task: Task, cases: Sequence[EdgeCase] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Ask a model the cases, by the same path as ``analyze``, and judge what it does.

    Args:
        model: What :class:`~mlx_distill.infer.analyze.Analyzer` takes: a folder, a run, or what ``md.load``
            returned.
        task: The task.
        cases: The cases; those of the file that the task names (``edge_cases``) where None.
        **settings: The other arguments of :class:`~mlx_distill.infer.analyze.Analyzer`.

    Returns:
        The outcome of each case, see :func:`judge`.

    Raises:
        ConfigError: no cases are given and the task names none.
    """
    from mlx_distill.infer.analyze import Analyzer

    if cases is None:
        cases = load_edge_cases(edge_case_file(task))
    analyzer = Analyzer(model, task, **{"label_probs": False, **settings})
    predictions = analyzer.analyze([case.row for case in cases])
    return [judge(case, prediction, task) for case, prediction in zip(cases, predictions, strict=True)]


def judge(case: EdgeCase, prediction: Prediction, task: Task) -> dict[str, Any]:
    """Whether a model did as expected.

    An answer has to fit the task's schema and the case's, must not make a claim that the task's checkers call
    invalid, and must be an answer to the whole text, or say what was cut.

    Returns:
        ``id``, ``kind``, ``title``, ``why``, ``behaved``, ``reason`` (why not), and what the model did:
        ``did`` (``answer`` or the kind of error), ``text``, ``error``, ``cut``.
    """
    reasons = [_mismatch(one, case, prediction, task) for one in case.expect]
    behaved = None in reasons
    title = case.row.get(task.title) if task.title else None
    return {
        "id": case.id,
        "kind": case.kind,
        "title": title if isinstance(title, str) and title.strip() else None,
        "why": case.why,
        "behaved": behaved,
        "reason": None if behaved else "; ".join(dict.fromkeys(str(reason) for reason in reasons)),
        "did": "answer" if prediction.answer is not None else prediction.error_kind or "error",
        "text": prediction.text[:2_000],
        "error": prediction.error,
        "cut": dict(prediction.cut) if prediction.cut else None,
    }


def _mismatch(one: Mapping[str, Any], case: EdgeCase, prediction: Prediction, task: Task) -> str | None:
    """Why what a model did is not one alternative of what is expected; None where it is."""
    if "error" in one:
        if prediction.answer is None and prediction.error_kind == one["error"]:
            return None
        did = "an answer" if prediction.answer is not None else f"the error {prediction.error_kind!r}"
        return f"{did} instead of the error {one['error']!r}"
    if prediction.answer is None:
        return f"{prediction.error_kind}: {prediction.error}"
    if not prediction.cut and prediction.prompt_tokens < case.least_tokens:
        return f"the prompt had {prediction.prompt_tokens:,} tokens: its text was shortened without a word"
    problem = check_answer(prediction.answer, task.schema) or check_answer(prediction.answer, one["answer"])
    return problem or _invalid_claim(prediction, task)


def _invalid_claim(prediction: Prediction, task: Task) -> str | None:
    row = {"id": prediction.id, "fields": prediction.fields, "input": ""}
    for checker in task.checkers:
        if checker.kind == "support":
            continue
        for claim in make_checker(checker, task)((prediction.answer or {}).get(checker.field), row):
            if claim.verdict == "invalid":
                return f"{checker.field}: {claim.text!r}: {claim.reason}"
    return None


def edge_case_metrics(outcomes: Sequence[Mapping[str, Any]], *, confidence: float = 0.95) -> dict[str, Any]:
    """How many cases of each kind a model handles as expected.

    Args:
        outcomes: Of :func:`run_edge_cases`.
        confidence: Level of the intervals.

    Returns:
        ``behaved``, the rate over all; ``kinds``, that of each kind; ``did``, counts of answers and kinds of
        errors; ``cut``, how many were cut; ``rows``, those that did not behave.

    >>> outcomes = [{"id": str(i), "kind": "empty", "behaved": i > 0, "did": "answer"} for i in range(4)]
    >>> figures = edge_case_metrics(outcomes)
    >>> figures["kinds"]["empty"]["value"], [row["id"] for row in figures["rows"]]
    (0.75, ['0'])
    """
    kinds: dict[str, list[bool]] = {}
    did: dict[str, int] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome["kind"], []).append(bool(outcome["behaved"]))
        did[outcome["did"]] = did.get(outcome["did"], 0) + 1
    everything = [hit for hits in kinds.values() for hit in hits]
    return {
        "behaved": rate(sum(everything), len(everything), confidence),
        "kinds": {kind: rate(sum(hits), len(hits), confidence) for kind, hits in kinds.items()},
        "did": did,
        "cut": sum(bool(outcome.get("cut")) for outcome in outcomes),
        "rows": [dict(outcome) for outcome in outcomes if not outcome["behaved"]],
    }
