"""Everything known before the first weight is read: the plan, checked tensor by tensor against the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import architecture_of, expected_shapes
from mlx_distill.models.checkpoint.layout import Architecture, TensorPlan, forward_plan, source_name
from mlx_distill.models.checkpoint.safetensors import Checkpoint, open_checkpoint
from mlx_distill.models.config_files import load_config
from mlx_distill.models.quantization import QuantSpec

_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint's plan: ``tensors`` in our layout, ``left_out`` with reasons, ``quantization`` of the modules
    that are packed already.
    """

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    checkpoint: Checkpoint
    tensors: list[TensorPlan]
    left_out: list[tuple[str, str]]
    quantization: dict[str, QuantSpec]

    @property
    def quantizable(self) -> set[str]:
        """Module paths whose weight is a plain matrix, or one an expert."""
        matrices = (p.name for p in self.tensors if p.name.endswith(".weight") and len(p.shape) > 1)
        return {name.removesuffix(".weight") for name in matrices} - set(self.quantization)

    def parameters(self, planned: TensorPlan) -> int:
        """Weights that a tensor stands for: none where it only holds the scales of others."""
        path, _, leaf = planned.name.rpartition(".")
        if path not in self.quantization or leaf == "bias":
            return prod(planned.shape)
        return planned.rows * planned.columns * 32 // self.quantization[path].bits if leaf == "weight" else 0

    def quantized_bytes(self, path: str) -> int:
        """Bytes of a packed module's weight with its scales."""
        names = {f"{path}.{leaf}" for leaf in ("weight", "scales", "biases")}
        return sum(p.nbytes for p in self.tensors if p.name in names)


def plan_checkpoint(folder: Path) -> CheckpointPlan:
    """Read headers and config, make the plan, and check every tensor's name and shape against the config.

    Raises:
        ModelError: what is damaged, missing, too much or of another shape: with file and tensor.
    """
    config = load_config(folder)
    where = str(folder / "config.json")
    architecture = architecture_of(config, where)
    checkpoint = open_checkpoint(folder)
    planned, left_out = forward_plan(architecture, checkpoint.tensors, config)
    quantization = _check(
        checkpoint, architecture, expected_shapes(config, where), {p.name: p for p in planned}
    )
    return CheckpointPlan(
        folder,
        config,
        architecture,
        checkpoint,
        planned,
        [(info.name, why) for info, why in left_out],
        quantization,
    )


def _check(
    checkpoint: Checkpoint,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorPlan],
) -> dict[str, QuantSpec]:
    """Every expected tensor is there in its shape, plain or packed, and nothing else is; returns how the
    packed ones are.
    """
    quantization = {}
    known = set(shapes)
    for name, shape in shapes.items():
        if name not in found:
            missing = source_name(architecture, name, checkpoint.tensors)
            raise ModelError(
                f"{checkpoint.listing}: tensor {missing!r} is missing",
                fix="download the checkpoint again, or correct config.json",
            )
        plan, path = found[name], name.removesuffix(".weight")
        if plan.dtype == "U32" and name.endswith(".weight"):
            quantization[path] = _packing(checkpoint, found, path, shape)
            known |= {f"{path}.scales"} | (
                {f"{path}.biases"} if quantization[path].mode == "affine" else set()
            )
        elif plan.shape != shape:
            raise _shape_error(plan, name, shape)
    for name, plan in found.items():
        if name not in known:
            raise ModelError(
                f"{plan.where} is not part of a {architecture.model_type} with this config",
                fix="correct config.json, or remove the tensor",
            )
    return quantization


def _packing(
    checkpoint: Checkpoint, found: Mapping[str, TensorPlan], path: str, shape: tuple[int, ...]
) -> QuantSpec:
    """How a weight is packed, from its shape and type and those of its scales."""
    weight, columns = found[f"{path}.weight"], shape[-1]
    for leaf in (
        ("scales", "biases")
        if f"{path}.scales" in found and found[f"{path}.scales"].dtype != "U8"
        else ("scales",)
    ):
        if f"{path}.{leaf}" not in found:
            raise ModelError(f"{weight.where} lacks its '{path}.{leaf}'", fix="convert the checkpoint again")
    scales = found[f"{path}.scales"]
    bits, group = weight.columns * 32 // columns, columns // max(scales.columns, 1)
    mode = "affine" if scales.dtype != "U8" else _MODES.get((bits, group))
    if mode is None:
        raise ModelError(
            f"{weight.where}: {bits} bits in groups of {group} are no known quantization",
            fix="convert the checkpoint again",
        )
    if weight.shape != (*shape[:-1], columns * bits // 32) or scales.shape != (*shape[:-1], columns // group):
        raise _shape_error(weight, f"{path}.weight", shape)
    return QuantSpec("quantize", mode=mode, bits=bits, group_size=group)


def _shape_error(plan: TensorPlan, name: str, shape: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{plan.where} gives {name!r} the shape {list(plan.shape)}; config.json says {list(shape)}",
        fix="check that config and weights belong together",
    )
