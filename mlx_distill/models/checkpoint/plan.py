"""The plan of reading a checkpoint: every tensor, checked against the config before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import architecture_of, expected_shapes
from mlx_distill.models.checkpoint.foreign import check_supported, check_tensor_names
from mlx_distill.models.checkpoint.fp8 import dequantize_fp8
from mlx_distill.models.checkpoint.layout import (
    Architecture,
    ModuleNames,
    TensorPlan,
    forward_plan,
    source_name,
)
from mlx_distill.models.checkpoint.names import plain_names
from mlx_distill.models.checkpoint.safetensors import (
    DTYPE_BYTES,
    FLOATS,
    Checkpoint,
    Source,
    open_checkpoint,
)
from mlx_distill.models.checkpoint.tensor_job import from_raw
from mlx_distill.models.config_files import adapter_base, config_notes, is_adapter, load_config
from mlx_distill.models.quantization import Quantization

_FLOATING_POINT_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}  # by bits and group size
_MISSING_HEAD = "download the checkpoint again, or set tie_word_embeddings: true if its head is the embedding"
_COMPARED_BYTES = 1 << 24  # of a tensor at a time


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint in mlx-lm's layout, before it is read.

    ``tensors`` are the plans, ``left_out`` source tensors that are not needed with the reason,
    ``quantization`` the quantization of each module that is quantized in the checkpoint, by path.
    ``notes`` say what a user has to know of how the folder was read.
    """

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    checkpoint: Checkpoint
    tensors: list[TensorPlan]
    left_out: list[tuple[str, str]]
    quantization: dict[str, Quantization]
    notes: tuple[str, ...] = ()

    @property
    def quantizable(self) -> set[str]:
        """Paths of modules with an unquantized weight matrix, or one for each expert."""
        matrices = (t.name for t in self.tensors if t.name.endswith(".weight") and len(t.shape) > 1)
        return {name.removesuffix(".weight") for name in matrices} - set(self.quantization)

    def parameters(self, tensor: TensorPlan) -> int:
        """The number of weights in a tensor: 0 for scales, for quantized words what they encode."""
        path, _, leaf = tensor.name.rpartition(".")
        if path not in self.quantization or leaf == "bias":
            return prod(tensor.shape)
        return tensor.rows * tensor.columns * 32 // self.quantization[path].bits if leaf == "weight" else 0

    def quantized_bytes(self, path: str) -> int:
        """Bytes of a quantized weight, including scales and biases."""
        names = {f"{path}.{leaf}" for leaf in ("weight", "scales", "biases")}
        return sum(t.nbytes for t in self.tensors if t.name in names)


def plan_checkpoint(folder: Path) -> CheckpointPlan:
    """Read headers and config, and check the name and shape of every tensor against the config.

    Raises:
        ModelError: damaged files; a tensor that is missing, unknown or of another shape: with file and
            tensor.
    """
    config = load_config(folder)
    where = str(folder / "config.json")
    architecture = architecture_of(config, where)
    check_supported(config, folder, architecture)
    checkpoint = open_checkpoint(folder)
    named, names_note = plain_names(checkpoint.tensors, architecture.modules, checkpoint.listing)
    plain, fp8_note = dequantize_fp8(named, config, where)
    check_tensor_names(plain, checkpoint.listing)
    sources, config, head_note = _own_head(plain, architecture.modules, config, where)
    tensors, left_out = forward_plan(architecture, sources, config)
    shapes = expected_shapes(config, where)
    quantization = _check_tensors(checkpoint, architecture, shapes, {t.name: t for t in tensors})
    reasons = [(source.name, reason) for source, reason in left_out]
    notes = [note for note in (checkpoint.note, names_note, fp8_note, head_note) if note]
    notes += config_notes(folder, architecture.fields)
    return CheckpointPlan(
        folder, config, architecture, checkpoint, tensors, reasons, quantization, tuple(notes)
    )


def planned_config(folder: Path) -> dict[str, Any]:
    """The config with which a model folder, or the base of an adapter folder, is computed."""
    return plan_checkpoint(adapter_base(folder) if is_adapter(folder) else folder).config


def _own_head(
    sources: Mapping[str, Source], modules: ModuleNames, config: dict[str, Any], where: str
) -> tuple[dict[str, Source], dict[str, Any], str | None]:
    """A tied model's tensors and config, untied if the checkpoint's head differs from the embedding.

    transformers does the same. A checkpoint that holds only the head of the two, because its writer removed
    the other name of a shared tensor, has the head as its embedding.

    Returns:
        The tensors, the config, and a note if the config was wrong.
    """
    tensors = dict(sources)
    head = tensors.get(f"{modules.head}.weight")
    embedding = tensors.get(f"{modules.embedding}.weight")
    if not config.get("tie_word_embeddings") or head is None:
        return tensors, config, None
    if embedding is None:
        tensors[f"{modules.embedding}.weight"] = tensors.pop(f"{modules.head}.weight")
        return tensors, config, None
    scales = [tensors.get(f"{path}.scales") for path in (modules.head, modules.embedding)]
    biases = [tensors.get(f"{path}.biases") for path in (modules.head, modules.embedding)]
    if all(_equal(*pair) for pair in ((head, embedding), scales, biases)):
        return tensors, config, None
    note = f"{where}: tie_word_embeddings is true, but {head.where} differs from the embedding: not tied"
    return tensors, {**config, "tie_word_embeddings": False}, note


def _equal(a: Source | None, b: Source | None) -> bool:
    """Whether two tensors have the same values, compared a few rows at a time."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(FLOATS):
        return False
    columns = a.shape[-1] if a.shape else 1
    rows = prod(a.shape[:-1])
    step = max(_COMPARED_BYTES // max(columns * DTYPE_BYTES[a.dtype], 1), 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first, second = a.read(start, stop), b.read(start, stop)
        if a.dtype == b.dtype:
            same = np.array_equal(first, second)
        else:
            values = (from_raw(first, a.dtype), from_raw(second, b.dtype))
            same = bool(mx.array_equal(*(value.astype(mx.float32) for value in values)))
        if not same:
            return False
    return True


def _check_tensors(
    checkpoint: Checkpoint,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorPlan],
) -> dict[str, Quantization]:
    """Raise for missing, unknown and misshapen tensors; return the quantization of each quantized module."""
    quantization = {}
    known = set(shapes)
    for name, shape in shapes.items():
        if name not in tensors:
            missing = source_name(architecture, name, checkpoint.tensors)
            raise ModelError(
                f"{checkpoint.listing}: tensor {missing!r} is missing",
                fix=_MISSING_HEAD
                if name == f"{architecture.modules.head}.weight"
                else "download the checkpoint again, or correct config.json",
            )
        tensor, path = tensors[name], name.removesuffix(".weight")
        if tensor.dtype == "U32" and name.endswith(".weight"):
            quantization[path] = _quantization_of(tensors, path, shape)
            affine = quantization[path].mode == "affine"
            known |= {f"{path}.scales"} | ({f"{path}.biases"} if affine else set())
        elif tensor.shape != shape:
            raise _shape_error(tensor, name, shape)
        elif tensor.dtype not in FLOATS:
            raise ModelError(
                f"{tensor.where} has the type {tensor.dtype}; weights are {', '.join(FLOATS)}",
                fix="take the unquantized checkpoint, or convert it to one of these types with another tool",
            )
    for name, tensor in tensors.items():
        if name not in known:
            raise ModelError(
                f"{tensor.where} is not part of a {architecture.model_type} with this config",
                fix="take config.json and all shards from one checkpoint",
            )
    return quantization


def _quantization_of(tensors: Mapping[str, TensorPlan], path: str, shape: tuple[int, ...]) -> Quantization:
    """The quantization of a weight of this shape, from the types and shapes of its words and scales."""
    weight, columns = tensors[f"{path}.weight"], shape[-1]
    for leaf in ("scales", "biases"):
        affine = f"{path}.scales" in tensors and tensors[f"{path}.scales"].dtype != "U8"
        if (leaf == "scales" or affine) and f"{path}.{leaf}" not in tensors:
            raise ModelError(f"{weight.where} lacks its '{path}.{leaf}'", fix="convert the checkpoint again")
    scales = tensors[f"{path}.scales"]
    bits, group_size = weight.columns * 32 // columns, columns // max(scales.columns, 1)
    mode = "affine" if scales.dtype != "U8" else _FLOATING_POINT_MODES.get((bits, group_size))
    if mode is None or bits < 1 or group_size < 1:
        raise ModelError(
            f"{weight.where}: {bits} bits in groups of {group_size} are no known quantization",
            fix="convert the checkpoint again",
        )
    words, groups = columns * bits // 32, columns // group_size
    if weight.shape != (*shape[:-1], words) or scales.shape != (*shape[:-1], groups):
        raise _shape_error(weight, f"{path}.weight", shape)
    if mode == "affine":
        biases = tensors[f"{path}.biases"]
        if scales.dtype not in FLOATS or (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
            raise ModelError(
                f"{biases.where} is {biases.dtype} {list(biases.shape)} beside scales {scales.dtype} "
                f"{list(scales.shape)}",
                fix="convert the checkpoint again",
            )
    return Quantization(mode, bits, group_size)


def _shape_error(tensor: TensorPlan, name: str, shape: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{tensor.where} gives {name!r} the shape {list(tensor.shape)}; config.json says {list(shape)}",
        fix="check that config and weights belong together",
    )
