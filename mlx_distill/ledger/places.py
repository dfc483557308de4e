"""Folders that a cloud service synchronizes: a database that is open there gets damaged, or forks."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_distill.errors import FileError

# By the names of their folders. Folders of macOS that iCloud may synchronize (Desktop, Documents) look like
# any other folder, so they cannot be told.
_SERVICES = (
    ("iCloud Drive", re.compile(r"Mobile Documents|iCloud ?Drive|com~apple~CloudDocs")),
    ("Dropbox", re.compile(r"Dropbox( \(.+\))?")),
    ("OneDrive", re.compile(r"OneDrive( - .+)?")),
    ("Google Drive", re.compile(r"Google ?Drive( \(.+\))?|GoogleDrive-.+")),
    ("a cloud service", re.compile(r"CloudStorage|Box Sync|Nextcloud|ownCloud|pCloud ?Drive")),
)


def cloud_service(path: Path) -> str | None:
    """The service that synchronizes a folder, by the names of the folders that it lies in; None of others.

    >>> cloud_service(Path("~/Library/Mobile Documents/com~apple~CloudDocs/work"))
    'iCloud Drive'
    >>> cloud_service(Path("~/Library/CloudStorage/OneDrive-Personal"))
    'OneDrive'
    >>> cloud_service(Path("~/work"))
    """
    parts = [part.replace("OneDrive-", "OneDrive - ").replace("Dropbox-", "Dropbox ") for part in path.parts]
    for service, name in _SERVICES:
        if any(name.fullmatch(part) for part in parts):
            return service
    return None


def refuse_cloud(path: Path) -> None:
    """Raise where a folder is synchronized.

    Raises:
        FileError: with the service.
    """
    service = cloud_service(path)
    if service is not None:
        raise FileError(
            f"{path}: synchronized by {service}, which damages a database that is in use",
            fix="work in a folder outside of it, for example: --root ~/mlx-distill",
        )
