"""Files that are made for one response."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from mlx_distill.data_sets import export_data_set

if TYPE_CHECKING:
    from mlx_distill.serve.app import Server


def exported_file(server: Server, name: str, layout: str, split: str | None) -> FileResponse:
    """The rows of a data set in another tool's layout, as a file that is removed when it was sent.

    Args:
        server: Whose ledger knows the data set.
        name: The data set.
        layout: ``openai``, ``alpaca`` or ``chatml``.
        split: Only the rows of this split.

    Raises:
        ConfigError: no such data set or layout.
        DataError: rows that the layout cannot hold.
    """
    server.root.state.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(dir=server.root.state, prefix="export-")
    try:
        path = Path(folder.name) / f"{name}.{layout}.jsonl".replace("/", "")
        export_data_set(server.ledger, name, path, layout, split=split)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(
        path,
        media_type="application/x-ndjson",
        filename=path.name,
        background=BackgroundTask(folder.cleanup),
    )
