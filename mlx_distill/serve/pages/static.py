"""Style sheets and scripts of the pages, under ``/static/``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from fastapi import APIRouter, HTTPException, Request, Response

from mlx_distill.config import ASSETS

router = APIRouter()

_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_REPORT = ("style.css", "comparison.css", "comparison.js")
_A_YEAR = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class StaticFile:
    """A file as it is served."""

    content: bytes
    media_type: str
    sha: str


@cache
def static_files() -> dict[str, StaticFile]:
    """All files that are served, by their names after ``/static/``. Other paths do not exist: no name of a
    request is ever a path.
    """
    folder = ASSETS / "serve"
    paths = {path.name: path for path in (folder / "static").iterdir()}
    paths |= {f"vendor/{path.name}": path for path in (folder / "vendor").iterdir()}
    paths |= {f"report/{name}": ASSETS / "report" / name for name in _REPORT}
    files = {}
    for name, path in sorted(paths.items()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            files[name] = StaticFile(content, _TYPES[path.suffix], hashlib.sha256(content).hexdigest())
    return files


def static_url(name: str) -> str:
    """The address of a file, with its hash, so that browsers may keep it.

    Raises:
        KeyError: there is no such file.
    """
    return f"/static/{name}?v={static_files()[name].sha[:12]}"


@router.get("/static/{name:path}", include_in_schema=False)
def static(request: Request, name: str) -> Response:
    """A file, for a year if the address has its hash; else it is to be asked for again."""
    file = static_files().get(name)
    if file is None:
        raise HTTPException(404, "no such file")
    tag = f'"{file.sha[:32]}"'
    current = request.query_params.get("v") == file.sha[:12]
    headers = {"ETag": tag, "Cache-Control": _A_YEAR if current else "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
