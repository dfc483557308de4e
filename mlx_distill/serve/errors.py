"""Errors as responses: OpenAI's envelope for clients, a short page for browsers; what went wrong inside stays
in the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mlx_distill.errors import ConfigError, DataError, DistillError, FileError, QualityGateError
from mlx_distill.serve.responses import PlainJSON
from mlx_distill.text import visible

log = logging.getLogger("mlx_distill.serve")

# The client of OpenAI retries these by itself, and does not where it is told so.
_RETRIED = (408, 409, 429)
_LONG_WAIT = 120  # seconds of Retry-After from which on a client had better tell its user


class ErrorFacts(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error, in OpenAI's envelope."""

    error: ErrorFacts


class ApiError(Exception):
    """A response that is an error, in OpenAI's envelope.

    Args:
        status: Of HTTP.
        message: What is wrong, and how to mend it.
        code: For programs, such as ``model_not_found``.
        param: The key of the request that is wrong.
        retry_after: Seconds after which it may work.
        retry: Whether a client should try again by itself; None leaves it to the status.
        headers: Further ones.
        fix: What a page shows below the message, where that does not say it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        retry: bool | None = None,
        headers: Mapping[str, str] | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, visible(message), code, param
        self.fix = fix
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
            if retry is None and retry_after > _LONG_WAIT:
                retry = False
        if retry is None and status == 409:
            retry = False
        if retry is not None:
            self.headers["x-should-retry"] = "true" if retry else "false"

    @property
    def type(self) -> str:
        """OpenAI's class of the error."""
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The envelope.

        >>> ApiError(404, "no such model", code="model_not_found").body()
        {'error': {'message': 'no such model', 'type': 'invalid_request_error', 'param': None,
         'code': 'model_not_found'}}
        """
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def from_distill_error(error: DistillError) -> ApiError:
    """The response for an error of the library: 400 where the request is wrong, 422 where a gate refused, 503
    where a file or a model cannot be used. None of these is a bug, so none is 500.
    """
    if isinstance(error, ConfigError | DataError):
        return ApiError(400, str(error), code=_code(error))
    if isinstance(error, QualityGateError):
        return ApiError(422, str(error), code="gate_refused")
    if isinstance(error, FileError):
        return ApiError(503, str(error), code="file_error", retry=False)
    return ApiError(400, str(error), code=_code(error))


def _code(error: DistillError) -> str:
    names = {"ConfigError": "invalid_value", "DataError": "invalid_data", "ModelError": "model_error"}
    return names.get(type(error).__name__, "invalid_request")


def from_validation(error: RequestValidationError) -> ApiError:
    """The response for a body or a query that does not fit: 400, and the first key that is wrong.

    The values of the request are not repeated: they may be long, or private.
    """
    problems = error.errors()
    if not problems:
        return ApiError(400, "the request does not fit", code="invalid_value")
    first = problems[0]
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    name = ".".join(place) or None
    if first.get("type") == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    more = f" ({len(problems) - 1} further problems)" if len(problems) > 1 else ""
    message = f"{name or 'the body'}: {first.get('msg', 'invalid')}{more}"
    return ApiError(400, message, code="invalid_value", param=name)


def response(error: ApiError, request: Request) -> Response:
    """An error as a response: JSON for ``/v1`` and for programs, a page for browsers."""
    if not request.url.path.startswith("/v1") and "text/html" in request.headers.get("accept", ""):
        from mlx_distill.serve.pages.environment import error_page

        page = error_page(request, error.status, error.message, error.fix)
        page.headers.update(error.headers)
        return page
    return PlainJSON(error.body(), error.status, error.headers)


def unexpected(error: BaseException, request_id: str) -> ApiError:
    """The response for a bug: its traceback goes to the log under the request's id, nothing of it to the
    client.
    """
    log.error("request %s failed: %s", request_id, type(error).__name__, exc_info=error)
    return ApiError(
        500,
        f"the server failed on this request; its log has the reason under {request_id}",
        code="internal_error",
        retry=False,
    )


def add_error_handlers(app: FastAPI) -> None:
    """Let an application answer every error with :func:`response`."""

    def answer(request: Request, error: ApiError) -> Response:
        request.scope.setdefault("state", {})["error"] = error
        return response(error, request)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(DistillError)
    async def distill_error(request: Request, error: DistillError) -> Response:
        return answer(request, from_distill_error(error))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return answer(request, from_validation(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        names = {404: "not_found", 405: "method_not_allowed"}
        detail = error.detail if isinstance(error.detail, str) else json.dumps(error.detail)
        api = ApiError(
            error.status_code,
            detail,
            code=names.get(error.status_code, "invalid_request"),
            headers=dict(error.headers or {}),
        )
        return answer(request, api)
