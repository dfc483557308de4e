"""The report of a run: ``report.json``, a self-contained ``report.html``, and model cards."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_distill.report.chats import build_chat_report as build_chat_report
    from mlx_distill.report.collect import build_report as build_report
    from mlx_distill.report.page import render_html as render_html
    from mlx_distill.report.summary import RunReport as RunReport
    from mlx_distill.report.summary import read_report as read_report
    from mlx_distill.report.summary import write_report as write_report

# Imported when they are first used: a page of files from elsewhere is rendered without loading mlx.
_MODULES = {
    "build_chat_report": "chats",
    "build_report": "collect",
    "render_html": "page",
    "RunReport": "summary",
    "read_report": "summary",
    "write_report": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
