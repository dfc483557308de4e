"""LoRA and DoRA adapters to PEFT's format: the same alpha and rank, transposed matrices.

The way back is :mod:`~mlx_distill.models.peft_import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models.adapter_import import AdapterReport
from mlx_distill.models.adapters import SAVED_LEAVES, adapter_settings
from mlx_distill.models.architectures.registry import architecture_of
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint, planned_config
from mlx_distill.models.checkpoint.safetensors import read_header
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PEFT_FILE,
    adapter_base,
    adapter_columns,
    named_base,
    tokenizer_folder,
)
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import copy_tokenizer, find_local, is_hub_id, resolve
from mlx_distill.models.peft_import import PEFT_PREFIX as _PREFIX
from mlx_distill.models.peft_import import from_peft, is_peft
from mlx_distill.storage import atomic_path, read_manifest, write_json, write_text
from mlx_distill.text import counted

__all__ = ["Card", "from_peft", "is_peft", "original_base", "peft_weights", "to_peft", "write_peft"]

# (title, exported folder, its base, notes of the export) -> README.md
Card = Callable[[str, Path, CheckpointPlan, Sequence[str]], str]

_TO_PEFT = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def original_base(base: Path) -> tuple[str, str | None]:
    """What a model was converted from, for tools that cannot read it: a Hub id and its commit, or a folder.

    If that is not known, the absolute path of the folder itself.
    """
    path, seen = base.resolve(), set[Path]()
    while (
        path not in seen
        and (manifest := read_manifest(path))
        and (source := str(manifest.recorded.get("source") or ""))
    ):
        seen.add(path)
        if (Path(source).expanduser() / "config.json").is_file():
            path = Path(source).expanduser().resolve()
        elif is_hub_id(source):
            return source, str(manifest.recorded.get("commit") or "") or None
    return str(path), None


def _peft_base(folder: Path) -> tuple[str, str | None]:
    """The base of an adapter folder for PEFT: that of its config, if it is on the Hub, else its original."""
    name, revision = named_base(folder)
    return (name, revision) if find_local(name) is None else original_base(Path(name))


def to_peft(
    model: str | Path, destination: str | Path, *, base_model: str | None = None, card: Card | None = None
) -> AdapterReport:
    """Write an adapter folder in PEFT's format.

    Args:
        model: An adapter folder.
        destination: The folder to write.
        base_model: The base model for PEFT: a Hub id or a folder in the Hugging Face layout; by default the
            adapter's base on the Hub, or what its base was converted from, see :func:`original_base`.
        card: Writes the model card (README.md); see :func:`~mlx_distill.report.model_card.card_text`.

    Raises:
        ModelError: not an adapter, or one on experts or routers, which PEFT's format has no place for.
        FileError: a failed write, or a destination that holds something else.
    """
    folder, destination = resolve(model), Path(destination)
    weights = peft_weights(folder)
    plan = plan_checkpoint(adapter_base(folder))
    base, revision = (base_model, None) if base_model else _peft_base(folder)
    settings, parents = {"layout": "peft", "base_model": base}, {"source": source_key(folder)}
    with staged_folder(destination, folder, "export", settings, parents) as staged:
        paths = write_peft(folder, staged.folder, weights, base, revision)
        notes = [f"the adapter alone, of {counted(len(paths), 'module')}, in PEFT's format"]
        if card is not None:
            write_text(staged.folder / "README.md", card(destination.name, folder, plan, notes))
        staged.recorded.update(source=str(model), modules=len(paths))
    notes = []
    if is_mlx_folder(Path(base)):
        command = f"mlx-distill export {base} FOLDER --to hf"
        notes.append(f"that folder is in the MLX layout, which PEFT cannot load: {command}")
    if columns := adapter_columns(folder):
        notes.append(f"before PEFT loads it: base.resize_token_embeddings({columns})")
    return AdapterReport(str(destination), base, tuple(paths), "; ".join(notes) or None)


def is_mlx_folder(folder: Path) -> bool:
    """Whether a folder was written by this package in the MLX layout."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.stage != "export"


def peft_weights(folder: Path) -> dict[str, mx.array]:
    """The arrays of an adapter folder under PEFT's names.

    Raises:
        ModelError: not an adapter, or one on modules that are no linear layers in transformers.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} holds no adapter", fix="export the whole model with --to hf")
    config = planned_config(folder)
    names = architecture_of(config, str(folder)).modules
    routers = tuple(f".{name}" for name in names.routers)
    infos, _ = read_header(folder / ADAPTER_FILE)  # raises with the name of a truncated tensor
    weights = {}
    for name, value in mx.load(str(folder / ADAPTER_FILE)).items():
        path, _, leaf = name.rpartition(".")
        if leaf not in (*_TO_PEFT, *SAVED_LEAVES):
            raise ModelError(f"{infos[name].where} is no matrix of an adapter", fix="train the adapter again")
        if value.ndim == 3 or path.endswith(routers):
            what = "adapters on" if leaf in _TO_PEFT else "fully trained"
            what += " experts" if value.ndim == 3 else " routers"
            raise ModelError(
                f"{path}: {what} are not written in PEFT's format",
                fix="merge it instead: export with --to hf",
            )
        is_transposed = value.ndim == 2 and leaf in _TO_PEFT
        inner = f"{path}.base_layer" if leaf == "bias" and f"{path}.lora_a" in infos else path
        weights[f"{_PREFIX}{inner}.{_TO_PEFT.get(leaf, leaf)}"] = (
            mx.contiguous(value.T) if is_transposed else value
        )
    embedding = weights.get(f"{_PREFIX}{names.embedding}.weight")
    if embedding is not None and _is_tied(config):
        weights[f"{_PREFIX}{names.head}.weight"] = embedding  # PEFT stores both of them
    return weights


def write_peft(
    folder: Path,
    destination: Path,
    weights: dict[str, mx.array],
    base_model: str,
    revision: str | None = None,
) -> list[str]:
    """Write arrays with PEFT's config and the tokenizer into a folder that the caller publishes.

    Modules are named by their whole paths. PEFT keeps a head tied to an embedding of ``modules_to_save`` only
    with ``ensure_weight_tying``.

    Args:
        folder: The adapter folder.
        destination: Where to write.
        weights: From :func:`peft_weights`.
        base_model: The base model for PEFT.
        revision: Its commit, tag or branch on the Hub.

    Returns:
        The paths of the adapted modules.
    """
    settings, config = adapter_settings(folder), planned_config(folder)
    embedding = architecture_of(config, str(folder)).modules.embedding
    paths, saved, biases = set(), set(), set()
    for name in weights:
        path = name.removeprefix(_PREFIX)
        leaf = next((leaf for leaf in _TO_PEFT.values() if path.endswith(f".{leaf}")), None)
        if leaf is not None:
            paths.add(path.removesuffix(f".{leaf}"))
        elif path.endswith(".weight"):
            saved.add(path.removesuffix(".weight"))
        else:
            biases.add(path.removesuffix(".bias"))
    lone = [path for path in biases - saved if not path.endswith(".base_layer")]
    bias = "all" if lone else "lora_only" if biases - saved else "none"
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(paths),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": embedding in saved and _is_tied(config),
        "bias": bias,
        "fan_in_fan_out": False,
        "use_rslora": settings.rslora,
        "use_dora": settings.kind == "dora",
        "inference_mode": True,
    }
    with atomic_path(destination / PEFT_FILE) as temporary:
        mx.save_safetensors(str(temporary), weights, metadata={"format": "pt"})
    copy_tokenizer(tokenizer_folder(folder), destination)
    write_json(destination / ADAPTER_CONFIG, peft_config)
    return sorted(paths)


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings"))
