"""Tensor names as training tools write them, and the names of the plain model that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.layout import ModuleNames
from mlx_distill.models.checkpoint.safetensors import TensorInfo

# Components of a path that name a wrapper of a module; no module is called like this.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
_DATA_PARALLEL = "module."  # DDP, DeepSpeed
# Beginnings of names that say that the weights are not those of a plain causal model.
_FOREIGN = (
    (
        "base_model.model.",
        "PEFT wraps a model like this",
        "merge the adapter (merge_and_unload) and save the result, or convert the adapter folder itself",
    ),
    (
        "model.language_model.",
        "a vision-language model names its text model like this",
        "take the checkpoint of the text model alone",
    ),
    (
        "language_model.",
        "a vision-language model names its text model like this",
        "take the checkpoint of the text model alone",
    ),
)


def plain_names(
    tensors: Mapping[str, TensorInfo], modules: ModuleNames, listing: Path
) -> tuple[dict[str, TensorInfo], str | None]:
    """The tensors under the names of the plain model.

    Wrappers of ``torch.compile``, FSDP and DDP are taken out of the names, and the trunk's name is put before
    those of a checkpoint of the trunk alone (``layers.0...`` is ``model.layers.0...``), as transformers does.

    Returns:
        The tensors, and a note on what was changed; None if nothing was.

    Raises:
        ModelError: names of PEFT or of a vision-language model, or two tensors of one name.
    """
    out, wrappers = _unwrapped(tensors)
    notes = [f"{listing}: left out of tensor names: {', '.join(wrappers)}"] if wrappers else []
    embedding, trunk, head = f"{modules.embedding}.weight", f"{modules.trunk}.", f"{modules.head}."
    if embedding in out:
        return out, notes[0] if notes else None
    for prefix, origin, fix in _FOREIGN:
        if example := next((info.name for name, info in out.items() if name.startswith(prefix)), None):
            raise ModelError(f"{listing}: tensor {example!r} begins with {prefix!r}: {origin}", fix=fix)
    if embedding.removeprefix(trunk) in out and not any(name.startswith(trunk) for name in out):
        out = {name if name.startswith(head) else f"{trunk}{name}": info for name, info in out.items()}
        notes.append(f"{listing}: {trunk!r} put before tensor names (a checkpoint of the trunk alone)")
    return out, "; ".join(notes) or None


def _unwrapped(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors without wrappers in their names, and the wrappers."""
    is_parallel = bool(tensors) and all(name.startswith(_DATA_PARALLEL) for name in tensors)
    wrappers = dict.fromkeys([f"{_DATA_PARALLEL} (DDP or DeepSpeed)"] if is_parallel else [])
    out: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        parts = (name.removeprefix(_DATA_PARALLEL) if is_parallel else name).split(".")
        wrappers |= dict.fromkeys(f"{part}. ({_WRAPPERS[part]})" for part in parts if part in _WRAPPERS)
        plain = ".".join(part for part in parts if part not in _WRAPPERS)
        if plain in out:
            raise ModelError(
                f"{info.where} and {out[plain].name!r} are both {plain!r}", fix="remove one of them"
            )
        out[plain] = info
    return out, list(wrappers)
