"""Weights in FP8 with a float scale for each block, as in the official Qwen3-...-FP8, dequantized while read.

``weight[i, j] = value[i, j] * scale[i // rows, j // columns]``, with the values in E4M3 (no infinity) and
blocks of ``weight_block_size``. It is computed in float32 and rounded once, as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.foreign import FP8, unsupported_quantization
from mlx_distill.models.checkpoint.layout import TensorPlan
from mlx_distill.models.checkpoint.safetensors import FLOATS, Source
from mlx_distill.models.checkpoint.tensor_job import MLX_TYPES, from_raw, to_raw
from mlx_distill.models.quantization import SAFETENSORS

_SCALE = "_scale_inv"


def _e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 128 else size


_VALUES = np.array([_e4m3(byte) for byte in range(256)], np.float32)


def dequantize_fp8(
    tensors: Mapping[str, Source], config: Mapping[str, Any], where: str
) -> tuple[dict[str, Source], str | None]:
    """Tensors in which pairs of FP8 weight and scales are one weight in the type of the config.

    Returns:
        The tensors, and a note; None if ``quantization_config`` has another method or none.

    Raises:
        ModelError: FP8 weights without scales, scales of another form, or activations that are quantized with
            stored scales.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != FP8 or config.get("quantization"):
        return dict(tensors), None
    key = f"{where}: quantization_config"
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise unsupported_quantization(f"{key}.quant_method 'fp8' with weight_block_size {block!r}", FP8)
    for name, only in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        if (value := quantization.get(name) or only) != only:
            raise unsupported_quantization(f"{key}.quant_method 'fp8' with {name} {value!r}", FP8)
    dtype = SAFETENSORS.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    out, count = {}, 0
    for name, source in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        if source.dtype.startswith("F8"):
            source, count = (
                _dequantized(source, tensors.get(name + _SCALE), (block[0], block[1]), dtype),
                count + 1,
            )
        out[name] = source
    return out, f"{key}.quant_method 'fp8': {count} weights are dequantized to {dtype}"


def _dequantized(weight: Source, scale: Source | None, block: tuple[int, int], dtype: str) -> TensorPlan:
    if scale is None:
        raise ModelError(
            f"{weight.where} is {weight.dtype} without its scales ({weight.name + _SCALE!r})",
            fix="download the checkpoint again, or take the unquantized one (its name has no -FP8)",
        )
    blocks = tuple(-(-n // size) for n, size in zip(weight.shape, block, strict=False))
    if weight.dtype != "F8_E4M3" or scale.dtype not in FLOATS or scale.shape != blocks or len(blocks) != 2:
        raise ModelError(
            f"{weight.where}, {weight.dtype} {list(weight.shape)}, has scales {scale.dtype} "
            f"{list(scale.shape)}; float scales of F8_E4M3 blocks of {block[0]} x {block[1]} are supported",
            fix="take the unquantized checkpoint (its name has no -FP8)",
        )
    rows, columns = block

    def read_rows(start: int, stop: int) -> np.ndarray:
        first = start // rows
        factors = np.array(from_raw(scale.read(first, -(-stop // rows)), scale.dtype).astype(mx.float32))
        factors = factors.repeat(rows, axis=0)[start - first * rows :][: stop - start]
        factors = factors.repeat(columns, axis=1)[:, : weight.shape[1]]
        return to_raw(mx.array(_VALUES[weight.read(start, stop)] * factors).astype(MLX_TYPES[dtype]))

    return TensorPlan(weight.name, dtype, weight.shape, (weight, scale), "fp8", read_rows)
