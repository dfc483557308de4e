"""Answers and labels for rows of a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

from anyio import from_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from mlx_distill.errors import ConfigError
from mlx_distill.infer.label_scorer import LabelOptions
from mlx_distill.infer.shared_answers import SharedAnswers
from mlx_distill.infer.worker import Cancelled
from mlx_distill.records import Classification, Prediction
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.loading import ServedModel
from mlx_distill.serve.usage import REFUSED, error_type, usage_of
from mlx_distill.tasks.task import Task, load_task, task_names

router = APIRouter()
Item = dict[str, Any] | str


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, max_length=500)
    task: str | None = Field(None, max_length=100, description="A packaged task instead of the model's.")
    long: Literal["refuse", "cut"] = "refuse"


class _Answers(_Body):
    max_tokens: int | None = Field(None, ge=1, le=100_000)
    constrain: bool = True
    label_probs: bool = True


class AnalyzeRequest(_Answers):
    """One row to be answered."""

    item: Item


class BatchRequest(_Answers):
    """Rows to be answered in their order."""

    items: list[Item] = Field(min_length=1)


class ClassifyRequest(_Body):
    """Rows to be labelled without a generated answer; the options are those of ``md.classify``."""

    items: list[Item] = Field(min_length=1)
    normalize: Literal["none", "string", "tokens", "bytes"] = "none"
    shuffle_options: int = Field(1, ge=1, le=24)
    temperature: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)


@router.post("/v1/analyze")
def analyze(request: Request, body: AnalyzeRequest) -> dict[str, Any]:
    """The answer to one row. A row that cannot be asked is 400; a text that does not fit the schema is an
    answer with ``error``.
    """
    began = time.perf_counter()
    with request.app.state.server.pool.get(body.model) as served:
        prediction = _predict(request, served, body, [body.item])[0]
        if prediction.error_kind in REFUSED:
            raise ApiError(400, prediction.error or "", code=error_type(prediction), param="item")
        out = to_json(prediction)
        out |= {"model": model_json(served), "constrained": body.constrain and served.external is None}
    return out | {"latency_ms": _since(began)}


@router.post("/v1/analyze/batch")
def analyze_batch(request: Request, body: BatchRequest) -> dict[str, Any]:
    """The answers to rows, in their order; a row without an answer has an ``error`` in its place."""
    began = time.perf_counter()
    _check_count(request, body.items)
    with request.app.state.server.pool.get(body.model) as served:
        predictions = _predict(request, served, body, body.items)
        out = _listed([to_json(prediction) for prediction in predictions], served)
        out["constrained"] = body.constrain and served.external is None
    return out | {"latency_ms": _since(began)}


@router.post("/v1/classify")
def classify(request: Request, body: ClassifyRequest) -> dict[str, Any]:
    """The label of each row and the probabilities of all labels, without generating an answer."""
    began = time.perf_counter()
    _check_count(request, body.items)
    options = LabelOptions(body.normalize, body.shuffle_options, temperature=body.temperature)
    with request.app.state.server.pool.get(body.model) as served:
        labelled = _answered(request, served, _classifier(served, body, options))
        out = _listed([_classification(one) for one in labelled], served)
    return out | {"latency_ms": _since(began)}


def _classifier(
    served: ServedModel, body: ClassifyRequest, options: LabelOptions
) -> Callable[[], list[Classification]]:
    """What labels the rows of a request: the model, or the answers of an analyzer outside of the registry,
    which has no probabilities.
    """
    external = served.external
    if external is not None:
        if options != LabelOptions():
            raise ApiError(
                400,
                f"{served.name}: an analyzer outside of the registry, which has no probabilities "
                "(leave out normalize, shuffle_options and temperature)",
                code="external_analyzer",
                param="model",
            )
        task = served.task if body.task is None else _packaged(body.task)
        return lambda: [_label(one) for one in external.answer(_placed(body.items), task)]
    answers = shared_answers(served, body.task)
    return lambda: answers.classify(_placed(body.items), options, long=body.long)


def _label(one: Prediction) -> Classification:
    return Classification(one.id, one.label, None, error=one.error, error_kind=one.error_kind)


def _listed(data: list[dict[str, Any]], served: ServedModel) -> dict[str, Any]:
    """The answers to several rows, with how many have an error and the model that gave them."""
    errors = sum(one["error"] is not None for one in data)
    return {"object": "list", "data": data, "errors": errors, "model": model_json(served)}


def shared_answers(served: ServedModel, task: str | None = None) -> SharedAnswers:
    """What answers rows of a task with a served model, made once for all requests.

    Args:
        served: The model.
        task: The name of a packaged task; None for the model's own.

    Raises:
        ApiError: an unknown task, or none given and the model has none.
    """
    asked = served.task if task is None else _packaged(task)
    if asked is None:
        raise ApiError(
            400,
            f"{served.name}: no record of its task (give task: {', '.join(task_names())}; or start the "
            "server with --task)",
            code="task_missing",
            param="task",
        )
    loaded, key = served.loaded, ("answers", id(asked), served.context)
    with loaded.lock:
        if key not in loaded.shared:
            loaded.shared[key] = SharedAnswers(loaded.worker, asked, loaded.path, served.context)
        answers: SharedAnswers = loaded.shared[key]
    return answers


def to_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction as it is sent: without the row's own fields."""
    return {
        "id": prediction.id,
        "answer": prediction.answer,
        "label": prediction.label,
        "score": prediction.score,
        "label_probs": prediction.label_probs and dict(prediction.label_probs),
        "text": prediction.text,
        "error": _error(prediction),
        "cut": prediction.cut and dict(prediction.cut),
        "usage": {"prompt_tokens": prediction.prompt_tokens, "completion_tokens": prediction.tokens},
    }


def model_json(served: ServedModel) -> dict[str, Any]:
    """Which model answered."""
    resolved = served.resolved
    return {
        "name": resolved.model or resolved.name,
        "version": resolved.version,
        "alias": resolved.alias,
        "sha": resolved.sha,
    }


def _predict(
    request: Request, served: ServedModel, body: _Answers, items: Sequence[Item]
) -> list[Prediction]:
    """The answers to rows, by the model or by an analyzer outside of the registry, to which what is said of
    generating does not apply.
    """
    external = served.external
    if external is not None:
        task = served.task if body.task is None else _packaged(body.task)
        return _answered(request, served, lambda: external.answer(_placed(items), task))
    answers = shared_answers(served, body.task)
    return _answered(
        request,
        served,
        lambda: answers.answer(
            _placed(items),
            constrain=body.constrain,
            label_probs=body.label_probs,
            max_tokens=body.max_tokens,
            long=body.long,
            gone=lambda: from_thread.run(request.is_disconnected),
        ),
    )


def _answered(request: Request, served: ServedModel, answer: Callable[[], list[Any]]) -> list[Any]:
    """Answers, which are counted, or 503 where the model was closed meanwhile."""
    usage = usage_of(request)
    usage.model = request.app.state.server.name(served.resolved)
    try:
        answers = answer()
    except Cancelled as error:
        raise ApiError(503, str(error), code="cancelled", retry_after=1) from error
    usage.add(answers)
    return answers


def _placed(items: Sequence[Item]) -> list[tuple[str, Any]]:
    return [(f"item {number}", item) for number, item in enumerate(items, 1)]


def _check_count(request: Request, items: Sequence[Item]) -> None:
    most = request.app.state.server.settings.max_batch
    if len(items) > most:
        raise ApiError(
            400, f"items: {len(items):,} rows, and at most {most:,} are read", code="too_many", param="items"
        )


@cache
def _task(name: str) -> Task:
    return load_task(name)


def _packaged(name: str) -> Task:
    """A packaged task: over HTTP a name is never a path."""
    if name not in task_names():
        raise ConfigError(f"task {name!r}: no such packaged task", fix=f"one of {', '.join(task_names())}")
    return _task(name)


def _classification(one: Classification) -> dict[str, Any]:
    return {
        "id": one.id,
        "label": one.label,
        "label_probs": one.probabilities and dict(one.probabilities),
        "calibrated": one.calibrated,
        "error": _error(one),
        "cut": one.cut and dict(one.cut),
        "usage": {"prompt_tokens": one.prompt_tokens, "completion_tokens": 0},
    }


def _error(prediction: Prediction | Classification) -> dict[str, Any] | None:
    if prediction.error is None:
        return None
    return {"type": error_type(prediction), "message": prediction.error}


def _since(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 3)
