"""The JSON files of model and adapter folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import architecture_of
from mlx_distill.models.hub import resolve
from mlx_distill.storage import os_errors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapters.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def load_config(path: str | Path) -> dict[str, Any]:
    """config.json of a folder, or of the base model of an adapter folder.

    ``eos_token_id`` is that of generation_config.json where it has one.

    Raises:
        ModelError: the file is missing or not JSON, needs remote code, or has an unknown ``model_type``.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        return load_config(adapter_base(folder))
    config = read_object(folder / "config.json")
    architecture_of(config, str(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        eos_token_id = read_object(folder / "generation_config.json").get("eos_token_id")
        if eos_token_id is not None:
            config["eos_token_id"] = eos_token_id
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: the file is missing, not JSON, or not an object.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing", fix="give a folder that holds a complete checkpoint")
    with os_errors():
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not valid JSON: {error}", fix="download or copy the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", fix="download or copy the checkpoint again")
    return value


def adapter_base(folder: str | Path) -> Path:
    """The folder of the base model of an adapter folder, without ``..`` in its path.

    Raises:
        ModelError: the adapter's config has no base model, or its folder does not exist.
    """
    folder = Path(folder)
    config = read_object(folder / ADAPTER_CONFIG)
    if "peft_type" in config:
        raise ModelError(
            f"{folder} holds an adapter in PEFT's format",
            fix=f"convert it: mlx-distill convert {folder} FOLDER",
        )
    base = config.get("base")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: no base model",
            fix='add "base": the path of the model that the adapter was trained on',
        )
    if is_adapter(folder / base):
        raise ModelError(
            f"{folder}: its base {base!r} is an adapter, not a model", fix=f"correct base in {ADAPTER_CONFIG}"
        )
    if (folder / base).is_dir():
        return (folder / base).resolve()
    if base.startswith(".") or base.count("/") != 1:
        raise ModelError(
            f"{folder}: its base model {(folder / base).resolve()} does not exist",
            fix=f"restore it, or correct base in {ADAPTER_CONFIG}",
        )
    return resolve(base)
