"""What a calibration will take, from shapes alone: of a loaded model, or of a config before anything is
loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.models.architectures.registry import architecture_of, build_model, module_names
from mlx_distill.models.forward import compute_dtype, hidden_size, is_tied
from mlx_distill.models.modules import cast_model, matrix_shape
from mlx_distill.models.quantization import Quantization, parse_mode
from mlx_distill.models.rounding import SLICE_WEIGHTS

# Layers that get the same input as another layer of their block, and share its Hessian.
_SHARED = ("k_proj", "v_proj", "up_proj")
_FACTOR_PRODUCTS = 3  # times columns cubed: a Cholesky factor, and a triangle inverted as a full matrix
# On one core of the machine of docs/log.md: products a second of the error feedback, and seconds a weight of
# the search for scales, which in the affine modes takes most.
HOST_RATE = 4.5e9
_SEARCH_SECONDS = 0.4e-6
_SLICE_BYTES = 30  # a weight of the rows that are rounded at a time, measured: float32 copies, steps, codes
_LATENT_BYTES = 8  # a weight of a module whose compensated weights are kept: by slices, and joined
_READ_BYTES = 4  # a weight of a module in a block, whose values are read back in float32


@dataclass(frozen=True)
class CalibrationEstimate:
    """Operations and bytes of :func:`~mlx_distill.models.calibrate.calibrate`.

    Attributes:
        weights: Weights that are calibrated.
        token_flops: Of one token through the blocks.
        device_flops: Passes through each block, and the products x x^T, on MLX's device.
        host_products: Of factors and error feedback, on the CPU.
        states_bytes: Hidden states of the rows in two models, of one before and after a block, and the inputs
            of the layers of a block in both.
        hessian_bytes: The largest Hessians that exist at a time: those of layers with the same inputs, in
            float32 and float64.
        rounding_bytes: While the largest module is rounded.
        resident_bytes: The model itself.
    """

    weights: int
    token_flops: float
    device_flops: float
    host_products: float
    states_bytes: int
    hessian_bytes: int
    rounding_bytes: int
    resident_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Memory, the model included."""
        return self.resident_bytes + self.states_bytes + self.hessian_bytes + self.rounding_bytes

    def seconds(self, device_rate: float, host_rate: float = HOST_RATE) -> float:
        """Time at rates of floating-point operations, and of products, a second."""
        search = self.weights * _SEARCH_SECONDS * HOST_RATE / host_rate
        return self.device_flops / device_rate + self.host_products / host_rate + search


def estimate_calibration(
    model: Any, quantizations: Mapping[str, Quantization], tokens: int, *, latents: bool = False
) -> CalibrationEstimate:
    """Time and memory of a calibration, from shapes: none of the model's arrays is computed.

    Args:
        model: mlx-lm's, loaded or of :func:`model_of_config`.
        quantizations: Of the modules that are calibrated, by path.
        tokens: Of all rows together; 128 rows of 160 are 20,480.
        latents: Whether the compensated weights are kept, for a training that begins with them.
    """
    names, tied = module_names(model), is_tied(model)
    experts_used = int(getattr(model.args, "num_experts_per_tok", 0) or 1)
    weights, per_token, products, host = 0, 0.0, 0.0, 0.0
    groups: dict[str, int] = defaultdict(int)  # of layers with the same inputs, by block
    measured: dict[str, float] = defaultdict(float)  # products of a token in the layers that are calibrated
    kept: dict[str, int] = defaultdict(int)  # inputs of a token that are kept in a block
    largest = rounding = hessians = 0
    for path, module in model.named_modules():
        if "weight" not in module or module.weight.ndim < 2:
            continue
        outputs, columns = matrix_shape(module)
        stack = module.weight.shape[0] if module.weight.ndim == 3 else 1
        used = min(experts_used, stack)
        in_block = path.startswith(f"{names.trunk}.layers.")
        block = path.removeprefix(f"{names.trunk}.layers.").split(".")[0] if in_block else ""
        flops = 2.0 * outputs * columns * used
        per_token += flops * in_block
        if path not in quantizations or (path == names.embedding and not tied):
            continue
        weights += stack * outputs * columns
        host += stack * (float(outputs) * columns**2 + _FACTOR_PRODUCTS * float(columns) ** 3)
        largest = max(largest, columns)
        whole = stack * outputs * columns
        joined = _packed_bytes(quantizations[path]) + _LATENT_BYTES * latents + _READ_BYTES * in_block
        sliced = _SLICE_BYTES * max(min(outputs * columns, SLICE_WEIGHTS), columns)
        rounding = max(rounding, sliced + int(joined * whole))
        measured[block] += flops * in_block
        if not path.endswith(_SHARED):
            matrices = 1 if stack > 1 else 2  # H, and for the correction that of the differences
            products += 2.0 * matrices * columns**2 * used
            hessians = max(hessians, matrices * stack * columns**2 * (4 + 8))
            groups[block] += 1
            kept[block] += columns * in_block * (stack == 1)
    working = 4 * 8 * largest**2  # the damped matrix, its factor, the identity and the inverse
    return CalibrationEstimate(
        weights=weights,
        token_flops=per_token,
        # Both models once, and for each group of layers on average half of what is calibrated.
        device_flops=tokens * (2 * per_token + products + sum(groups[b] * measured[b] for b in groups)),
        host_products=host,
        states_bytes=tokens
        * (3 * hidden_size(model) + 2 * max(kept.values(), default=0))
        * compute_dtype(model).size,
        hessian_bytes=hessians + working,
        rounding_bytes=rounding,
        resident_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
    )


def _packed_bytes(quantization: Quantization) -> float:
    """A weight of the packed tensors, by slices and joined; a scale and a bias take at most four bytes."""
    return 2 * (quantization.bits / 8 + 4 / quantization.group_size)


def predict_calibration(config: Mapping[str, Any], tokens: int, mode: str = "mxfp4") -> CalibrationEstimate:
    """The estimate for a checkpoint with a config, which need not be on this machine, in bfloat16.

    Args:
        config: The ``config.json``.
        tokens: Of all rows together.
        mode: Of the modules that :func:`model_of_config` names.
    """
    return estimate_calibration(*model_of_config(config, mode), tokens)


def model_of_config(config: Mapping[str, Any], mode: str) -> tuple[Any, dict[str, Quantization]]:
    """A model of a config's shapes in bfloat16, whose arrays are never computed, and how its modules are
    quantized: all linear layers, embeddings and stacks of experts but the routers.

    Experts that the checkpoint stores in MXFP4 are quantized already.
    """
    model, names = build_model(config), architecture_of(config).modules
    method = (config.get("quantization_config") or {}).get("quant_method")
    quantization = parse_mode(mode)

    def published(path: str, module: Any) -> bool | dict[str, Any]:
        stored = method == "mxfp4" and any(f".{name}." in f"{path}." for name in names.experts)
        return parse_mode("mxfp4").config if stored and hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=published)
    cast_model(model, "bfloat16")
    routers = tuple(f".{name}" for name in names.routers)
    return model, {
        path: quantization
        for path, module in model.named_modules()
        if "weight" in module and module.weight.ndim > 1 and "scales" not in module
        if not path.endswith(routers or "\0")
    }
