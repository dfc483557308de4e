"""The JSON files of a checkpoint: read with care, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import architecture_of
from mlx_distill.storage import os_errors

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def load_config(path: str | Path) -> dict[str, Any]:
    """config.json of a folder, with the end-of-text tokens of generation_config.json; an adapter folder gives its base's.

    Raises:
        ModelError: missing, not JSON, asks for remote code, or of an unknown ``model_type``.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        from mlx_distill.models.adapters import adapter_base

        return load_config(adapter_base(folder))
    config = read_object(folder / "config.json")
    architecture_of(config, str(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        stop = read_object(folder / "generation_config.json").get("eos_token_id")
        if stop is not None:
            config["eos_token_id"] = stop
    return config


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; what is wrong with it is a :class:`ModelError`."""
    if not path.is_file():
        raise ModelError(f"{path} is missing", fix="give a folder that holds a whole checkpoint")
    with os_errors():
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}", fix="download or copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", fix="download or copy the checkpoint again")
    return value
