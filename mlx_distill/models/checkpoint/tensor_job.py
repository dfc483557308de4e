"""The conversion of one tensor, a block of rows at a time: read, checked, updated, cast or quantized,
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod, sqrt
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.layout import TensorPlan
from mlx_distill.models.checkpoint.safetensors import DTYPE_BYTES, FLOATS
from mlx_distill.models.grids import quantize
from mlx_distill.models.quantization import NAN_SCALE, TensorAction

MLX_TYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
}
_NAMES = {dtype: name for name, dtype in MLX_TYPES.items()}


def to_mlx(tensor: TensorPlan) -> mx.array:
    """The whole tensor as an array, bit for bit."""
    return from_raw(tensor.read(0, tensor.rows), tensor.dtype).reshape(tensor.shape)


def from_raw(block: np.ndarray, dtype: str) -> mx.array:
    """Raw bits ``[n, c]`` of a safetensors type as an MLX array of that type."""
    return mx.array(block).view(MLX_TYPES[dtype])


def safetensors_type(value: mx.array) -> str:
    """The safetensors type of an array.

    >>> safetensors_type(mx.zeros(1))
    'F32'
    """
    return _NAMES[value.dtype]


def to_raw(value: mx.array) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    name = safetensors_type(value)
    if name in FLOATS:
        value = value.view(mx.uint32 if name == "F32" else mx.uint16)
    return np.array(value)


# All bits of the exponent are set in NaN and infinity.
_EXPONENT_MASK = {"F32": np.uint32(0x7F800000), "BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}
_CACHE_SIZED = 1 << 17  # values checked at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Output:
    """A tensor that is written to a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class LowRankUpdate:
    """The update ``scale * B A`` of a weight by a LoRA or DoRA adapter, in float32.

    Args:
        a: ``[r, in]``, or ``[experts, r, in]``.
        b: ``[out, r]``, or ``[experts, out, r]``.
        scale: Factor.
        magnitude: DoRA's ``[out]``, or ``[experts, out]``: the norm to which each row of the updated weight
            is scaled; None for LoRA.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def apply(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """Rows ``start`` to ``stop`` of the updated weight, from the same rows of the weight, in float32."""
        updated = weight.astype(mx.float32) + self.rows(start, stop)
        if self.magnitude is None:
            return updated
        norms = mx.sqrt(mx.sum(mx.square(updated), axis=-1, keepdims=True))
        return updated * (self.magnitude.reshape(-1)[start:stop, None].astype(mx.float32) / norms)

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows of the update before DoRA's scaling, with the experts concatenated."""
        if self.a.ndim == 2:
            return self.scale * (self.b[start:stop] @ self.a)
        height, parts = self.b.shape[1], []
        for e in range(start // height, -(-stop // height)):
            first, last = max(start - e * height, 0), min(stop - e * height, height)
            parts.append(self.b[e, first:last] @ self.a[e])
        return self.scale * mx.concatenate(parts)


@dataclass(frozen=True)
class Replacement:
    """A tensor of ``modules_to_save``, which replaces the base model's."""

    value: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.value.shape)

    def apply(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """Rows ``start`` to ``stop`` of the replacement, in float32."""
        return self.value.reshape(-1, self.value.shape[-1])[start:stop].astype(mx.float32)


Update = LowRankUpdate | Replacement


@dataclass(frozen=True)
class TensorJob:
    """A tensor, an update that is applied to it first, and what to do with the result.

    ``refined`` are the quantized tensors to write, by the names ``weight``, ``scales`` and ``biases``, where
    they were chosen better than by rounding.
    """

    tensor: TensorPlan
    action: TensorAction = field(default_factory=TensorAction)
    update: Update | None = None
    refined: Mapping[str, mx.array] | None = None

    @property
    def outputs(self) -> list[Output]:
        """The tensors to write; of a quantized one the weight, then scales and biases."""
        t, q = self.tensor, self.action.quantization
        dtype = self.action.dtype or t.dtype
        if q is None:
            return [Output(t.name, dtype, t.shape)]
        path, lead, groups = t.name.removesuffix(".weight"), t.shape[:-1], t.columns // q.group_size
        words = Output(t.name, "U32", (*lead, t.columns * q.bits // 32))
        if q.mode != "affine":
            return [words, Output(f"{path}.scales", "U8", (*lead, groups))]
        return [words, *(Output(f"{path}.{leaf}", dtype, (*lead, groups)) for leaf in ("scales", "biases"))]


@dataclass(frozen=True)
class TensorRow:
    """What a conversion did with a tensor: a line of its report.

    ``error`` is the root mean squared difference from the source, divided by the root mean square of the
    source; ``largest`` is the largest absolute difference. Both are 0 if the bits are the same. ``update`` is
    the root mean square of an adapter's update, divided like ``error``. ``bits`` are stored bits for each of
    ``parameters`` weights, including scales.
    """

    name: str
    source: str
    file: str
    rule: str
    shape: tuple[int, ...]
    source_dtype: str
    stored: str
    parameters: int
    bits: float
    error: float = 0.0
    largest: float = 0.0
    update: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass
class ErrorSums:
    """Sums over the blocks of a tensor, from which its errors are computed."""

    squares: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    update: float = 0.0

    def add(self, before: mx.array, after: mx.array) -> None:
        """Compare a block with its source: differences in float32, sums over rows in float64."""
        difference = mx.abs(before.astype(mx.float32) - after.astype(mx.float32))
        sums = [
            mx.sum(mx.square(before.astype(mx.float32)), axis=-1),
            mx.sum(mx.square(difference), axis=-1),
            mx.max(difference),
        ]
        mx.eval(sums)
        self.squares += float(np.array(sums[0]).sum(dtype=np.float64))
        self.difference += float(np.array(sums[1]).sum(dtype=np.float64))
        self.largest = max(self.largest, float(sums[2].item()))

    def add_update(self, before: mx.array, after: mx.array) -> None:
        """Measure what an update changes in a block."""
        squares = mx.sum(mx.square(after.astype(mx.float32) - before.astype(mx.float32)), axis=-1)
        self.update += float(np.array(squares).sum(dtype=np.float64))

    @property
    def relative(self) -> float:
        """Root mean squared difference over root mean square."""
        return sqrt(self.difference / self.squares) if self.squares else 0.0

    @property
    def relative_update(self) -> float:
        """Root mean squared update over root mean square."""
        return sqrt(self.update / self.squares) if self.squares else 0.0


def row_blocks(job: TensorJob, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most ``block_bytes`` in the source, and at least one row."""
    t = job.tensor
    row_bytes = max(t.columns * DTYPE_BYTES[t.dtype], 1)
    step = max(block_bytes // row_bytes, 1)
    for start in range(0, t.rows, step):
        yield start, min(start + step, t.rows)


def run_block(job: TensorJob, start: int, stop: int, errors: ErrorSums) -> list[np.ndarray]:
    """The raw bits of rows ``start`` to ``stop`` of each output; what changed is added to ``errors``.

    Raises:
        ModelError: NaN or infinity in the source or in the result: with file and tensor.
    """
    tensor, action, q = job.tensor, job.action, job.action.quantization
    raw = tensor.read(start, stop)
    check_finite(raw, tensor)
    if action.keeps_bits and job.update is None:
        return [raw]
    source = from_raw(raw, tensor.dtype)
    if job.update is not None:
        before, source = source, job.update.apply(source, start, stop)
        errors.add_update(before, source)
    value = source.astype(MLX_TYPES[action.dtype or tensor.dtype])
    if q is None:
        _check_result(value, job)
        errors.add(source, value)
        return [to_raw(value)]
    if job.refined is None:
        parts = quantize(source, q, value.dtype)
    else:
        parts = {name: part.reshape(-1, part.shape[-1])[start:stop] for name, part in job.refined.items()}
    result = mx.dequantize(
        parts["weight"], parts["scales"], parts.get("biases"), q.group_size, q.bits, q.mode
    )
    _check_result(result, job)
    errors.add(source, result)
    return [to_raw(part) for part in parts.values()]


def output_plans(job: TensorJob, errors: ErrorSums) -> list[TensorPlan]:
    """The outputs of a job as tensors that run it while they are read."""
    return [_output_plan(job, output, index, errors) for index, output in enumerate(job.outputs)]


def _output_plan(job: TensorJob, output: Output, index: int, errors: ErrorSums) -> TensorPlan:
    def read_rows(start: int, stop: int) -> np.ndarray:
        return run_block(job, start, stop, errors)[index]

    return TensorPlan(output.name, output.dtype, output.shape, job.tensor.sources, job.tensor.rule, read_rows)


def _check_result(value: mx.array, job: TensorJob) -> None:
    if mx.all(mx.isfinite(value)).item():
        return
    if job.update is not None:
        what, fix = " with the adapter merged", "train the adapter again"
    else:
        what, fix = "", "choose a type with a wider range, such as bfloat16"
    raise ModelError(f"{job.tensor.where}{what} gives NaN or infinity as {job.action.label}", fix=fix)


def check_finite(raw: np.ndarray, tensor: TensorPlan) -> None:
    """Raise for NaN and infinity, found by their bits (255 is NaN in scales of one byte).

    Raises:
        ModelError: with file and tensor.
    """
    scales = tensor.dtype == "U8" and tensor.name.endswith(".scales")
    if tensor.dtype not in FLOATS and not scales:
        return
    mask = np.uint8(NAN_SCALE) if scales else _EXPONENT_MASK[tensor.dtype]
    flat = raw.reshape(-1)
    for i in range(0, flat.size, _CACHE_SIZED):
        masked = flat[i : i + _CACHE_SIZED] & mask
        if masked.size and masked.max() == mask:
            raise ModelError(
                f"{tensor.where} holds NaN or infinity",
                fix="the checkpoint itself is damaged: download it again",
            )


def table_row(job: TensorJob, errors: ErrorSums) -> TensorRow:
    """The line of a finished job."""
    t, action, outputs = job.tensor, job.action, job.outputs
    count = 0 if t.name.endswith((".scales", ".biases")) else prod(t.shape)
    bits = 8 * sum(output.nbytes for output in outputs) / count if count else 0.0
    more = f" and {len(t.sources) - 1} more" if len(t.sources) > 1 else ""
    notes = [action.reason, "adapter merged" if job.update is not None else ""]
    return TensorRow(
        t.name,
        t.sources[0].name + more,
        t.file.name,
        t.rule,
        t.shape,
        t.dtype,
        action.label if action.quantization else outputs[0].dtype,
        count,
        round(bits, 4),
        errors.relative,
        errors.largest,
        errors.relative_update,
        "; ".join(note for note in notes if note),
    )
