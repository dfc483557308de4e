"""Finding a model in a folder or on the Hugging Face Hub; copying its tokenizer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.storage import atomic_path, os_errors

# Neither code nor pickles are ever downloaded.
ALLOWED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "*.md", "LICENSE*")
IGNORED = ("original/*", "metal/*", "onnx/*", "*.bin", "*.py")


def resolve(path_or_repo: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: the path itself, or a downloaded snapshot of a Hub model.

    Args:
        path_or_repo: A folder, or a Hub id.
        revision: Commit, tag or branch of a Hub model.
        weights: False downloads the config and the tokenizer alone.

    Raises:
        ModelError: no such folder, and no such Hub model, or it cannot be downloaded.
    """
    return find_local(path_or_repo) or _download(str(path_or_repo), revision, weights)


def find_local(path_or_repo: str | Path) -> Path | None:
    """The folder at a path, or None if there is none and the path can be a Hub id.

    Raises:
        ModelError: a file, or neither a folder nor a possible Hub id.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        raise ModelError(f"{path}: a file, not a model folder", fix="give the folder that holds config.json")
    if not is_hub_id(name):
        raise ModelError(f"{name}: no such folder", fix="check the path; a Hub model is written org/name")
    return None


def find_cached(repo: str, file: str, revision: str | None = None) -> Path | None:
    """The folder of a Hub model's snapshot in the local cache, if it has a file; nothing is downloaded."""
    if not is_hub_id(repo):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def model_problem(path_or_repo: str | Path) -> str | None:
    """Why a path is no model, in one line, as far as its files' names tell; None for a model or a Hub id.

    >>> model_problem("org/name"), model_problem("./nothing/here")
    (None, './nothing/here: no such folder')
    """
    try:
        folder = find_local(path_or_repo)
    except ModelError as error:
        return error.message
    if folder is None or (folder / "adapter_config.json").is_file():
        return None
    if not (folder / "config.json").is_file():
        return f"{folder}: no model folder: no config.json"
    weights = any(folder.glob("*.safetensors"))
    return None if weights else f"{folder}: no model folder: config.json, but no *.safetensors with weights"


def is_hub_id(name: str) -> bool:
    """Whether a string that is not the path of a folder can be a Hub id.

    >>> is_hub_id("org/name"), is_hub_id("./name"), is_hub_id("a/folder/here"), is_hub_id("my models/one")
    (True, False, False, False)
    """
    return re.fullmatch(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", name, re.ASCII) is not None


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    ignored = IGNORED if weights else (*IGNORED, "*.safetensors")
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(ALLOWED), ignore_patterns=list(ignored)
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
            fix="check the path or the connection; the same command resumes the download",
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit of a downloaded snapshot, from its path in the cache of the Hub client."""
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
    "thinking.json",
)
TEMPLATES = "additional_chat_templates"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them is a whole tokenizer
OTHER_FILES = ("generation_config.json", "trained_on.json", "LICENSE", "LICENSE.txt", "LICENSE.md")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def replace_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files of a folder, if it has a tokenizer, and remove those of another one.

    A chat template of the other one would be read before one inside ``tokenizer_config.json``.
    """
    if not has_tokenizer(source):
        return
    for path in (destination / name for name in TOKENIZER_FILES):
        if not (source / path.name).is_file():
            path.unlink(missing_ok=True)
    if not (source / TEMPLATES).is_dir():
        shutil.rmtree(destination / TEMPLATES, ignore_errors=True)
    copy_tokenizer(source, destination)


def copy_tokenizer(source: Path, destination: Path, *, others: bool = False) -> list[str]:
    """Copy the tokenizer files of a folder, each atomically; return their names.

    Args:
        source: Folder that may have them.
        destination: Folder to copy to.
        others: Copy the generation config, the task of the training and the licence too.
    """
    wanted = (*TOKENIZER_FILES, *(OTHER_FILES if others else ()))
    names = [name for name in wanted if (source / name).is_file()]
    templates = source / TEMPLATES
    if templates.is_dir():
        names += [f"{templates.name}/{path.name}" for path in sorted(templates.glob("*.jinja"))]
    for name in names:
        old, new = source / name, destination / name
        with os_errors():
            if new.is_file() and new.read_bytes() == old.read_bytes():
                continue
        with atomic_path(new) as path:
            shutil.copyfile(old, path)
    return names
