"""LoRA and DoRA adapters in PEFT's format to adapter folders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models.adapter_import import (
    AdapterReport,
    BaseModel,
    ReadAdapter,
    check_finite,
    check_module,
    check_whole,
    no_module,
    open_base,
    require_modules,
    vocabulary_of,
    write_import,
)
from mlx_distill.models.adapters import LoraSettings
from mlx_distill.models.checkpoint.safetensors import TensorInfo, read_header
from mlx_distill.models.config_files import ADAPTER_CONFIG, PEFT_FILE, is_adapter, read_object
from mlx_distill.models.hub import resolve
from mlx_distill.models.peft_config import MERGE, ModuleScale, PeftConfig, peft_config
from mlx_distill.models.peft_experts import expert_parameter, parameter_path, single_expert, stack_experts
from mlx_distill.text import counted

PEFT_PREFIX = "base_model.model."
_LEAVES = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return is_adapter(folder) and "peft_type" in read_object(folder / ADAPTER_CONFIG)


def from_peft(
    source: str | Path, destination: str | Path, base: str | Path | None = None, *, dry_run: bool = False
) -> AdapterReport:
    """Convert a LoRA or DoRA adapter in PEFT's format to an adapter folder.

    Modules of different ranks and alphas get the largest rank, with zeros, and one scale, which changes their
    ``B`` by the quotient of the scales. Adapters on single experts are stacked, and those on parameters of
    all experts (``target_parameters``) divided.

    Args:
        source: A folder, or the Hub id of one, with PEFT's ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        destination: The adapter folder to write.
        base: The base model: a folder in the MLX or the Hugging Face layout, or a Hub id; by default that of
            PEFT's config, at its ``revision``. Of a Hub model only the config and the tokenizer are
            downloaded, to hold the adapter against it by name and shape.
        dry_run: Only check it, and write nothing.

    Raises:
        ModelError: not LoRA, an option of PEFT that mlx-lm's layers cannot compute, an adapter that does not
            fit its base, or NaN: with file and key or tensor.
        FileError: a failed write, or a destination that holds something else.
    """
    source, destination = resolve(source), Path(destination)
    file, values = source / PEFT_FILE, read_object(source / ADAPTER_CONFIG)
    config = peft_config(source / ADAPTER_CONFIG, values)
    if not file.is_file():
        pickled = source / "adapter_model.bin"
        what = f"{pickled}: pickled weights are never opened" if pickled.is_file() else f"{file} is missing"
        raise ModelError(what, fix="save the adapter as safetensors")
    if base is None:
        named, revision = values.get("base_model_name_or_path"), values.get("revision")
        model = open_base(source, str(named or ""), str(revision) if revision else None, chosen=False)
    else:
        model = open_base(source, str(base), None, chosen=True)
    adapter = _read(file, config, model)
    return write_import(source, (file, source / ADAPTER_CONFIG), destination, model, adapter, "peft", dry_run)


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a PEFT file: of each adapted module by leaf, and whole weights and biases by name."""

    file: Path
    matrices: Mapping[str, Mapping[str, TensorInfo]]
    whole: Mapping[str, TensorInfo]


def _read(file: Path, config: PeftConfig, base: BaseModel) -> ReadAdapter:
    tensors = _sort_tensors(file, config, base)
    infos = {info.name: info for parts in tensors.matrices.values() for info in parts.values()}
    infos |= {info.name: info for info in tensors.whole.values()}
    for path, parts in tensors.matrices.items():
        _check_matrices(path, parts, config, base)
    arrays = mx.load(str(file))
    check_finite(arrays, infos)
    whole = {name: arrays[info.name] for name, info in tensors.whole.items()}
    if base.is_tied:
        _drop_tied_head(tensors, whole, config, base)
    rows = {
        name.rpartition(".")[0]: check_whole(name, tensors.whole[name], base)
        for name in whole
        if name.endswith(".weight")
    }
    for name in whole:
        if name.endswith(".bias"):
            check_whole(name, tensors.whole[name], base)
    settings, low_rank = _scaled(tensors, arrays, config, base)
    _merge_into_whole(low_rank, whole, settings, config)
    weights = _in_our_names(low_rank, base) | whole
    paths = require_modules({name.rpartition(".")[0] for name in weights if name not in whole}, file)
    saved = tuple(sorted({name.rpartition(".")[0] for name in whole} - set(paths)))
    # target_modules are left out: the adapter has the paths of its modules.
    settings = replace(settings, target_modules=(), modules_to_save=saved)
    note = _untouched_note(tensors, config, base)
    return ReadAdapter(weights, settings, paths, vocabulary_of(rows, base, file), note)


def _sort_tensors(file: Path, config: PeftConfig, base: BaseModel) -> _Tensors:
    """Sort the tensors of a file by their names; see :class:`_Tensors`.

    Raises:
        ModelError: a name that is none of LoRA, or none that the config accounts for.
    """
    infos, _ = read_header(file)
    saved = config.settings.modules_to_save
    ends, kept = tuple(saved), (base.architecture.modules.embedding, base.architecture.modules.head)
    matrices: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    whole: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        _check_name(name, info)
        inner = name.removeprefix(PEFT_PREFIX)
        ending = next((ending for ending in _LEAVES if inner.endswith(ending)), None)
        if ending is not None:
            path = parameter_path(inner.removesuffix(ending), info, config, base)
            matrices[path][_LEAVES[ending]] = info
            continue
        path, _, leaf = inner.rpartition(".")
        path = path.removesuffix(".base_layer")
        is_saved = bool(ends) and path.endswith(ends)
        # PEFT stores embedding and head as soon as one of them was resized or targeted.
        is_known = (leaf == "weight" and (is_saved or path in kept)) or (
            leaf == "bias" and (is_saved or config.values.get("bias", "none") != "none")
        )
        if not is_known:
            raise ModelError(f"{info.where} is not a LoRA matrix of a linear layer", fix=MERGE)
        whole[f"{path}.{leaf}"] = info
    for name in saved:
        if not any(tensor.endswith((f"{name}.weight", f"{name}.bias")) for tensor in whole):
            raise ModelError(
                f"{file} has no tensor of {name!r}, which modules_to_save names",
                fix="save the adapter with PEFT again",
            )
    return _Tensors(file, matrices, whole)


def _check_name(name: str, info: TensorInfo) -> None:
    """Raise for names that PEFT itself would not load, and for adapters on embeddings."""
    if any(part in name for part in ("lora_embedding_", "trainable_tokens_")):
        raise ModelError(f"{info.where} changes an embedding, which no layer here computes", fix=MERGE)
    if "_orig_mod." in name:
        raise ModelError(
            f"{info.where} is named after a compiled model, and PEFT would pass it over",
            fix="save the model that was compiled (model._orig_mod.save_pretrained)",
        )
    if not name.startswith(PEFT_PREFIX) or ".lora_A.default." in name or ".lora_B.default." in name:
        raise ModelError(
            f"{info.where} has not the name that PEFT gives it, and PEFT would pass it over",
            fix="save it with PEFT (model.save_pretrained), and not its state_dict",
        )


def _check_matrices(path: str, parts: Mapping[str, TensorInfo], config: PeftConfig, base: BaseModel) -> None:
    names, first = base.architecture.modules, next(iter(parts.values()))
    rank = _module(path, config, base).rank
    if parameter := expert_parameter(path, base):
        check_module(path, parts, parameter.needed(rank, base), base)
        return
    ours, expert = single_expert(path, base) or (path, None)
    shape = base.shapes.get(f"{ours}.weight", ())
    if expert is not None and len(shape) == 3 and expert < shape[0]:
        shape = shape[1:]
    if len(shape) != 2 or path == names.embedding:
        raise no_module(first, path, base)
    outputs, inputs = shape
    needed: dict[str, tuple[int, ...]] = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}
    check_module(path, parts, needed | ({"m": (outputs,)} if config.kind == "dora" else {}), base)
    if not config.is_target(path, names.head) and not config.is_parameter(f"{path}.weight"):
        raise ModelError(
            f"{first.where} is of a module that {config.where.name} does not name: PEFT would leave it out",
            fix="correct target_modules, exclude_modules or layers_to_transform",
        )


def _module(path: str, config: PeftConfig, base: BaseModel) -> ModuleScale:
    """Rank and scale; the patterns of a module that is named by its parameter are those of the parameter."""
    is_linear = expert_parameter(path, base) is None
    is_named = is_linear and config.is_parameter(f"{path}.weight")
    return config.module(f"{path}.weight" if is_named else path)


def _scaled(
    tensors: _Tensors, arrays: Mapping[str, mx.array], config: PeftConfig, base: BaseModel
) -> tuple[LoraSettings, dict[str, dict[str, mx.array]]]:
    """All matrices with one rank and one scale, in PEFT's orientation, and the settings with these."""
    modules = {path: _module(path, config, base) for path in tensors.matrices}
    settings = config.settings
    scales, rank = {module.scale for module in modules.values()}, settings.rank
    if modules:
        rank = max(module.rank for module in modules.values())
    scale = settings.scale if settings.scale in scales or not scales else max(scales, key=abs)
    if (rank, scale) != (settings.rank, settings.scale):
        ratio = replace(settings, rank=rank, alpha=1.0).scale
        settings = replace(settings, rank=rank, alpha=scale / ratio)
    out = {}
    for path, module in modules.items():
        parts = {leaf: arrays[info.name] for leaf, info in tensors.matrices[path].items()}
        if parameter := expert_parameter(path, base):
            parts = parameter.unstacked(parts, module.rank)
        if module.scale != scale:
            parts["lora_b"] = parts["lora_b"].astype(mx.float32) * (module.scale / scale)
        missing = rank - module.rank
        if missing:
            others = [(0, 0)] * (parts["lora_a"].ndim - 2)
            parts["lora_a"] = mx.pad(parts["lora_a"], [*others, (0, missing), (0, 0)])
            parts["lora_b"] = mx.pad(parts["lora_b"], [*others, (0, 0), (0, missing)])
        out[path] = parts
    return settings, out


def _merge_into_whole(
    low_rank: dict[str, dict[str, mx.array]],
    whole: dict[str, mx.array],
    settings: LoraSettings,
    config: PeftConfig,
) -> None:
    """Merge the matrices of modules whose whole weight is in the file too: PEFT stores that of a head that
    has an adapter.
    """
    for path in [path for path in low_rank if f"{path}.weight" in whole]:
        if config.kind == "dora":
            raise ModelError(f"{config.where}: DoRA on {path}, whose whole weight is stored too", fix=MERGE)
        parts, weight = low_rank.pop(path), whole[f"{path}.weight"].astype(mx.float32)
        a, b = (parts[leaf].astype(mx.float32) for leaf in ("lora_a", "lora_b"))
        whole[f"{path}.weight"] = weight + settings.scale * (b @ a)


def _in_our_names(low_rank: Mapping[str, Mapping[str, mx.array]], base: BaseModel) -> dict[str, mx.array]:
    """The matrices under the names of an adapter folder: transposed, or stacked for experts."""
    weights: dict[str, mx.array] = {}
    experts: dict[str, dict[int, Mapping[str, mx.array]]] = defaultdict(dict)
    for path, parts in low_rank.items():
        if parameter := expert_parameter(path, base):
            weights |= parameter.by_module(parts)
        elif place := single_expert(path, base):
            experts[place[0]][place[1]] = parts
        else:
            for leaf, value in parts.items():
                weights[f"{path}.{leaf}"] = mx.contiguous(value.T) if value.ndim == 2 else value
    for path, members in experts.items():
        weights |= stack_experts(path, members, base.shapes[f"{path}.weight"][0])
    return weights


def _drop_tied_head(
    tensors: _Tensors, whole: dict[str, mx.array], config: PeftConfig, base: BaseModel
) -> None:
    """Remove the copy of the embedding that PEFT stores as the head of a model whose head is its embedding.

    Raises:
        ModelError: head and embedding are different weights in the file. PEFT ties modules_to_save only with
            ``ensure_weight_tying``.
    """
    names = base.architecture.modules
    embedding, head = (whole.get(f"{path}.weight") for path in (names.embedding, names.head))
    if embedding is None and head is None:
        return
    is_wrapped = names.embedding.endswith(tuple(config.settings.modules_to_save))
    is_tied = head is None and (bool(config.values.get("ensure_weight_tying")) or not is_wrapped)
    if embedding is not None and head is not None:
        is_tied = embedding.shape == head.shape and mx.array_equal(embedding, head).item()
    if not is_tied:
        raise ModelError(
            f"{tensors.file}: embedding and head differ, and the base model ties them",
            fix="train with ensure_weight_tying: true",
        )
    whole.pop(f"{names.head}.weight", None)


def _untouched_note(tensors: _Tensors, config: PeftConfig, base: BaseModel) -> str | None:
    """Which modules the config names and the file has no matrices of, in words."""
    names = base.architecture.modules
    missing = [
        path
        for path, shape in ((name.removesuffix(".weight"), shape) for name, shape in base.shapes.items())
        if len(shape) == 2
        and path != names.embedding
        and path not in tensors.matrices
        and not path.endswith(tuple(f".{router}" for router in names.routers))
        and config.values.get("target_modules")
        and config.is_target(path, names.head)
    ]
    if not missing:
        return None
    return (
        f"{counted(len(missing), 'module')} that target_modules names have no matrices in the file and stay "
        f"as in the base: {_first(missing)}"
    )


def _first(paths: Sequence[Any], count: int = 3) -> str:
    more = f" and {len(paths) - count} more" if len(paths) > count else ""
    return ", ".join(map(str, paths[:count])) + more
