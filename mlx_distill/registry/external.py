"""Analyzers outside of the registry, which an alias may point to: a function, or a URL."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.evaluate.user_metrics import load_function
from mlx_distill.tasks.answer import parse_answer
from mlx_distill.tasks.task import Task

_MAX_BYTES = 16 << 20  # of an answer over the network


def check_target(target: str) -> str:
    """A target of an alias: ``module:function``, or the URL of an endpoint.

    Raises:
        ConfigError: it is neither, or a URL with a user name or password, which the ledger would keep.
    """
    if "://" in target:
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{parts.scheme}://: no http or https address", fix="write https://host/path")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"{parts.hostname}: an address with a password or a query, which may be a secret",
                fix="write the address alone; let the endpoint trust this machine, or put a proxy before it",
            )
        return target
    module, mark, function = target.partition(":")
    if not mark or not all(part.isidentifier() for part in module.split(".")) or not function.isidentifier():
        raise ConfigError(f"{target}: neither module:function nor a URL", fix="write module:function")
    return target


def call_external(
    target: str, rows: Sequence[Mapping[str, Any]], task: Task, *, timeout: float = 30.0
) -> list[dict[str, Any]]:
    """The answers of an analyzer outside of the registry.

    A function is called with a list of rows (dicts) and returns a list; the module is imported from
    ``sys.path``. A URL gets ``POST {"items": [row, ...]}`` and answers with a list, alone or under
    ``results``; it is not followed to another address. Each element is an answer (a mapping, or its JSON
    text), or ``{"answer": ...}``.

    Args:
        target: ``module:function`` or a URL; never from a request over HTTP.
        rows: With ``id`` and the fields of the task.
        task: Answers are parsed strictly by its schema.
        timeout: Seconds to wait for a URL.

    Returns:
        One for each row, in their order: ``id``, ``text``, ``answer`` (None where it does not fit the task),
        ``label``, ``score`` and ``error``.

    Raises:
        ConfigError: no such module or function.
        ModelError: it failed, did not answer in time, or gave another number of answers.
    """
    check_target(target)
    asked = [dict(row) for row in rows]
    raw = _post(target, asked, timeout) if "://" in target else _call(target, asked)
    if isinstance(raw, Mapping):
        raw = raw.get("results")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or len(raw) != len(asked):
        count = len(raw) if isinstance(raw, Sequence) and not isinstance(raw, str) else "no list of"
        raise ModelError(
            f"{target}: {count} answers to {len(asked)} rows", fix="return one answer for each row"
        )
    return [_answer(row, value, task) for row, value in zip(asked, raw, strict=True)]


def _answer(row: Mapping[str, Any], value: Any, task: Task) -> dict[str, Any]:
    if isinstance(value, Mapping) and "answer" in value and "answer" not in task.schema["properties"]:
        value = value["answer"]
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        return _parsed(row, "", None, f"no JSON: {error}", task)
    answer, error_text = parse_answer(text, task.schema)
    return _parsed(row, text, answer, error_text, task)


def _parsed(
    row: Mapping[str, Any], text: str, answer: Mapping[str, Any] | None, error: str | None, task: Task
) -> dict[str, Any]:
    return {
        "id": str(row.get(task.id, row.get("id", ""))),
        "text": text,
        "answer": answer,
        "label": answer.get(task.label) if answer and task.label else None,
        "score": answer.get(task.score) if answer and task.score else None,
        "error": error,
    }


def _call(target: str, rows: list[dict[str, Any]]) -> Any:
    function = load_function(target, (), target)
    try:
        answers = function(rows)
        return answers if isinstance(answers, Mapping) else list(answers)
    except Exception as error:
        raise ModelError(
            f"{target}: the function failed: {type(error).__name__}: {error}",
            fix="correct it: it gets a list of rows and returns one answer for each",
        ) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # the address would be another one than the one that was deployed


def _post(target: str, rows: list[dict[str, Any]], timeout: float) -> Any:
    body = json.dumps({"items": rows}, ensure_ascii=False).encode("utf-8", "replace")
    request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as response:
            raw = response.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ModelError(f"{target}: status {error.code}", fix="see the log of that service") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ModelError(
            f"{target}: no answer: {reason}", fix="start that service, or check the address"
        ) from error
    if len(raw) > _MAX_BYTES:
        raise ModelError(f"{target}: an answer of more than {_MAX_BYTES >> 20} MB", fix="send fewer rows")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{target}: the answer is no JSON", fix="return a JSON list of answers") from error


def verify_external(
    target: str, rows: Sequence[Mapping[str, Any]], task: Task, *, timeout: float = 30.0
) -> dict[str, Any]:
    """Ask an analyzer its golden rows; every answer has to fit the task.

    Returns:
        What is kept with the deployment: ``passed``, ``sentence`` and ``rows``.

    Raises:
        DataError: there are no rows.
        ModelError: it fails, or an answer does not fit.
    """
    if not rows:
        raise DataError(f"{target}: no rows to check it with", fix="give some: --rows FILE")
    answers = call_external(target, rows, task, timeout=timeout)
    bad = next((answer for answer in answers if answer["answer"] is None), None)
    if bad is not None:
        raise ModelError(
            f"{target}: its answer to row {bad['id']!r} does not fit the task {task.name!r}: {bad['error']}",
            fix="let it return the fields of the task's schema; what serves is unchanged",
        )
    sentence = f"its answers to {len(rows)} rows fit the task {task.name}"
    return {"passed": True, "sentence": sentence, "rows": [{"id": a["id"], "same": "valid"} for a in answers]}
