"""What a calibration will take, computed from a model's config before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mlx_distill.models.architectures.registry import architecture_of, expected_shapes

# Layers that get the same input as another layer of their block, and share its Hessian.
_SHARED = ("k_proj", "v_proj", "up_proj")
_FACTOR_FLOPS = 3  # times columns cubed: a Cholesky factor, and the inverse of a triangle as of a full matrix


@dataclass(frozen=True)
class CalibrationEstimate:
    """Operations and bytes of :func:`~mlx_distill.models.calibrate.calibrate`, without the model itself.

    Attributes:
        weights: Weights that are calibrated.
        device_flops: Two passes through each block, and the products x x^T, on MLX's device.
        host_flops: Factors and rounding, on the CPU.
        states_bytes: Hidden states of the rows, before and after a block.
        hessian_bytes: The largest Hessians that exist at a time: those of one block, in float32 and float64.
    """

    weights: int
    device_flops: float
    host_flops: float
    states_bytes: int
    hessian_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Memory beside the model."""
        return self.states_bytes + self.hessian_bytes

    def seconds(self, device_rate: float, host_rate: float) -> float:
        """Time at these rates, in operations a second."""
        return self.device_flops / device_rate + self.host_flops / host_rate


def estimate_calibration(
    config: Mapping[str, Any], tokens: int, *, published_experts: bool = True, bytes_per_number: int = 2
) -> CalibrationEstimate:
    """Time and memory of a calibration, from a config.json.

    Args:
        config: Of the model.
        tokens: Of all rows together; 128 rows of 160 are 20,480.
        published_experts: Experts that the family publishes quantized stay as they are (gpt-oss).
        bytes_per_number: Of a hidden state: 2 in bfloat16, 4 in float32.
    """
    architecture = architecture_of(config)
    names = architecture.modules
    kept = published_experts and architecture.native_quantization is not None
    experts_used = int(config.get("num_experts_per_tok") or 1)
    weights, device, host = 0, 0.0, 0.0
    hessians: dict[str, int] = defaultdict(int)
    largest = hidden = 0
    for name, shape in expected_shapes(config).items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) < 2:
            continue
        is_embedding = path == names.embedding
        tied = is_embedding and bool(config.get("tie_word_embeddings"))
        if is_embedding:
            hidden = shape[-1]
        if is_embedding and not tied:
            continue
        stack = shape[0] if len(shape) == 3 else 1
        device += 4.0 * tokens * prod(shape[-2:]) * (experts_used if stack > 1 else 1)
        is_router = any(path.endswith(f".{router}") for router in names.routers)
        if is_router or (kept and any(f".{part}." in f"{path}." for part in names.experts)):
            continue
        columns = shape[-1]
        weights += prod(shape)
        host += stack * float(shape[-2]) * columns**2
        host += stack * _FACTOR_FLOPS * float(columns) ** 3
        largest = max(largest, columns)
        if not path.endswith(_SHARED):
            block = path.split(".layers.")[-1].split(".")[0] if ".layers." in path else path
            device += 2.0 * tokens * columns**2 * (experts_used if stack > 1 else 1)
            hessians[block] += stack * columns**2 * (4 + 8)
    working = 4 * 8 * largest**2  # the damped matrix, its factor, the identity and the inverse
    states = 2 * tokens * hidden * bytes_per_number
    return CalibrationEstimate(weights, device, host, states, max(hessians.values(), default=0) + working)
