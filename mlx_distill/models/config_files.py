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
from mlx_distill.models.hub import has_tokenizer, is_hub_id, resolve
from mlx_distill.storage import os_errors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapters.safetensors"
PEFT_FILE = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model; the config.json of its base alone makes no model.

    Raises:
        ModelError: the weights of an adapter and of a model are in the same folder.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if not (folder / "config.json").is_file():
        return True
    models = sorted(folder.glob("model*.safetensors"))
    adapters = [name for name in (ADAPTER_FILE, PEFT_FILE) if (folder / name).is_file()]
    if models and adapters:
        raise ModelError(
            f"{folder} holds a model ({models[0].name}) and an adapter ({adapters[0]}), and which of them is "
            "meant cannot be known",
            fix="move the adapter, with its adapter_config.json, to a folder of its own",
        )
    return not models


def load_config(path: str | Path) -> dict[str, Any]:
    """config.json of a folder, or of the base model of an adapter folder.

    ``eos_token_id`` are the tokens of generation_config.json and those of config.json, each of which ends an
    answer, and ``vocab_size`` is that of an adapter that stores an embedding of another size.

    Raises:
        ModelError: the file is missing or not JSON, needs remote code, has an unknown ``model_type``, or a
            field with a value that is not computed.
    """
    folder = Path(path)
    if is_adapter(folder):
        return with_vocabulary(load_config(adapter_base(folder)), folder)
    where, generation = folder / "config.json", folder / "generation_config.json"
    config = read_object(where)
    check_model_config(config, architecture_of(config, str(where)).fields, str(where))
    columns, own = config.get("vocab_size"), _token_list(config.get("eos_token_id"))
    stops = _token_list(_read_generation(folder).get("eos_token_id"))
    check_stop_tokens(stops or own, columns, str(generation if stops else where))
    if stops:
        own = [token for token in own if not isinstance(columns, int) or 0 <= token < columns]
        config["eos_token_id"] = list(dict.fromkeys(stops + own))
    return config


def _token_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def with_vocabulary(config: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """The config of a base model with the number of columns that an adapter's embedding has."""
    columns = adapter_columns(adapter)
    return {**config, "vocab_size": columns} if columns else config


def adapter_columns(adapter: Path) -> int | None:
    """The number of columns that an adapter's embedding has, where its config names one.

    Raises:
        ModelError: it names something else than a whole number.
    """
    where = adapter / ADAPTER_CONFIG
    columns = read_object(where).get("vocab_size")
    if columns is None:
        return None
    if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
        raise ModelError(
            f"{where}: vocab_size {columns!r} is no number of columns", fix="convert the adapter again"
        )
    return columns


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


def _no_constant(name: str) -> None:
    """Python's parser reads NaN and Infinity, which JSON does not have and no writer here writes."""
    raise ValueError(f"{name} is no JSON number")


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
        value = json.loads(raw, parse_constant=_no_constant)
        if b"\\u" in raw:  # an escape may be half a surrogate pair, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not valid JSON: {error}", fix="download or copy the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", fix="download or copy the checkpoint again")
    return value


def adapter_base(folder: str | Path) -> Path:
    """The folder of the base model of an adapter folder, without ``..`` in its path.

    A base on the Hub is downloaded, at the ``revision`` that the adapter's config names.

    Raises:
        ModelError: the adapter's config has no base model, or its folder does not exist.
    """
    name, revision = named_base(Path(folder))
    return resolve(name, revision)


def named_base(folder: Path) -> tuple[str, str | None]:
    """What the config of an adapter folder names as its base: an absolute path or a Hub id, and a revision.

    ``base`` is a path relative to the adapter. Adapters of mlx-lm have ``model`` instead, which is relative
    to the folder that the training was started in.

    Raises:
        ModelError: the config names none, or a folder that does not exist.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    if "peft_type" in config:
        raise ModelError(
            f"{folder} holds an adapter in PEFT's format",
            fix=f"convert it: mlx-distill convert {folder} FOLDER",
        )
    key = "base" if config.get("base") else "model"
    base = config.get(key)
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: no base model",
            fix='add "base": the path of the model that the adapter was trained on',
        )
    paths = [folder / base] if key == "base" else [Path(base).expanduser(), folder / base]
    for path in paths:
        # The model that mlx-lm names may have the name of the folder that holds the adapter.
        if path.is_dir() and (key == "base" or path.resolve() != folder.resolve()):
            if is_adapter(path):
                raise ModelError(
                    f"{folder}: its base {base!r} is an adapter, not a model",
                    fix=f"correct {key} in {ADAPTER_CONFIG}",
                )
            return str(path.resolve()), None
    if not is_hub_id(base):
        raise ModelError(
            f"{folder}: its base model {paths[0].resolve()} does not exist",
            fix=f"restore it, or correct {key} in {ADAPTER_CONFIG}",
        )
    revision = config.get("revision")
    return base, str(revision) if revision else None


def tokenizer_folder(folder: Path) -> Path:
    """The folder itself, or that of the base model of an adapter that comes without a tokenizer."""
    return adapter_base(folder) if is_adapter(folder) and not has_tokenizer(folder) else folder
