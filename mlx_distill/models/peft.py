"""LoRA and DoRA adapters to PEFT's format and back: the same alpha and rank, transposed matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import (
    SAVED_LEAVES,
    LoraSettings,
    adapter_config,
    adapter_settings,
    relative_base,
)
from mlx_distill.models.architectures.registry import architecture_of
from mlx_distill.models.checkpoint.layout import ModuleNames
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint, planned_config
from mlx_distill.models.checkpoint.safetensors import read_header
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_base,
    is_adapter,
    read_object,
)
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import commit_of, copy_tokenizer, is_hub_id, resolve
from mlx_distill.storage import atomic_path, digest, read_manifest, sha256, write_json, write_text
from mlx_distill.text import counted

# (title, exported folder, its base, notes of the export) -> README.md
Card = Callable[[str, Path, CheckpointPlan, Sequence[str]], str]

PEFT_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TO_PEFT = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_FROM_PEFT = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


@dataclass(frozen=True)
class AdapterReport:
    """An adapter that was written in another format: its base model, the paths of its modules, and a note."""

    destination: str
    base: str
    modules: tuple[str, ...]
    note: str | None = None

    @property
    def lines(self) -> list[str]:
        """The report in lines of text."""
        lines = [
            f"written to {self.destination}: adapters of {counted(len(self.modules), 'module')}",
            f"the base model that it expects: {self.base}",
        ]
        return [*lines, self.note] if self.note else lines


def original_base(base: Path) -> str:
    """The Hub id or the Hugging Face folder that a model was converted from, for tools that cannot read it.

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
            return source
    return str(path)


def to_peft(
    model: str | Path, destination: str | Path, *, base_model: str | None = None, card: Card | None = None
) -> AdapterReport:
    """Write an adapter folder in PEFT's format.

    Args:
        model: An adapter folder.
        destination: The folder to write.
        base_model: The base model for PEFT: a Hub id or a folder in the Hugging Face layout; by default what
            the adapter's base was converted from, see :func:`original_base`.
        card: Writes the model card (README.md); see :func:`~mlx_distill.report.model_card.card_text`.

    Raises:
        ModelError: not an adapter, or one on experts or routers, which PEFT's format has no place for.
        FileError: a failed write, or a destination that holds something else.
    """
    folder, destination = resolve(model), Path(destination)
    weights = peft_weights(folder)
    plan = plan_checkpoint(adapter_base(folder))
    base = base_model or original_base(plan.folder)
    settings, parents = {"layout": "peft", "base_model": base}, {"source": source_key(folder)}
    with staged_folder(destination, folder, "export", settings, parents) as staged:
        paths = write_peft(folder, staged.folder, weights, base)
        notes = [f"the adapter alone, of {counted(len(paths), 'module')}, in PEFT's format"]
        if card is not None:
            write_text(staged.folder / "README.md", card(destination.name, folder, plan, notes))
        staged.recorded.update(source=str(model), modules=len(paths))
    note = None
    if is_mlx_folder(Path(base)):
        command = f"mlx-distill export {base} FOLDER --to hf"
        note = f"that folder is in the MLX layout, which PEFT cannot load: {command}"
    return AdapterReport(str(destination), base, tuple(paths), note)


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
                f"{path}: PEFT's format has no place for {what}",
                fix="merge it instead: export with --to hf",
            )
        is_transposed = value.ndim == 2 and leaf in _TO_PEFT
        weights[f"{_PREFIX}{path}.{_TO_PEFT.get(leaf, leaf)}"] = (
            mx.contiguous(value.T) if is_transposed else value
        )
    embedding = weights.get(f"{_PREFIX}{names.embedding}.weight")
    if embedding is not None and _is_tied(config):
        weights[f"{_PREFIX}{names.head}.weight"] = embedding  # PEFT stores both of them
    return weights


def write_peft(folder: Path, destination: Path, weights: dict[str, mx.array], base_model: str) -> list[str]:
    """Write arrays with PEFT's config and the tokenizer into a folder that the caller publishes.

    Modules are named by their whole paths. PEFT keeps a head tied to an embedding of ``modules_to_save`` only
    with ``ensure_weight_tying``.

    Args:
        folder: The adapter folder.
        destination: Where to write.
        weights: From :func:`peft_weights`.
        base_model: The base model for PEFT.

    Returns:
        The paths of the adapted modules.
    """
    settings, config = adapter_settings(folder), planned_config(folder)
    embedding = architecture_of(config, str(folder)).modules.embedding
    paths, saved = set(), set()
    for name in weights:
        path = name.removeprefix(_PREFIX)
        leaf = next((leaf for leaf in _TO_PEFT.values() if path.endswith(f".{leaf}")), None)
        if leaf is None:
            saved.add(path.rpartition(".")[0])
        else:
            paths.add(path.removesuffix(f".{leaf}"))
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(paths),
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": embedding in saved and _is_tied(config),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": settings.rslora,
        "use_dora": settings.kind == "dora",
        "inference_mode": True,
    }
    with atomic_path(destination / PEFT_FILE) as temporary:
        mx.save_safetensors(str(temporary), weights, metadata={"format": "pt"})
    copy_tokenizer(folder, destination)
    write_json(destination / ADAPTER_CONFIG, peft_config)
    return sorted(paths)


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings"))


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return is_adapter(folder) and "peft_type" in read_object(folder / ADAPTER_CONFIG)


def from_peft(source: str | Path, destination: str | Path, base: str | Path | None = None) -> AdapterReport:
    """Convert a LoRA or DoRA adapter in PEFT's format to an adapter folder.

    Args:
        source: A folder, or the Hub id of one, with PEFT's ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        destination: The adapter folder to write.
        base: The base model: a folder in the MLX or the Hugging Face layout, or a Hub id; by default that of
            PEFT's config.

    Raises:
        ModelError: not LoRA, or an option of PEFT that mlx-lm's layers cannot compute.
        FileError: a failed write, or a destination that holds something else.
    """
    source, destination = resolve(source), Path(destination)
    file = source / PEFT_FILE
    config = read_object(source / ADAPTER_CONFIG)
    settings = peft_settings(source / ADAPTER_CONFIG, config)
    tie = bool(config.get("ensure_weight_tying"))
    if not file.is_file():
        raise ModelError(f"{file} is missing", fix="save the adapter as safetensors")
    base = base or str(config.get("base_model_name_or_path") or "")
    base_folder = resolve(base)
    base_config = planned_config(base_folder)
    names = architecture_of(base_config, str(base_folder)).modules
    weights = _from_peft_names(file, settings.modules_to_save, names.head if tie else None)
    if _is_tied(base_config):
        _drop_tied_head(file, weights, names, tie)
    modules: dict[bool, set[str]] = {False: set(), True: set()}
    for name in weights:
        path, _, leaf = name.rpartition(".")
        modules[leaf in SAVED_LEAVES].add(path)
    paths, saved = sorted(modules[False]), tuple(sorted(modules[True] - modules[False]))
    # target_modules are left out: the adapter has the paths of its modules.
    settings = replace(settings, target_modules=(), modules_to_save=saved)
    layers = int(base_config["num_hidden_layers"])
    mlx_config = adapter_config(settings, paths, layers, relative_base(base, destination))
    parents = {"source": digest([sha256(file), sha256(source / ADAPTER_CONFIG)])}
    key = {"layout": "peft", "base": mlx_config["base"]}
    with staged_folder(destination, source, "import", key, parents) as staged:
        with atomic_path(staged.folder / ADAPTER_FILE) as temporary:
            mx.save_safetensors(str(temporary), weights, metadata={"format": "mlx"})
        copy_tokenizer(base_folder, staged.folder)
        write_json(staged.folder / ADAPTER_CONFIG, mlx_config)
        staged.recorded.update(source=str(source), commit=commit_of(source))
    return AdapterReport(str(destination), str(base), tuple(paths))


def _from_peft_names(file: Path, saved: Sequence[str], tied_head: str | None) -> dict[str, mx.array]:
    """The arrays of a PEFT file under the names of an adapter folder.

    Args:
        file: PEFT's.
        saved: ``modules_to_save`` of its config; other full weights are not accepted.
        tied_head: A head that is tied to one of them, so that it is in the file too.
    """
    infos, _ = read_header(file)
    arrays = mx.load(str(file))
    names = (*saved, tied_head) if saved and tied_head else tuple(saved)
    weights = {}
    for name, info in infos.items():
        leaf = next((leaf for leaf in (*_FROM_PEFT, *SAVED_LEAVES) if name.endswith("." + leaf)), "")
        path = name.removeprefix(_PREFIX).removesuffix("." + leaf)
        is_known = leaf in _FROM_PEFT or (leaf in SAVED_LEAVES and path.endswith(names))
        if not name.startswith(_PREFIX) or not is_known:
            raise ModelError(
                f"{info.where} is not a LoRA matrix of a linear layer", fix="save a LoRA adapter"
            )
        is_transposed = arrays[name].ndim == 2 and leaf in _FROM_PEFT
        value = mx.contiguous(arrays[name].T) if is_transposed else arrays[name]
        weights[f"{path}.{_FROM_PEFT.get(leaf, leaf)}"] = value
    for name in saved:
        if not any(path.endswith((f"{name}.weight", f"{name}.bias")) for path in weights):
            raise ModelError(
                f"{file} has no tensor of {name!r}, which modules_to_save names",
                fix="save the adapter with PEFT again",
            )
    return weights


def _drop_tied_head(file: Path, weights: dict[str, mx.array], names: ModuleNames, tie: bool) -> None:
    """Remove the copy of the embedding that PEFT stores as the head of a model whose head is its embedding.

    Raises:
        ModelError: head and embedding are different weights in the file. PEFT ties them only with
            ``ensure_weight_tying``, here ``tie``.
    """
    embedding, head = (weights.get(f"{path}.weight") for path in (names.embedding, names.head))
    if embedding is None and head is None:
        return
    if embedding is None or not (tie if head is None else mx.array_equal(embedding, head).item()):
        raise ModelError(
            f"{file}: embedding and head differ, and the base model ties them",
            fix="train with ensure_weight_tying: true",
        )
    weights.pop(f"{names.head}.weight", None)


def peft_settings(where: Path, config: Mapping[str, Any]) -> LoraSettings:
    """The settings in PEFT's ``adapter_config.json``.

    Raises:
        ModelError: not LoRA, or an option of PEFT that mlx-lm's layers cannot compute.
    """
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{where}: peft_type {config.get('peft_type')!r}", fix="only LORA adapters can be read"
        )
    for key in (
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
        "target_parameters",
        "fan_in_fan_out",
        "lora_bias",
    ):
        if config.get(key):
            raise ModelError(
                f"{where}: {key} is not supported",
                fix="merge the adapter with PEFT and convert the whole model",
            )
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{where}: bias {config['bias']!r} is not supported",
            fix="merge the adapter with PEFT and convert the whole model",
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise ModelError(f"{where}: {key} is missing", fix="save the adapter with PEFT again")
    kind, dropout = "dora" if config.get("use_dora") else "lora", float(config.get("lora_dropout") or 0.0)
    targets = config.get("target_modules") or ()
    names = (targets,) if isinstance(targets, str) else tuple(targets)  # a string is a regular expression
    saved = tuple(config.get("modules_to_save") or ())
    return LoraSettings(
        int(config["r"]),
        float(config["lora_alpha"]),
        dropout,
        names,
        kind,
        bool(config.get("use_rslora")),
        saved,
    )
