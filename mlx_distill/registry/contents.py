"""The files of a version: which they are, their hashes, and how the registry keeps them."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError, ModelError
from mlx_distill.models.config_files import is_adapter, named_base
from mlx_distill.models.trained_on import TRAINED_ON
from mlx_distill.storage import MANIFEST, check_folder, digest, os_errors, read_manifest, sha256

# Files for people, which change nothing that a model answers.
_FOR_PEOPLE = frozenset({"metrics.jsonl", "log.txt", "README.md", "artifact.json", MANIFEST})
KEPT = "kept"
"""The folder of a version that holds its files, laid out like a run."""


@dataclass(frozen=True)
class Contents:
    """What a model's folder holds, and the folder of its base, for an adapter.

    Attributes:
        folder: The folder.
        base: That of the base model of an adapter; None of a whole model.
        files: ``folder name/file``: its size and SHA-256; without the files that are for people.
        content: The hash in the manifest of the stage that wrote the folder; None of any other folder.
        sha: The hash of all that decides what the model answers.
    """

    folder: Path
    base: Path | None
    files: Mapping[str, Mapping[str, Any]]
    content: str | None
    sha: str


def read_contents(folder: Path) -> Contents:
    """Hash the files of a model; what the manifest of a stage says is taken where size and time are the same.

    Raises:
        ModelError: it is no model, or an adapter whose base is not a folder.
        FileError: files of a stage are missing or have changed since it wrote them.
    """
    base = None
    if is_adapter(folder):
        name, revision = named_base(folder)
        base = Path(name)
        if revision is not None or not base.is_dir():
            raise ModelError(
                f"{folder}: its base {name} is on the Hub",
                fix="convert the base into a folder, and name that",
            )
        if base.name == folder.name or base.resolve().parent != folder.resolve().parent:
            raise ModelError(
                f"{folder}: its base {base} is not beside it",
                fix="merge the adapter (quantize or export do), or move the two into one folder",
            )
    elif not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no model", fix="give the folder of a model or of a finished run")
    files = _hashes(folder)
    if base is not None:
        files |= _hashes(base)
    manifest = read_manifest(folder)
    names = {name: entry["sha256"] for name, entry in files.items()}
    # The names of the folders are no part of what the model answers; which file is of the base is.
    own = {name.partition("/")[2]: value for name, value in names.items() if _is_of(name, folder)}
    of_base = {name.partition("/")[2]: value for name, value in names.items() if not _is_of(name, folder)}
    sha = digest({"model": own, "base": of_base})
    return Contents(folder, base, files, manifest.content if manifest else None, sha)


def _is_of(name: str, folder: Path) -> bool:
    return name.partition("/")[0] == folder.name


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = read_manifest(folder)
    if manifest is not None:
        if problem := check_folder(folder, manifest):
            raise FileError(problem, fix="make the stage again: run the same command again")
        known = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in manifest.files.items()}
        if (folder / TRAINED_ON).is_file() and TRAINED_ON not in known:
            path = folder / TRAINED_ON
            known[TRAINED_ON] = {"size": path.stat().st_size, "sha256": sha256(path)}
    else:
        with os_errors():
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            known = {
                path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
                for path in paths
                if not any(part.startswith(".") for part in path.relative_to(folder).parts)
            }
    return {f"{folder.name}/{name}": entry for name, entry in known.items() if name not in _FOR_PEOPLE}


def check_files(kept: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """None where the files are those of the version, byte by byte, else what is wrong.

    Args:
        kept: The folder of the version's files.
        files: Their sizes and hashes as they were recorded.
    """
    for name, entry in files.items():
        path = kept / name
        if not path.is_file():
            return f"{path} is missing"
        with os_errors():
            size = path.stat().st_size
        if size != entry["size"]:
            return f"{path} has {size:,} bytes, not {entry['size']:,}"
        if sha256(path) != entry["sha256"]:
            return f"{path} is not the file that was added: its hash differs"
    return None


def keep_folders(sources: Mapping[str, Path], place: Path) -> Path:
    """Link folders into a new folder beside ``place``, so that the files of a version stay when a run is made
    again or deleted: on one file system they take their place on the disk once. Elsewhere they are copied.

    Args:
        sources: Name in the new folder, such as ``evaluations/student``: the folder or file.
        place: Where the caller will rename the result to.

    Returns:
        The new folder.
    """
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        with os_errors():
            for name, source in sources.items():
                paths = sorted(source.rglob("*")) if source.is_dir() else [source]
                for path in paths:
                    relative = path.relative_to(source) if source.is_dir() else Path()
                    if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                        _link(path.resolve(), partial / KEPT / name / relative)
            return partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
