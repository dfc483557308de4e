"""Files and folders that are whole or absent: atomic writes, JSONL, stage folders with a manifest, locks."""

from __future__ import annotations

from mlx_distill.files.folders import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_folder,
    lock_folder,
    open_partial,
    partial_folder,
    publish,
    read_manifest,
    recover,
    scratch,
    stage_key,
)
from mlx_distill.files.plain import (
    atomic_path,
    digest,
    fingerprint,
    fsync_folder,
    os_errors,
    read_json,
    read_jsonl,
    remove_leftovers,
    sha256,
    write_json,
    write_jsonl,
    write_text,
)

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "atomic_path",
    "check_folder",
    "digest",
    "fingerprint",
    "fsync_folder",
    "lock_folder",
    "open_partial",
    "os_errors",
    "partial_folder",
    "publish",
    "read_json",
    "read_jsonl",
    "read_manifest",
    "recover",
    "remove_leftovers",
    "scratch",
    "sha256",
    "stage_key",
    "write_json",
    "write_jsonl",
    "write_text",
]
