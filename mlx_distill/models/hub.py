"""Where a model comes from: a folder, or the Hugging Face Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.storage import atomic_path, os_errors

# Neither code nor pickles are ever downloaded.
ALLOWED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "*.md", "LICENSE*")
IGNORED = ("original/*", "metal/*", "onnx/*", "*.bin", "*.py")


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: the path itself, or a snapshot of a Hub model at a commit, tag or branch.

    Raises:
        ModelError: no such folder, and not a Hub model that can be had.
    """
    return find_local(path_or_repo) or _download(str(path_or_repo), revision)


def find_local(path_or_repo: str | Path) -> Path | None:
    """The folder of a path, or None for what can only be the name of a Hub model.

    Raises:
        ModelError: a file, or neither a folder nor such a name.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        raise ModelError(
            f"{path}: a file where a model folder is needed", fix="give the folder that holds config.json"
        )
    if not is_hub_id(name):
        raise ModelError(f"{name}: no such folder", fix="check the path; a Hub model is written org/name")
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here can be that of a Hub model.

    >>> is_hub_id("org/name"), is_hub_id("./name"), is_hub_id("a/folder/here")
    (True, False, False)
    """
    return not name.startswith(("/", ".", "~")) and name.count("/") == 1


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)
            )
        )
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{repo}: no revision {revision!r} on the Hub",
            fix="give a commit, a tag or a branch of that model",
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{repo}: access on the Hub is restricted",
            fix="accept its licence on huggingface.co and run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo}: no such folder, and no such model on the Hub",
            fix="check the spelling; a private model needs: hf auth login",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{repo}: no such folder, and it cannot be downloaded: {reason}",
            fix="check the path or the connection; the same command goes on where the download stopped",
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit that a downloaded snapshot stands at, from its path in the cache."""
    return folder.name if folder.parent.name == "snapshots" else None


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")


def copy_tokenizer(source: Path, destination: Path, *, others: bool = False) -> list[str]:
    """Copy what is there, each whole or not at all; return the names. ``others``: generation settings and
    licence too.
    """
    names = [
        name for name in (*TOKENIZER_FILES, *(OTHER_FILES if others else ())) if (source / name).is_file()
    ]
    folder = source / "additional_chat_templates"
    if folder.is_dir():
        names += [f"{folder.name}/{p.name}" for p in sorted(folder.glob("*.jinja"))]
    for name in names:
        with os_errors():
            if (destination / name).is_file() and (destination / name).read_bytes() == (
                source / name
            ).read_bytes():
                continue
        with atomic_path(destination / name) as path:
            shutil.copyfile(source / name, path)
    return names
