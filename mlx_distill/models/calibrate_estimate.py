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

# Layers that get the same input as another layer of their block, and share its Hessian.
_SHARED = ("k_proj", "v_proj", "up_proj")
_FACTOR_PRODUCTS = 3  # times columns cubed: a Cholesky factor, and a triangle inverted as a full matrix
# On one core of the machine of docs/log.md: products a second of the error feedback, and seconds a weight of
# the search for scales, which in the affine modes takes most.
HOST_RATE = 4.5e9
_SEARCH_SECONDS = 0.4e-6
_ROUNDING_BYTES = 30  # a weight of the matrix that is rounded, measured: float32 copies, steps and codes
_STACK_BYTES = 8  # a weight of a whole stack of experts: the compensated weights, one by one and stacked


@dataclass(frozen=True)
class CalibrationEstimate:
    """Operations and bytes of :func:`~mlx_distill.models.calibrate.calibrate`.

    Attributes:
        weights: Weights that are calibrated.
        token_flops: Of one token through the blocks.
        device_flops: Two passes through each block, and the products x x^T, on MLX's device.
        host_products: Of factors and error feedback, on the CPU.
        states_bytes: Hidden states of the rows, before and after a block.
        hessian_bytes: The largest Hessians that exist at a time: those of one block, in float32 and float64.
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
    model: Any, quantizations: Mapping[str, Quantization], tokens: int
) -> CalibrationEstimate:
    """Time and memory of a calibration, from shapes: none of the model's arrays is computed.

    Args:
        model: mlx-lm's, loaded or of :func:`model_of_config`.
        quantizations: Of the modules that are calibrated, by path.
        tokens: Of all rows together; 128 rows of 160 are 20,480.
    """
    names, tied = module_names(model), is_tied(model)
    experts_used = int(getattr(model.args, "num_experts_per_tok", 0) or 1)
    weights, per_token, products, host = 0, 0.0, 0.0, 0.0
    hessians: dict[str, int] = defaultdict(int)
    largest = rounding = 0
    for path, module in model.named_modules():
        if "weight" not in module or module.weight.ndim < 2:
            continue
        outputs, columns = matrix_shape(module)
        stack = module.weight.shape[0] if module.weight.ndim == 3 else 1
        used = min(experts_used, stack)
        in_block = path.startswith(f"{names.trunk}.layers.")
        if in_block:
            per_token += 2.0 * outputs * columns * used
        if path not in quantizations or (path == names.embedding and not tied):
            continue
        weights += stack * outputs * columns
        host += stack * (float(outputs) * columns**2 + _FACTOR_PRODUCTS * float(columns) ** 3)
        largest = max(largest, columns)
        whole = _STACK_BYTES * stack * outputs * columns if stack > 1 else 0
        rounding = max(rounding, _ROUNDING_BYTES * outputs * columns + whole)
        if not path.endswith(_SHARED):
            block = path.removeprefix(f"{names.trunk}.layers.").split(".")[0] if in_block else path
            products += 2.0 * columns**2 * used
            hessians[block] += stack * columns**2 * (4 + 8)
    working = 4 * 8 * largest**2  # the damped matrix, its factor, the identity and the inverse
    return CalibrationEstimate(
        weights=weights,
        token_flops=per_token,
        device_flops=tokens * (2 * per_token + products),
        host_products=host,
        states_bytes=2 * tokens * hidden_size(model) * compute_dtype(model).size,
        hessian_bytes=max(hessians.values(), default=0) + working,
        rounding_bytes=rounding,
        resident_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
    )


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
