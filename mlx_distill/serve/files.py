"""OpenAI's file endpoints: what fine-tuning jobs are given to train on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from mlx_distill.jobs.uploads import (
    PURPOSES,
    Upload,
    add_upload,
    delete_upload,
    get_upload,
    list_uploads,
    upload_path,
)
from mlx_distill.serve.errors import ApiError

router = APIRouter(prefix="/v1/files", tags=["files"])
_SHORTEST, _LONGEST = 3600, 2_592_000  # seconds that expires_after may say


def file_object(upload: Upload) -> dict[str, Any]:
    """A file as OpenAI's client reads it."""
    return {
        "id": upload.id,
        "object": "file",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "expires_at": None if upload.expires_at is None else int(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "status_details": None,
    }


@router.post("")
def create_file(
    request: Request,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form()],
    anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[str | None, Form(alias="expires_after[seconds]")] = None,
) -> dict[str, Any]:
    """Upload a file."""
    if purpose not in PURPOSES:
        raise ApiError(
            400,
            f"purpose: {purpose!r} is not one of {', '.join(PURPOSES)}",
            code="invalid_value",
            param="purpose",
        )
    expires = _expires(anchor, seconds)
    ledger = request.app.state.server.ledger
    return file_object(add_upload(ledger, file.file, file.filename or "file", purpose, expires))


def _expires(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(
            400, "expires_after.anchor: created_at is the only anchor", param="expires_after.anchor"
        )
    number = int(seconds) if seconds and seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else 0
    if not _SHORTEST <= number <= _LONGEST:
        raise ApiError(
            400, f"expires_after.seconds: {_SHORTEST} to {_LONGEST}", param="expires_after.seconds"
        )
    return number


@router.get("")
def list_files(
    request: Request,
    purpose: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
) -> dict[str, Any]:
    """The files, the newest first."""
    ledger = request.app.state.server.ledger
    files = list_uploads(ledger, purpose, after, limit + 1, newest_first=order == "desc")
    data = [file_object(upload) for upload in files[:limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": len(files) > limit, **ends}


@router.get("/{file_id}")
def retrieve_file(request: Request, file_id: str) -> dict[str, Any]:
    """One file."""
    return file_object(_existing(request, file_id))


@router.get(
    "/{file_id}/content",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The file."}},
)
def file_content(request: Request, file_id: str) -> FileResponse:
    """Its bytes."""
    path = upload_path(request.app.state.server.ledger, _existing(request, file_id))
    if not path.is_file():
        raise ApiError(404, f"the bytes of {file_id} are gone", code="file_not_found")
    # Never shown by a browser as a page, whatever they are.
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/{file_id}")
def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Delete one."""
    if not delete_upload(request.app.state.server.ledger, file_id):
        raise _absent(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _existing(request: Request, file_id: str) -> Upload:
    upload = get_upload(request.app.state.server.ledger, file_id)
    if upload is None:
        raise _absent(file_id)
    return upload


def _absent(file_id: str) -> ApiError:
    return ApiError(404, f"no file {file_id!r}", code="file_not_found", param="file_id")
