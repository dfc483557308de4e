"""One tensor's way from source to shard, in slabs of rows: read, checked, merged, cast or packed, and
measured against what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import prod, sqrt
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.layout import TensorPlan
from mlx_distill.models.checkpoint.safetensors import DTYPE_BYTES, FLOATS
from mlx_distill.models.quantization import NAN_SCALE, QuantSpec, pack

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


def to_mlx(plan: TensorPlan) -> mx.array:
    """A planned tensor as an array, bit for bit."""
    if plan.dtype not in MLX_TYPES:
        raise ModelError(
            f"{plan.where} has the type {plan.dtype}, which MLX lacks",
            fix="convert it with a tool that knows this type first",
        )
    return from_raw(plan.read(0, plan.rows), plan.dtype).reshape(plan.shape)


def from_raw(block: np.ndarray, dtype: str) -> mx.array:
    """Raw bits ``[n, c]`` of a safetensors type as an MLX array of that type."""
    return mx.array(block).view(MLX_TYPES[dtype])


def to_raw(value: mx.array) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    name = _NAMES[value.dtype]
    if name in FLOATS:
        value = value.view(mx.uint32 if name == "F32" else mx.uint16)
    return np.array(value)


_EXPONENT = {"F32": np.uint32(0x7F800000), "BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}


@dataclass(frozen=True)
class Output:
    """One tensor of the file to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class LowRankUpdate:
    """A low-rank update ``scale * B A`` of a weight: ``a [r, in]`` and ``b [out, r]``, or with a leading axis
    of experts; float32.

    ``magnitude [out]`` (or ``[experts, out]``) is DoRA's: each row of the updated weight is scaled to that
    norm.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it fits."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def add(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """Rows ``start`` to ``stop`` of the updated weight, in float32."""
        updated = weight.astype(mx.float32) + self.rows(start, stop)
        if self.magnitude is None:
            return updated
        norms = mx.sqrt(mx.sum(mx.square(updated), axis=-1, keepdims=True))
        return updated * (self.magnitude.reshape(-1)[start:stop, None].astype(mx.float32) / norms)

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows of the update, the experts' one after the other."""
        if self.a.ndim == 2:
            return self.scale * (self.b[start:stop] @ self.a)
        height, parts = self.b.shape[1], []
        for e in range(start // height, -(-stop // height)):
            first, last = max(start - e * height, 0), min(stop - e * height, height)
            parts.append(self.b[e, first:last] @ self.a[e])
        return self.scale * mx.concatenate(parts)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained whole beside an adapter, and takes the place of the base's."""

    value: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that it fits."""
        return tuple(self.value.shape)

    def add(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """Rows ``start`` to ``stop``, in float32."""
        return self.value.reshape(-1, self.value.shape[-1])[start:stop].astype(mx.float32)


@dataclass(frozen=True)
class TensorJob:
    """A planned tensor, what to do with it, and an update to add first."""

    tensor: TensorPlan
    action: QuantSpec = field(default_factory=QuantSpec)
    update: LowRankUpdate | Replacement | None = None

    @property
    def outputs(self) -> list[Output]:
        """What comes out, the weight first."""
        p, t = self.tensor, self.action
        if t.kind == "keep":
            return [Output(p.name, p.dtype, p.shape)]
        if t.kind == "cast":
            return [Output(p.name, t.dtype or p.dtype, p.shape)]
        path, lead = p.name.removesuffix(".weight"), p.shape[:-1]
        float_type = t.dtype or p.dtype
        groups = p.columns // t.group_size
        out = [Output(p.name, "U32", (*lead, p.columns * t.bits // 32))]
        out.append(Output(f"{path}.scales", float_type if t.mode == "affine" else "U8", (*lead, groups)))
        return [*out, Output(f"{path}.biases", float_type, (*lead, groups))] if t.mode == "affine" else out


@dataclass(frozen=True)
class TensorRow:
    """One line of a conversion's table.

    ``error`` is the root of the mean squared difference from the source over the root of the mean squared
    source, ``largest`` the greatest difference; both 0 where the bits are the same. ``update`` is how large
    an adapter's update was, on the scale of ``error``. ``bits`` are those stored for each of ``parameters``
    weights, scales included.
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
class Errors:
    """Sums over the slabs of one tensor."""

    squares: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    update: float = 0.0

    def add(self, before: mx.array, after: mx.array) -> None:
        """Compare one slab, in float32; the sums are kept in float64."""
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
        """Measure what an adapter changes in one slab."""
        squares = mx.sum(mx.square(after.astype(mx.float32) - before.astype(mx.float32)), axis=-1)
        self.update += float(np.array(squares).sum(dtype=np.float64))

    @property
    def relative(self) -> float:
        """Root mean squared difference over root mean square."""
        return sqrt(self.difference / self.squares) if self.squares else 0.0

    @property
    def update_size(self) -> float:
        """Root mean squared update over root mean square."""
        return sqrt(self.update / self.squares) if self.squares else 0.0


def row_blocks(job: TensorJob, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most ``block_bytes`` of source, at least one row each."""
    p = job.tensor
    row = max(p.columns * DTYPE_BYTES[p.dtype], 1)
    step = max(block_bytes // row, 1)
    for start in range(0, p.rows, step):
        yield start, min(start + step, p.rows)


def run_block(job: TensorJob, start: int, stop: int, errors: Errors) -> list[np.ndarray]:
    """The raw bits of rows ``start`` to ``stop`` of each output.

    Raises:
        ModelError: NaN or infinity in the source, or where the type to be is too narrow: with file and
            tensor.
    """
    p, t = job.tensor, job.action
    raw = p.read(start, stop)
    check_finite(raw, p)
    if t.kind == "keep" and job.update is None:
        return [raw]
    source = from_raw(raw, p.dtype)
    if job.update is not None:
        before, source = source, job.update.add(source, start, stop)
        errors.add_update(before, source)
    kept_type = MLX_TYPES[t.dtype or p.dtype]
    value = source.astype(kept_type)
    if t.kind != "quantize":
        _check_fits(value, job)
        errors.add(source, value)
        return [to_raw(value)]
    parts: tuple[mx.array, ...] = (
        pack(source)
        if t.again and t.mode == "mxfp4"
        else mx.quantize(value, t.group_size, t.bits, mode=t.mode)
    )
    back = mx.dequantize(
        parts[0], parts[1], parts[2] if len(parts) > 2 else None, t.group_size, t.bits, t.mode
    )
    _check_fits(back, job)
    errors.add(source, back)
    return [to_raw(part) for part in parts]


def _check_fits(value: mx.array, job: TensorJob) -> None:
    if not mx.all(mx.isfinite(value)).item():
        what = " with the adapter added" if job.update is not None else ""
        raise ModelError(
            f"{job.tensor.where}{what} gives NaN or infinity as {job.action.label}",
            fix="train the adapter again" if what else "choose a type with a wider range, such as bfloat16",
        )


def check_finite(raw: np.ndarray, planned: TensorPlan) -> None:
    """Refuse NaN and infinity, by the bits (255 is NaN among bytes of scales), in pieces that fit the
    processor's cache.
    """
    scales = planned.dtype == "U8" and planned.name.endswith(".scales")
    if planned.dtype not in FLOATS and not scales:
        return
    mask = np.uint8(NAN_SCALE) if scales else _EXPONENT[planned.dtype]
    flat = raw.reshape(-1)
    for i in range(0, flat.size, 1 << 17):
        piece = flat[i : i + (1 << 17)] & mask
        if piece.size and piece.max() == mask:
            raise ModelError(
                f"{planned.where} holds NaN or infinity",
                fix="the checkpoint is damaged at its source; download it again",
            )


def table_row(job: TensorJob, errors: Errors, outputs: list[Output]) -> TensorRow:
    """The line of a finished job."""
    p, t = job.tensor, job.action
    count = 0 if p.name.endswith((".scales", ".biases")) else prod(p.shape)
    bits = 8 * sum(o.nbytes for o in outputs) / count if count else 0.0
    sources = (
        p.sources[0].name if len(p.sources) == 1 else f"{p.sources[0].name} and {len(p.sources) - 1} more"
    )
    stored = t.label if t.kind == "quantize" else outputs[0].dtype
    note = "; ".join(part for part in (t.why, "adapter merged" if job.update is not None else "") if part)
    return TensorRow(
        p.name,
        sources,
        p.sources[0].file.name,
        p.rule,
        p.shape,
        p.dtype,
        stored,
        count,
        round(bits, 4),
        errors.relative,
        errors.largest,
        errors.update_size,
        note,
    )
