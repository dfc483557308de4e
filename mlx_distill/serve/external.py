"""Analyzers outside of the registry that an alias points to: a function or a URL that answers rows.

The target is what its owner has deployed on the command line; no request over HTTP can name one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.data.rows import to_item
from mlx_distill.errors import DataError, DistillError, ModelError
from mlx_distill.infer.predict import BAD_ROW
from mlx_distill.ledger.database import Ledger, from_json
from mlx_distill.records import Prediction
from mlx_distill.registry.external import call_external, verify_external
from mlx_distill.serve.loading import Resolved, key_of
from mlx_distill.tasks.answer import error_kind
from mlx_distill.tasks.task import Task, parse_task

FAILED = "external analyzer"
"""The kind of the error of a row that the analyzer did not answer."""
_ROWS = 16  # that it is asked at once
_THREADS = 8  # of calls; one that hangs keeps its thread


@dataclass(eq=False)
class ExternalAnalyzer:
    """An analyzer outside of the registry.

    Attributes:
        resolved: With its target.
        task: Its answers have to fit.
        timeout: Seconds after which a call has failed.
        since: When it was checked, in Unix seconds.
    """

    resolved: Resolved
    task: Task
    timeout: float
    since: float = field(default_factory=time.time)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, thread_name_prefix="external")
    )

    @property
    def key(self) -> str:
        """Of :func:`~mlx_distill.serve.loading.key_of`."""
        return key_of(self.resolved)

    def answer(self, rows: Sequence[tuple[str, Any]], task: Task | None = None) -> list[Prediction]:
        """The answers to rows, in their order; a row that cannot be asked, or was not answered, has an error.

        Sixteen rows are asked at once; where that fails they are asked one by one, unless it took as long as
        a call may.

        Args:
            rows: ``(where, row)``.
            task: Its answers have to fit; its own where None.
        """
        asked = task or self.task
        out: list[Prediction | None] = [None] * len(rows)
        good: list[tuple[int, dict[str, Any]]] = []
        for place, (where, row) in enumerate(rows):
            fields = {asked.input_fields[0]: row} if isinstance(row, str) else row
            try:
                item = to_item(row, asked, where)
                good.append((place, {**fields, "id": item.id}))
            except DataError as error:
                own = row.get("id", where) if isinstance(row, Mapping) else where
                out[place] = Prediction(str(own), "", None, None, None, error=str(error), error_kind=BAD_ROW)
        for start in range(0, len(good), _ROWS):
            part = good[start : start + _ROWS]
            for (place, _), prediction in zip(part, self._ask([row for _, row in part], asked), strict=True):
                out[place] = prediction
        return [prediction for prediction in out if prediction is not None]

    def _ask(self, rows: list[dict[str, Any]], task: Task) -> list[Prediction]:
        began = time.monotonic()
        try:
            answers = self._call(rows, task)
        except DistillError as error:
            if len(rows) > 1 and time.monotonic() - began < self.timeout:
                return [one for row in rows for one in self._ask([row], task)]
            return [
                Prediction(str(row["id"]), "", None, None, None, error=error.message, error_kind=FAILED)
                for row in rows
            ]
        took = (time.monotonic() - began) / len(rows)
        return [_prediction(row, answer, took) for row, answer in zip(rows, answers, strict=True)]

    def _call(self, rows: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
        target = self.resolved.target
        assert target is not None
        work = self._threads.submit(call_external, target, rows, task, timeout=self.timeout)
        try:
            return work.result(self.timeout)
        except TimeoutError as error:
            work.cancel()
            raise ModelError(
                f"{self.resolved.model}@{self.resolved.alias}: no answer within {self.timeout:g} seconds",
                fix="see why that analyzer is slow, or deploy another one",
            ) from error

    def close(self) -> None:
        """Take no further calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _prediction(row: Mapping[str, Any], answer: Mapping[str, Any], seconds: float) -> Prediction:
    error = answer["error"]
    return Prediction(
        str(row["id"]),
        answer["text"],
        answer["answer"],
        answer["label"],
        answer["score"],
        error=error,
        error_kind=None if error is None else error_kind("stop", error),
        latency_s=seconds,
    )


def check_external(ledger: Ledger, resolved: Resolved, timeout: float) -> ExternalAnalyzer:
    """An analyzer that has answered the rows of its deployment.

    Args:
        ledger: The ledger, which has the task and the rows.
        resolved: The alias, with its target.
        timeout: Seconds after which a call has failed.

    Raises:
        ModelError: it does not answer, or an answer does not fit.
    """
    target = resolved.target
    assert target is not None
    with ledger.read() as db:
        row = db.execute("SELECT gate FROM deployments WHERE id = ?", (resolved.deployment,)).fetchone()
    asked = from_json(row["gate"])["external"]
    task = parse_task(asked["task"], target)
    verify_external(target, asked["rows"], task, timeout=timeout)
    return ExternalAnalyzer(resolved, task, timeout)
