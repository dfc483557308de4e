"""Fine-tuning jobs in OpenAI's format: ``/v1/fine_tuning/jobs``."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from mlx_distill import jobs
from mlx_distill.errors import ConfigError
from mlx_distill.jobs import Event, Job
from mlx_distill.jobs.curves import Curve, Point
from mlx_distill.jobs.progress import JobProgress
from mlx_distill.jobs.store import RECIPE
from mlx_distill.ledger.database import Ledger, new_id
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.fine_tuning_request import (
    FineTuningRequest,
    base_name,
    hyperparameters,
    model_name,
    read_request,
)
from mlx_distill.serve.pages.job_form import start_next
from mlx_distill.storage import read_manifest

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
API = "fine_tuning"
"""What the jobs of this interface have as ``api`` in their request."""
_SAME_REQUEST_S = 60  # the client sends a request again when the answer was lost
_PREPARED_BY = ("data", None)  # the stages in which the files are read
_MODEL_STAGES = ("student", "teacher")
_EVENT = "ftevent-"
_DEFAULT_SEED = 0


@router.post("")
def create_job(request: Request, body: FineTuningRequest) -> dict[str, Any]:
    """Start fine-tuning a model. The answer comes at once; the files are read by the job.

    An equal request within a minute is the same job: clients repeat requests whose answer they did not get.
    """
    server = request.app.state.server
    job_id = new_id("job")
    wanted = read_request(server.ledger, body, job_id)
    folder = server.root.jobs / job_id
    job = None
    try:
        job = jobs.submit(
            server.ledger,
            "run",
            [server.root.relative(folder / RECIPE), "--out", wanted.out],
            title=f"fine-tune {wanted.base}" + (f" ({wanted.suffix})" if wanted.suffix else ""),
            run_path=wanted.out,
            request={"api": API, "body": body.model_dump(mode="json", exclude_none=True)},
            dedupe_seconds=_SAME_REQUEST_S,
            job_id=job_id,
        )
    finally:
        if job is None or job.id != job_id:
            shutil.rmtree(folder, ignore_errors=True)
    start_next(server)
    return job_object(server.ledger, jobs.get(server.ledger, job.id))


@router.get("")
def list_jobs(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The fine-tuning jobs, the newest first; with ``metadata[KEY]=VALUE`` those that have this value."""
    ledger = request.app.state.server.ledger
    if after is not None:
        _job(request, after)
    wanted = _metadata(request.query_params.multi_items())
    found = jobs.list_jobs(ledger, after=after, limit=limit + 1, api=API, metadata=wanted)
    data = [job_object(ledger, job) for job in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/{job_id}")
def retrieve_job(request: Request, job_id: str) -> dict[str, Any]:
    """One job."""
    return job_object(request.app.state.server.ledger, _job(request, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """Let a job save and stop. Our ``/resume`` continues it all the same."""
    job = _job(request, job_id)
    if job.requested not in ("cancel", "discard"):
        _check_unfinished(job, "cancelled")
        job = jobs.cancel(request.app.state.server.ledger, job_id)
    return job_object(request.app.state.server.ledger, job)


@router.post("/{job_id}/pause")
def pause_job(request: Request, job_id: str) -> dict[str, Any]:
    """Let a job save and stop until it is resumed; meanwhile its status is ``queued``."""
    job = _job(request, job_id)
    if job.state != "paused" and job.requested != "pause":
        _check_unfinished(job, "paused")
        job = jobs.pause(request.app.state.server.ledger, job_id)
    return job_object(request.app.state.server.ledger, job)


@router.post("/{job_id}/resume")
def resume_job(request: Request, job_id: str) -> dict[str, Any]:
    """Continue a job that was paused or cancelled, or has failed, from its last checkpoint."""
    server = request.app.state.server
    job = _job(request, job_id)
    if job.state == "succeeded":
        raise _finished(job, "resumed")
    if job.state != "queued" and not (job.state == "running" and job.requested is None):
        job = jobs.resume(server.ledger, job_id)
        start_next(server)
    return job_object(server.ledger, job)


@router.get("/{job_id}/events")
def list_events(
    request: Request,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    """What happened to a job, the newest first."""
    job = _job(request, job_id)
    before = _event_number(after) if after is not None else None
    found = jobs.events(request.app.state.server.ledger, job.id, newest=limit + 1, before=before)[::-1]
    data = [event_object(event) for event in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    request: Request,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
    """The models that a job has made and that can be asked: the last one. The checkpoints on the way hold the
    optimizer's state too, and are for :func:`resume_job` alone.
    """
    job = _job(request, job_id)
    data = [checkpoint_object(request.app.state.server.ledger, job)] if job.state == "succeeded" else []
    if after is not None:
        if after not in [checkpoint["id"] for checkpoint in data]:
            raise ApiError(400, f"after: no checkpoint {after!r}", code="invalid_value", param="after")
        data = []
    return {"object": "list", "data": data, "has_more": False}


def job_object(ledger: Ledger, job: Job) -> dict[str, Any]:
    """A job as OpenAI's client reads it. What its types do not know stands under ``mlx_distill``."""
    body = FineTuningRequest.model_validate(job.request["body"])
    given = hyperparameters(body).model_dump()
    state = jobs.progress(ledger, job, max_rows=0)
    finished = job.finished_at if job.is_finished else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": None if finished is None else int(finished),
        "estimated_finish": _estimated_finish(job, state),
        "model": body.model,
        "fine_tuned_model": fine_tuned_model(job) if job.state == "succeeded" else None,
        "organization_id": "local",
        "status": _status(job, state),
        "hyperparameters": given,
        "method": {"type": "supervised", "supervised": {"hyperparameters": given}},
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "result_files": [],
        "trained_tokens": _trained_tokens(ledger, job),
        "seed": body.seed if body.seed is not None else _DEFAULT_SEED,
        "error": _error(job),
        "integrations": [],
        "metadata": body.metadata,
        "user_provided_suffix": body.suffix,
        "mlx_distill": {
            "state": job.state_text(),
            "run": job.run_path,
            "version": (job.result or {}).get("version"),
            "stage": state.stage,
            "step": state.step,
            "steps": state.steps,
            "eta_s": state.eta_s,
        },
    }


def fine_tuned_model(job: Job) -> str:
    """The name of the model that a job makes."""
    body = job.request["body"]
    return model_name(base_name(body["model"]), (body.get("suffix") or "").strip(), job.id)


def event_object(event: Event) -> dict[str, Any]:
    """An event as OpenAI's client reads it."""
    is_metrics = event.type == "metrics"
    return {
        "id": f"{_EVENT}{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if is_metrics else "message",
        "data": _metric_names(event.data) if is_metrics else {"event": event.type, **(event.data or {})},
    }


def checkpoint_object(ledger: Ledger, job: Job) -> dict[str, Any]:
    """The model of a succeeded job as a checkpoint. Every validation is over all validation rows."""
    trained = _trained(ledger, job)
    last = _last_point(trained[0]) if trained else None
    return {
        "id": f"ftckpt-{job.id.removeprefix('job-')}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(job.finished_at or job.created_at),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": fine_tuned_model(job),
        "step_number": last.step if last else 0,
        "metrics": {
            "step": last.step,
            "train_loss": last.loss,
            "valid_loss": last.valid_loss,
            "full_valid_loss": last.valid_loss,
        }
        if last
        else {},
    }


def _metric_names(row: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of metrics under OpenAI's names."""
    named = {("train_loss" if name == "loss" else name): value for name, value in (row or {}).items()}
    if named.get("valid_loss") is not None:
        named["full_valid_loss"] = named["valid_loss"]
    if named.get("valid_token_accuracy") is not None:  # of the first evaluate_rows of them
        named["valid_mean_token_accuracy"] = named["valid_token_accuracy"]
    return named


def _trained(ledger: Ledger, job: Job) -> list[Path]:
    """The folders that a job has trained, that of the model it makes first."""
    if job.run_path is None:
        return []
    run = ledger.root.inside(job.run_path)
    return [run / stage for stage in _MODEL_STAGES if (run / stage / "metrics.jsonl").is_file()]


def _last_point(folder: Path) -> Point | None:
    curve = Curve(folder / "metrics.jsonl")
    curve.read()
    return curve.last


def _trained_tokens(ledger: Ledger, job: Job) -> int | None:
    """The tokens of all trainings together, once a job has succeeded."""
    if job.state != "succeeded":
        return None
    manifests = [read_manifest(folder) for folder in _trained(ledger, job)]
    counts = [manifest.recorded.get("tokens") for manifest in manifests if manifest is not None]
    known = [int(count) for count in counts if count is not None]
    return sum(known) if known else None


def _status(
    job: Job, state: JobProgress
) -> Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]:
    """The state of a job in OpenAI's words, which have none for ``paused``."""
    if job.state == "paused":
        return "queued"
    if job.state == "running" and job.attempt <= 1 and state.stage in _PREPARED_BY:
        return "validating_files"
    return job.state


def _estimated_finish(job: Job, state: JobProgress) -> int | None:
    """When the training is done that makes the model, once that is under way. What comes behind it, its
    evaluation, is not part of it.
    """
    has_student = bool((job.request["body"].get("mlx_distill") or {}).get("student"))
    last = "student" if has_student else "teacher"
    if job.state != "running" or state.eta_s is None or state.stage != last:
        return None
    return int(time.time() + state.eta_s)


def _error(job: Job) -> dict[str, Any] | None:
    if job.state != "failed":
        return None
    error = job.error or {}
    message = str(error.get("message") or "the job failed")
    fix = error.get("fix")
    return {
        "code": str(error.get("code") or "failed"),
        "message": f"{message} (fix: {fix})" if fix else message,
        "param": None,
    }


def _job(request: Request, job_id: str) -> Job:
    """The fine-tuning job of an identifier; those that were started otherwise are not shown here."""
    try:
        job = jobs.get(request.app.state.server.ledger, job_id)
    except ConfigError:
        job = None
    if job is None or not isinstance(job.request, Mapping) or job.request.get("api") != API:
        raise ApiError(404, f"no fine-tuning job {job_id!r}", code="job_not_found", param="job_id")
    return job


def _check_unfinished(job: Job, verb: str) -> None:
    if job.is_finished:
        raise _finished(job, verb)


def _finished(job: Job, verb: str) -> ApiError:
    return ApiError(400, f"{job.id} is {job.state}, so it cannot be {verb}", code="job_finished")


def _event_number(name: str) -> int:
    number = name.removeprefix(_EVENT)
    if not name.startswith(_EVENT) or not re.fullmatch(r"[0-9]{1,18}", number):
        raise ApiError(400, f"after: no event {name!r}", code="invalid_value", param="after")
    return int(number)


def _metadata(query: list[tuple[str, str]]) -> dict[str, str]:
    """The pairs of ``metadata[KEY]=VALUE``."""
    pairs = {}
    for name, value in query:
        if found := re.fullmatch(r"metadata\[(.+)\]", name, re.DOTALL):
            pairs[found[1]] = value
        elif name == "metadata" and value not in ("", "null"):
            raise ApiError(400, "metadata: written as metadata[KEY]=VALUE", param="metadata")
    return pairs
