"""The JSON files of model and adapter folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import architecture_of
from mlx_distill.models.config_fields import (
    GENERATION_FIELDS,
    Fields,
    check_fields,
    check_model_config,
    check_stop_tokens,
    unused_fields,
)
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
        ModelError: the file is missing or not JSON, needs remote code, has an unknown ``model_type``, or a
            field with a value that is not computed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        return load_config(adapter_base(folder))
    where, generation = folder / "config.json", folder / "generation_config.json"
    config = read_object(where)
    check_model_config(config, architecture_of(config, str(where)).fields, str(where))
    if generation.is_file():
        eos_token_id = _read_generation(folder).get("eos_token_id")
        if eos_token_id is not None:
            config["eos_token_id"], where = eos_token_id, generation
    check_stop_tokens(config.get("eos_token_id"), config.get("vocab_size"), str(where))
    return config


def config_notes(folder: Path, fields: Fields) -> list[str]:
    """A line of text for each file of a model folder whose fields are not all used.

    Args:
        folder: Of a model.
        fields: The table of config.json.
    """
    notes = []
    config = folder / "config.json"
    if unused := unused_fields(read_object(config), fields):
        notes.append(f"{config}: not known and not used: {', '.join(unused)}")
    if unused := unused_fields(_read_generation(folder), GENERATION_FIELDS):
        where = folder / "generation_config.json"
        notes.append(f"{where}: not used, since answers are decoded greedily: {', '.join(unused)}")
    return notes


def _read_generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    check_fields(generation, GENERATION_FIELDS, str(path))
    return generation


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
