"""Claims of answers that cannot be true: checkers of the answers' fields, and the rates of what they find.

The checkers are deterministic: lists of books and verses, vocabularies, the row's own text, or a user's
function. A claim that is *invalid* is one that cannot be true (no such verse, no such theme). Whether a claim
has *support* in the row's text is another question, with figures of its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.claims import VERDICTS, Claim
from mlx_distill.evaluate.scripture import check_value, find_references, load_versification
from mlx_distill.evaluate.user_metrics import load_function
from mlx_distill.metrics.clusters import cluster_numbers, clustered_rate, effective_rows
from mlx_distill.metrics.corrected import corrected_rate
from mlx_distill.metrics.intervals import rate
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.references import Checker, read_names
from mlx_distill.tasks.task import Task
from mlx_distill.text import did_you_mean, known_names

Row = Mapping[str, Any]
Check = Callable[[Any, Row], list[Claim]]
"""A field's value and the row to claims."""

MAX_ROWS = 40
"""The number of rows with invalid claims that are listed for each model and field."""


class Checked(NamedTuple):
    """The claims of one answer's field."""

    row: Row
    claims: list[Claim]


def make_checker(checker: Checker, task: Task) -> Check:
    """The function that checks one field's values.

    Args:
        checker: What the task says of it.
        task: Whose files it may name, and in whose folders a user's module may be.

    Raises:
        ConfigError: no such file, versification or function.
    """
    if checker.is_function:
        return _own(
            load_function(checker.kind, task.folders, f"{task.name}: references: {checker.field}"),
            checker.kind,
        )
    if checker.kind == "scripture":
        name = str(checker.options.get("versification", "kjv"))
        versification = load_versification(str(task.file(name)) if name.endswith(".json") else name)
        return lambda value, row: _each(
            value, lambda text, single: check_value(text, versification, in_text=single)
        )
    if checker.kind == "vocabulary":
        listed = checker.options["list"]
        words = read_names(task.file(listed)) if isinstance(listed, str) else list(listed)
        return lambda value, row: _each(value, lambda text, _: [_in_vocabulary(text, words)])
    fields = tuple(checker.options.get("in", ()))
    fields = (str(checker.options["in"]),) if isinstance(checker.options.get("in"), str) else fields
    return lambda value, row: _each(value, lambda text, _: [_supported(text, _row_text(row, fields, task))])


def _each(value: Any, check: Callable[[str, bool], list[Claim]]) -> list[Claim]:
    """The claims of a text, or of the texts of a list; of other values none."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [
        replace(claim, item=item)
        for item, text in enumerate(texts)
        if isinstance(text, str)
        for claim in check(text, isinstance(value, str))
    ]


def _in_vocabulary(text: str, words: Sequence[str]) -> Claim:
    if text in words:
        return Claim(text, "valid", "", 0, len(text), reading=text)
    near = did_you_mean(text, words)
    return Claim(text, "invalid", f"not in the list{near and f'; {near}'}", 0, len(text))


def _supported(text: str, source: str) -> Claim:
    """Whether a text, or the scripture reference that it is, stands in another one."""
    supported = Claim(text, "valid", "", 0, len(text))
    words = _words(text)
    if words and f" {words} " in f" {_words(source)} ":
        return supported
    versification = load_versification("kjv")
    readings = {claim.reading for claim in find_references(source, versification)} - {None}
    if readings & {claim.reading for claim in check_value(text, versification, in_text=False)}:
        return supported
    return replace(supported, verdict="invalid", reason="not in the row's text")


def _words(text: str) -> str:
    """The words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _row_text(row: Row, fields: Sequence[str], task: Task) -> str:
    """The row's texts of some fields; those that are only in the prompt are its ``input``."""
    own = row.get("fields") or {}
    texts = []
    for name in fields or ("input",):
        if isinstance(own.get(name), str):
            texts.append(own[name])
        elif name == "input" or name in task.input_fields:
            texts.append(str(row.get("input") or ""))
        elif name not in own:
            known = [*own, *task.input_fields, "input"]
            raise ConfigError(
                f"{task.name}: support in {name!r}: row {row.get('id')!r} has no such field",
                fix=known_names(name, known, "fields are"),
            )
    return "\n".join(dict.fromkeys(texts))


def _own(function: Callable[..., Any], name: str) -> Check:
    """A user's function, whose claims may be mappings."""

    def check(value: Any, row: Row) -> list[Claim]:
        try:
            claims = list(function(value, row))
        except Exception as error:
            raise DataError(
                f"{name} fails on row {row.get('id')!r}: {error!r}", fix="correct the function"
            ) from error
        return [_own_claim(claim, name) for claim in claims]

    return check


def _own_claim(claim: Any, name: str) -> Claim:
    if isinstance(claim, Mapping):
        with suppress(TypeError):
            claim = Claim(**claim)
    if not isinstance(claim, Claim) or claim.verdict not in VERDICTS:
        raise DataError(
            f"{name}: {claim!r} is no claim",
            fix="return a list of mappings with text, verdict (valid, invalid, not checkable) and reason",
        )
    return claim


def answer_values(row: Row) -> Mapping[str, Any] | None:
    """The fields of an answer; also of one that does not fit the schema, if it is a JSON object. None where
    the answer cannot be read.
    """
    if row.get("answer") is not None:
        return row["answer"]
    with suppress(ValueError, RecursionError):
        value = json.loads(str(row.get("text") or ""))
        return value if isinstance(value, dict) else None
    return None


def reference_metrics(rows: Sequence[Row], task: Task, *, confidence: float = 0.95) -> dict[str, Any]:
    """The rates of invalid claims in the answers of one model.

    Answers that cannot be read as JSON claim nothing that could be checked; they are counted as
    ``unreadable_answers`` and are in no rate. Claims that are not checkable are counted and are in no rate.

    Args:
        rows: Its predictions.
        task: ``references`` names the checkers of the answer's fields.
        confidence: Level of the intervals.

    Returns:
        Empty for a task without checkers, else

        - ``hallucination_rate``: invalid claims / checkable claims, of all fields, with Wilson's interval at
          the effective number of claims, since claims of one answer are not independent;
        - ``hallucinated_answers``: answers with an invalid claim / answers that can be read;
        - ``references``: by field ``claims``, the counts ``valid``, ``invalid`` and ``not_checkable``, the
          same two rates as ``per_claim`` and ``per_answer``, ``answers_with_claims`` and
          ``answers_with_invalid_claims``, the most frequent ``reasons``, the first ``rows`` with invalid
          claims, ``corrected`` (see below), and ``support``;
        - ``unreadable_answers``.

        ``corrected`` is the rate of claims corrected by the checker's own errors on the sample ``checked``,
        whose lines are ``{"id", "claim", "verdict"}`` with a person's verdict (:func:`corrected_rate`).

    Raises:
        ConfigError: a checker that names what does not exist.
        DataError: a line of a hand-checked sample that is none, or a user's function that fails.
    """
    if not task.references:
        return {}
    answers = [(row, answer_values(row)) for row in rows]
    readable = [(row, values) for row, values in answers if values is not None]
    fields: dict[str, dict[str, Any]] = {}
    checked: list[Checked] = []
    for checker in task.checkers:
        check = make_checker(checker, task)
        found = [Checked(row, check(values.get(checker.field), row)) for row, values in readable]
        field = fields.setdefault(checker.field, {})
        if checker.kind == "support":
            field["support"] = _support(found, checker, confidence)
        else:
            field |= _field(found, checker, confidence)
            field["corrected"] = _corrected(found, checker, check, task, confidence)
            checked += found
    out: dict[str, Any] = {"references": fields, "unreadable_answers": len(answers) - len(readable)}
    if checked:
        out["hallucination_rate"] = _per_claim(checked, confidence)
        out["hallucinated_answers"] = _per_answer(checked, confidence)
    return out


def _key(row: Row) -> tuple[str, str]:
    return str(row.get("set", "")), str(row["id"])


def _checkable(found: Iterable[Checked]) -> tuple[list[bool], list[tuple[str, str]]]:
    """Of each checkable claim whether it is invalid, and its answer."""
    pairs = [
        (claim.verdict == "invalid", _key(entry.row))
        for entry in found
        for claim in entry.claims
        if claim.verdict != "not checkable"
    ]
    return [flag for flag, _ in pairs], [key for _, key in pairs]


def _per_claim(found: Iterable[Checked], confidence: float) -> dict[str, Any]:
    return dict(clustered_rate(*_checkable(found), confidence))


def _per_answer(found: Iterable[Checked], confidence: float) -> dict[str, Any]:
    invalid: dict[tuple[str, str], bool] = {}
    for row, claims in found:
        invalid[_key(row)] = invalid.get(_key(row), False) or _is_invalid(claims)
    return dict(rate(sum(invalid.values()), len(invalid), confidence))


def _is_invalid(claims: Iterable[Claim]) -> bool:
    return any(claim.verdict == "invalid" for claim in claims)


def _field(found: Sequence[Checked], checker: Checker, confidence: float) -> dict[str, Any]:
    counts = Counter(claim.verdict for entry in found for claim in entry.claims)
    reasons = Counter(
        claim.reason for entry in found for claim in entry.claims if claim.verdict != "valid" and claim.reason
    )
    return {
        "checker": checker.kind,
        "versification": checker.options.get("versification", "kjv") if checker.kind == "scripture" else None,
        "claims": counts.total(),
        "valid": counts["valid"],
        "invalid": counts["invalid"],
        "not_checkable": counts["not checkable"],
        "answers": len(found),
        "answers_with_claims": sum(bool(entry.claims) for entry in found),
        "answers_with_invalid_claims": sum(_is_invalid(entry.claims) for entry in found),
        "per_claim": _per_claim(found, confidence),
        "per_answer": _per_answer(found, confidence),
        "reasons": [{"reason": reason, "count": count} for reason, count in reasons.most_common(8)],
        "rows": _listed(found),
    }


def _listed(found: Sequence[Checked]) -> list[dict[str, Any]]:
    """The first rows with invalid claims, and these claims."""
    flagged = [entry for entry in found if _is_invalid(entry.claims)]
    return [
        {
            "id": row["id"],
            "title": row.get("title"),
            "claims": [claim.to_json() for claim in claims if claim.verdict == "invalid"],
        }
        for row, claims in flagged[:MAX_ROWS]
    ]


def _support(found: Sequence[Checked], checker: Checker, confidence: float) -> dict[str, Any]:
    unsupported, keys = _checkable(found)
    return {
        "in": checker.options.get("in", "input"),
        "supported": dict(clustered_rate([not flag for flag in unsupported], keys, confidence)),
        "rows": _listed(found),
    }


def _corrected(
    found: Sequence[Checked], checker: Checker, check: Check, task: Task, confidence: float
) -> dict[str, Any] | None:
    """The rate of invalid claims corrected by the checker's own errors; None without a hand-checked sample,
    and with the reason where the sample does not tell them.
    """
    if "checked" not in checker.options:
        return None
    own, people = _sample(checker, check, task, {str(entry.row["id"]): entry.row for entry in found})
    invalid, keys = _checkable(found)
    wrong = [flag for flag, truth in zip(own, people, strict=True) if truth]
    right = [flag for flag, truth in zip(own, people, strict=True) if not truth]

    def corrected(flagged: int, n: int) -> dict[str, Any]:
        return dict(
            corrected_rate(
                flagged,
                n,
                true_positives=sum(wrong),
                positives=len(wrong),
                true_negatives=len(right) - sum(right),
                negatives=len(right),
                confidence=confidence,
            )
        )

    try:
        out = corrected(sum(invalid), len(invalid))
        if invalid:
            # Claims of one answer are not independent: the interval is that of as many independent claims.
            rows = effective_rows(np.array(invalid, dtype=float), cluster_numbers(keys, len(keys)))
            n = max(1, int(rows))
            wider = corrected(round(n * sum(invalid) / len(invalid)), n)
            out |= {"low": min(wider["low"], out["low"]), "high": max(wider["high"], out["high"])}
    except DataError as error:
        return {"value": None, "low": None, "high": None, "n": 0, "checked": len(own), "reason": str(error)}
    return {**out, "checked": len(own), "reason": None}


def _sample(
    checker: Checker, check: Check, task: Task, rows: Mapping[str, Row]
) -> tuple[list[bool], list[bool]]:
    """Of each line of the hand-checked sample whether the checker and whether a person calls it invalid."""
    path = task.file(str(checker.options["checked"]))
    is_list = task.schema["properties"][checker.field].get("type") == "array"
    own, people = [], []
    for number, line in read_jsonl(path):
        claim, verdict = line.get("claim"), line.get("verdict")
        if not isinstance(claim, str) or verdict not in ("valid", "invalid"):
            raise DataError(
                f"{path}:{number}: no hand-checked claim",
                fix='write {"id": ..., "claim": "Romans 8:28", "verdict": "valid" or "invalid"}',
            )
        value = [claim] if is_list else claim
        verdicts = {found.verdict for found in check(value, rows.get(str(line.get("id")), line))}
        if "invalid" in verdicts or verdicts == {"valid"}:
            own.append("invalid" in verdicts)
            people.append(verdict == "invalid")
    return own, people
