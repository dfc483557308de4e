"""A comparison as files for other tools: JSON, CSV, and a configuration of promptfoo with its test cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.categories import csv_text
from mlx_distill.storage import write_json, write_jsonl, write_text

Facts = Mapping[str, Any]
Case = Mapping[str, Any]
SUFFIXES = (".html", ".json", ".csv", ".yaml")
"""The files that a comparison can be written as; ``.yaml`` is promptfoo's."""
_COLUMNS = ["id", "change", "truth", "a", "b", "truth_score", "a_score", "b_score", "a_error", "b_error"]
_ROW_COLUMNS = ["title", "input", "true_answer", "a_answer", "b_answer"]
_SCHEMA_COMMENT = "# yaml-language-server: $schema=https://promptfoo.dev/config-schema.json\n"


def check_out(path: Path) -> None:
    """Refuse a file whose kind is not known, before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--out {path}: not a kind of file that a comparison is written as",
            fix=f"let the name end in one of {', '.join(SUFFIXES)} (.yaml is promptfoo's)",
        )


def write_comparison_json(path: Path, facts: Facts, cases: Sequence[Case], *, with_rows: bool) -> None:
    """The facts with one object a case; inputs, titles and whole answers only with rows."""
    write_json(path, {**facts, "rows": [case if with_rows else _without_texts(case) for case in cases]})


def _without_texts(case: Case) -> dict[str, Any]:
    """A case without texts of the data."""
    sides = {
        name: {key: case[name][key] for key in ("label", "score", "error_class", "label_probs")}
        for name in "ab"
    }
    truth = {key: case["truth"][key] for key in ("label", "score")}
    kept = {key: case[key] for key in ("id", "change", "slices", "differs")}
    return {**kept, "truth": truth, **sides}


def write_comparison_csv(path: Path, cases: Sequence[Case], *, with_rows: bool) -> None:
    """One line a case, with its slices as columns. A cell that a spreadsheet would take for a formula gets a
    quote before it.
    """
    slices = list(dict.fromkeys(name for case in cases for name in case["slices"]))
    columns = [*_COLUMNS, *slices, *(_ROW_COLUMNS if with_rows else [])]
    write_text(path, csv_text([_flat(case) for case in cases], columns))


def _flat(case: Case) -> dict[str, Any]:
    a, b, truth = case["a"], case["b"], case["truth"]
    return {
        **case["slices"],
        "id": case["id"],
        "change": case["change"],
        "truth": truth["label"],
        "a": a["label"],
        "b": b["label"],
        "truth_score": truth["score"],
        "a_score": a["score"],
        "b_score": b["score"],
        "a_error": a["error_class"],
        "b_error": b["error_class"],
        "title": case["title"],
        "input": case["input"],
        "true_answer": truth["answer"],
        "a_answer": a["answer"] if a["answer"] is not None else a["text"],
        "b_answer": b["answer"] if b["answer"] is not None else b["text"],
    }


def write_promptfoo(
    path: Path, facts: Facts, cases: Sequence[Case], schema: Mapping[str, Any], label: str | None
) -> list[Path]:
    """A configuration for ``promptfoo eval -c FILE`` and its test cases, which replay both models' answers.

    The answers are variables of the test cases, and promptfoo's ``echo`` provider returns them, so that
    nothing is asked again. Each test asserts with ``is-json`` that the answer fits the task's schema, and
    that its label (of a task without one: the whole answer) is the true one.

    Args:
        path: The YAML file; the test cases are written beside it, with the suffix ``.jsonl``.
        facts: The comparison.
        cases: Its cases.
        schema: The JSON schema of the answer.
        label: The task's label field.

    Returns:
        The files.
    """
    import yaml

    tests = path.with_suffix(".jsonl")
    config = {
        "description": _plain(facts["sentence"]),
        "prompts": [
            {"raw": "{{a}}", "label": f"A: {_plain(facts['a']['name'])}"},
            {"raw": "{{b}}", "label": f"B: {_plain(facts['b']['name'])}"},
        ],
        "providers": [{"id": "echo", "label": "recorded answers"}],
        "defaultTest": {"assert": [{"type": "is-json", "value": dict(schema), "metric": "fits the task"}]},
        "tests": f"file://{tests.name}",
    }
    write_jsonl(tests, _tests(cases, label))
    write_text(path, _SCHEMA_COMMENT + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return [path, tests]


def _tests(cases: Sequence[Case], label: str | None) -> Iterator[dict[str, Any]]:
    for case in cases:
        test: dict[str, Any] = {
            "description": _plain(case["id"]),
            "vars": {
                "input": _plain(case["input"]),
                "a": _answer_text(case["a"]),
                "b": _answer_text(case["b"]),
            },
            "metadata": {"id": _plain(case["id"]), "change": case["change"]}
            | {name: _plain(str(value)) for name, value in case["slices"].items() if value is not None},
        }
        truth = case["truth"]["answer"]
        if truth:
            wanted = {label: truth[label]} if label and label in truth else dict(truth)
            properties = {name: {"const": value} for name, value in wanted.items()}
            schema = {"type": "object", "required": list(wanted), "properties": properties}
            test["assert"] = [{"type": "is-json", "value": schema, "metric": "right"}]
        yield test


def _answer_text(side: Case) -> str:
    """An answer as JSON text. What promptfoo's templates would take for their own (``{{``, ``{%``, ``{#``)
    can only stand inside a string of JSON, where an escape says the same.
    """
    if side["answer"] is None:
        return _plain(side["text"] or "")
    text = json.dumps(side["answer"], ensure_ascii=False)
    for mark in "{%#":
        text = text.replace("{" + mark, f"{{\\u{ord(mark):04x}")
    return text


def _plain(text: str) -> str:
    """A text of the data in which promptfoo finds neither a template nor a file to read: a zero-width space
    separates the characters that would mark one.
    """
    for mark in "{%#":
        text = text.replace("{" + mark, "{\u200b" + mark)
    start = text.lstrip()
    return f"\u200b{text}" if start.startswith(("file:", "package:", "http:", "https:")) else text
