"""LoRA adapters in PEFT's format: out and in. The matrices are the same ones, transposed; the scale is alpha over rank on both sides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.files import atomic_path, write_json
from mlx_distill.models.adapters import ADAPTER_FILE, adapter_base, adapter_settings, relative_base
from mlx_distill.models.checkpoint import read_header
from mlx_distill.models.config_files import ADAPTER_CONFIG, load_config, read_object
from mlx_distill.models.tokenizer_files import copy_tokenizer

PEFT_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OUT = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_IN = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}


def to_peft(model: str | Path, destination: str | Path, *, base_model: str | None = None) -> list[str]:
    """Write an adapter folder of ours as PEFT reads it; return the adapted paths.

    Args:
        model: An adapter folder of ours.
        destination: The folder to make.
        base_model: What PEFT will call the base (a Hub id or a folder in the Hugging Face layout); the base's own path if not given.

    Raises:
        ModelError: not an adapter, or an adapter on experts, which PEFT has no place for.
    """
    folder, destination = Path(model), Path(destination)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} holds no adapter", fix="export the whole model with --to hf")
    settings = adapter_settings(folder)
    weights = mx.load(str(folder / ADAPTER_FILE))
    out = {}
    for name, value in weights.items():
        path, leaf = name.rsplit(".", 1)
        if value.ndim == 3:
            raise ModelError(f"{path}: PEFT's format has no place for adapters on experts", fix="merge it instead: export with --to hf")
        out[f"{_PREFIX}{path}.{_OUT[leaf]}"] = mx.contiguous(value.T) if value.ndim == 2 else value
    paths = sorted({name.rsplit(".", 1)[0] for name in weights})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or str(adapter_base(folder)),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": paths,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": settings.kind == "dora",
        "inference_mode": True,
    }
    with atomic_path(destination / PEFT_FILE) as temporary:
        mx.save_safetensors(str(temporary), out, metadata={"format": "pt"})
    copy_tokenizer(folder, destination)
    write_json(destination / ADAPTER_CONFIG, config)
    return paths


def from_peft(source: str | Path, destination: str | Path, base: str | Path) -> list[str]:
    """Read a PEFT LoRA adapter into an adapter folder of ours; return the adapted paths.

    Args:
        source: A folder with PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.
        destination: The adapter folder to make.
        base: The base model: a folder of ours or of the Hugging Face layout.

    Raises:
        ModelError: not LoRA, or one of PEFT's options that mlx-lm's layers cannot compute.
    """
    source, destination = Path(source), Path(destination)
    config = read_object(source / ADAPTER_CONFIG)
    _refuse_options(source / ADAPTER_CONFIG, config)
    if not (source / PEFT_FILE).is_file():
        raise ModelError(f"{source / PEFT_FILE} is missing", fix="save the adapter as safetensors")
    infos, _ = read_header(source / PEFT_FILE)
    weights = mx.load(str(source / PEFT_FILE))
    out = {}
    for name, info in infos.items():
        ending = next((ending for ending in _IN if name.endswith("." + ending)), None)
        if ending is None or not name.startswith(_PREFIX):
            raise ModelError(
                f"{info.where} is not a LoRA matrix of a linear layer", fix="save a plain LoRA adapter, without modules_to_save"
            )
        value = weights[name]
        path = name.removeprefix(_PREFIX).removesuffix("." + ending)
        out[f"{path}.{_IN[ending]}"] = mx.contiguous(value.T) if value.ndim == 2 else value
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    paths = sorted({name.rsplit(".", 1)[0] for name in out})
    keys = sorted({path.split(".", 3)[-1] if path.startswith("model.layers.") else path for path in paths})
    layers = int(load_config(base)["num_hidden_layers"]) if Path(base).is_dir() else 1000
    ours = {
        "fine_tune_type": "dora" if config.get("use_dora") else "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": float(config.get("lora_dropout") or 0.0), "keys": keys},
        "alpha": scale * rank,
        "target_modules": keys,
        "base": relative_base(base, destination),
    }
    with atomic_path(destination / ADAPTER_FILE) as temporary:
        mx.save_safetensors(str(temporary), out, metadata={"format": "mlx"})
    if Path(base).is_dir():
        copy_tokenizer(Path(base), destination)
    write_json(destination / ADAPTER_CONFIG, ours)
    return paths


def _refuse_options(where: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type {config.get('peft_type')!r}", fix="only LORA adapters can be read")
    for key in (
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layer_replication",
        "target_parameters",
        "fan_in_fan_out",
        "lora_bias",
    ):
        if config.get(key):
            raise ModelError(f"{where}: {key} is not supported", fix="merge the adapter with PEFT and convert the whole model")
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{where}: bias {config['bias']!r} is not supported", fix="merge the adapter with PEFT and convert the whole model"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise ModelError(f"{where}: {key} is missing", fix="save the adapter with PEFT again")
