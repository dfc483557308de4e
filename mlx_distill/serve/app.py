"""The application: every router, behind the guards of :mod:`mlx_distill.serve.security`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

# Modules that have a ``router``.
ROUTERS = (
    "health",
    "analysis",
    "chat",
    "files",
    "fine_tuning",
    "models",
    "operations",
    "pages.static",
    "pages.login",
    "pages.overview",
    "pages.data",
    "pages.jobs",
    "pages.models",
    "pages.compare",
    "pages.costs",
)


def create_app() -> FastAPI:
    """The application."""
    from fastapi import FastAPI

    app = FastAPI(docs_url=None, redoc_url=None)
    for name in ROUTERS:
        app.include_router(import_module(f"mlx_distill.serve.{name}").router)
    return app
