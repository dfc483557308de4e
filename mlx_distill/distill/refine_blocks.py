r"""Refinement block by block: the latent weights and moments of one block are in memory at a time.

Each block learns to give, from the hidden states of the quantized blocks before it, the output that the
unquantized block has in the unquantized model:

.. math:: \min_w \lVert B_{\hat w}(\hat x) - B(x) \rVert^2

over all real tokens, with latent weights in every mode: offsets learned in this way are worse. The embedding,
the head, and whatever else is outside of the blocks stays as calibration left it. Source of the
reconstruction of blocks: Li et al. 2021, arXiv 2102.05426.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distill.distill.refine_training import (
    RefineJob,
    RefineSettings,
    grid_optimizer,
    grid_weight,
    started,
    train_settings,
)
from mlx_distill.models.blocks import Blocks
from mlx_distill.models.calibrate import dequantized
from mlx_distill.models.forward import compute_dtype
from mlx_distill.models.grid_layers import grid_layers, packed_grid_layer
from mlx_distill.models.modules import unquantized_like
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.refined import Refined
from mlx_distill.records import Batch
from mlx_distill.storage import atomic_path, digest, read_json, write_json
from mlx_distill.train.batches import RowBatches
from mlx_distill.train.loop import train
from mlx_distill.train.objective import Objective, trained_tokens

FACTS = "refine.json"
_MULTIPLE = 16  # tokens that widths are rounded up to, so that few shapes occur
_AT_ONCE = 8  # rows of a forward pass without a gradient


def refine_blocks(job: RefineJob) -> dict[str, Refined]:
    """Refine one block after the other, as :func:`~mlx_distill.distill.refine.refine` does.

    A finished block is kept in ``folder/blocks``; the one that a kill interrupted goes on from its
    checkpoint.
    """
    student, quantizations, settings = job.student, job.quantizations, job.settings
    blocks, dtype = Blocks(student), compute_dtype(student)
    padded = PaddedRows(blocks, job.rows, _AT_ONCE)
    blocks.check(mx.array(padded.tokens([0])))
    key = digest([job.key, [list(map(int, row)) for row in job.rows], settings.keyed()])
    inside = {path: _block_of(path, blocks.prefix) for path in quantizations}
    modules = dict(student.named_modules())
    results = {
        path: started(modules[path], job.start.get(path), quantizations[path])
        for path, block in inside.items()
        if block is None
    }
    plain, facts = padded.embedded(), []
    with (
        _own_modules_at_the_end(student, quantizations),
        job.progress.task("refine", total=len(blocks) * settings.steps, unit="step") as bar,
    ):
        _dequantize_into(student, results, quantizations, dtype)
        hidden = padded.embedded()
        for block in range(len(blocks)):
            target = padded.outputs(block, plain)
            own = {path: quantizations[path] for path, at in inside.items() if at == block}
            if own:
                data = _BlockData(padded, block, hidden, target, settings)

                def show(row: dict[str, Any], done: int = block * settings.steps) -> None:
                    bar.update(done + row["step"], loss=row["loss"])

                place = job.folder / "blocks" / f"{block:04d}"
                found = _read(place, key, own) or _train_block(job, data, own, place, key, show)
                facts.append(read_json(place.with_suffix(".json")))
                _dequantize_into(student, found, quantizations, dtype)
                results |= found
            hidden, plain = padded.outputs(block, hidden), target
            bar.update((block + 1) * settings.steps)
    summary = {
        "steps": settings.steps,
        "seconds": sum(part["seconds"] for part in facts),
        "tokens": sum(part["tokens"] for part in facts),
        "peak_memory_bytes": max((part["peak_memory_bytes"] for part in facts), default=0),
    }
    write_json(job.folder / FACTS, {"by": "block by block", **summary, "blocks": facts})
    return results


def _block_of(path: str, prefix: str) -> int | None:
    """The number of the block that a module is in; None for the embedding and the head."""
    number = path.removeprefix(f"{prefix}.").split(".")[0]
    return int(number) if path.startswith(f"{prefix}.") and number.isdigit() else None


@dataclass(frozen=True)
class _BlockData:
    """What a block learns from: of each row the hidden states that it gets, and those that it should give."""

    padded: PaddedRows
    block: int
    hidden: Sequence[mx.array]
    target: Sequence[mx.array]
    settings: RefineSettings

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Some rows; there is a target at every real token."""
        tokens = mx.array(self.padded.tokens(chosen))
        extra = {
            "hidden": self.padded.padded(self.hidden, chosen),
            "target": self.padded.padded(self.target, chosen),
        }
        return Batch(tokens, tokens, mx.array(self.padded.mask(chosen)), tuple(chosen), extra)

    def batches(self, identity: str) -> RowBatches:
        """The stream of training batches."""
        lengths = [len(row) for row in self.padded.rows]
        return RowBatches(
            lengths, self.batch, self.settings.batch_size, self.settings.seed, identity=identity
        )

    def error(self) -> float:
        """The mean squared error of the block as it is."""
        total, count = 0.0, len(self.hidden)
        for first in range(0, count, _AT_ONCE):
            batch = self.batch(range(first, min(first + _AT_ONCE, count)))
            total += squared_errors(self.padded.blocks.run(self.block, batch.extra["hidden"]), batch).item()
        return total / sum(len(row) for row in self.padded.rows)


def _train_block(
    job: RefineJob,
    data: _BlockData,
    own: Mapping[str, Quantization],
    place: Path,
    key: str,
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Refined]:
    """Train the latent weights of one block; its tensors, which are kept in a file too."""
    blocks = data.padded.blocks
    layer, prefix = blocks.layers[data.block], f"{blocks.prefix}.{data.block}."
    modules = dict(layer.named_modules())
    weights = {
        path.removeprefix(prefix): grid_weight(
            modules[path.removeprefix(prefix)], job.start[path], q, latent=True
        )
        for path, q in own.items()
    }
    settings = job.settings
    peaks: list[int] = []
    with grid_layers(layer, weights, compute_dtype(job.student)) as layers:
        error = data.error()
        result = train(
            layer,
            data.batches(key),
            block_objective(blocks, data.block, error),
            grid_optimizer(weights, settings),
            train_settings(settings),
            folder=place,
            hooks=[show, lambda row: peaks.append(row["peak_memory_bytes"])],
            stop=job.stop,
            identity=key,
        )
        parts = {prefix + path: packed_grid_layer(layer) for path, layer in layers.items()}
    flat = {f"{path}.{leaf}": array for path, found in parts.items() for leaf, array in found.items()}
    facts = {
        "block": data.block,
        "error": error,
        "last_loss": result.metrics["loss"],
        "seconds": result.seconds,
        "tokens": result.tokens,
        "peak_memory_bytes": max(peaks, default=0),
    }
    write_json(place.with_suffix(".json"), facts)
    with atomic_path(place.with_suffix(".safetensors")) as file:
        mx.save_safetensors(str(file), flat, metadata={"key": key})
    shutil.rmtree(place)
    return _refined(parts, own)


def _read(place: Path, key: str, own: Mapping[str, Quantization]) -> dict[str, Refined] | None:
    """A block that was finished with the same key."""
    file = place.with_suffix(".safetensors")
    if not file.is_file():
        return None
    flat, metadata = mx.load(str(file), return_metadata=True)
    if metadata.get("key") != key:
        return None
    parts: dict[str, dict[str, mx.array]] = {path: {} for path in own}
    for name, array in flat.items():
        path, _, leaf = name.rpartition(".")
        parts[path][leaf] = array
    return _refined(parts, own)


def _refined(parts: Mapping[str, dict[str, mx.array]], own: Mapping[str, Quantization]) -> dict[str, Refined]:
    """The tensors, with the values on the grid in place of the latent weights, which are not kept: they are
    not computed before they are used.
    """
    return {
        path: Refined(found, dequantized(Refined(found, found["weight"]), own[path]))
        for path, found in parts.items()
    }


class PaddedRows:
    """The rows of a refinement in batches of blocks' hidden states: right-padded, to few widths.

    Args:
        blocks: Of the model.
        rows: Token ids.
        batch_size: Rows of a forward pass.
    """

    def __init__(self, blocks: Blocks, rows: Sequence[Sequence[int]], batch_size: int) -> None:
        self.blocks, self.rows, self.batch_size = blocks, rows, batch_size

    def embedded(self) -> list[mx.array]:
        """The hidden states ``[l, d]`` that the first block gets, of each row."""
        return self._by_row(lambda chosen: self.blocks.embedded(mx.array(self.tokens(chosen))))

    def outputs(self, block: int, hidden: Sequence[mx.array]) -> list[mx.array]:
        """The block's output of each row."""
        return self._by_row(lambda chosen: self.blocks.run(block, self.padded(hidden, chosen)))

    def tokens(self, chosen: Sequence[int]) -> np.ndarray:
        """Some rows, right-padded with token 0."""
        out = np.zeros((len(chosen), self._width(chosen)), np.int32)
        for line, row in zip(out, chosen, strict=True):
            line[: len(self.rows[row])] = self.rows[row]
        return out

    def mask(self, chosen: Sequence[int]) -> np.ndarray:
        """1 for each real token of some rows."""
        lengths = np.array([len(self.rows[row]) for row in chosen])
        return (np.arange(self._width(chosen)) < lengths[:, None]).astype(np.float32)

    def padded(self, hidden: Sequence[mx.array], chosen: Sequence[int]) -> mx.array:
        """The hidden states of some rows as one right-padded array."""
        width = self._width(chosen)
        return mx.stack([mx.pad(hidden[row], [(0, width - hidden[row].shape[0]), (0, 0)]) for row in chosen])

    def _width(self, chosen: Sequence[int]) -> int:
        return -(-max(len(self.rows[row]) for row in chosen) // _MULTIPLE) * _MULTIPLE

    def _by_row(self, compute: Any) -> list[mx.array]:
        out: dict[int, mx.array] = {}
        order = sorted(range(len(self.rows)), key=lambda row: len(self.rows[row]))
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            padded = compute(chosen)
            # Copies: a slice would keep the padded array.
            own = [mx.contiguous(padded[i, : len(self.rows[row])]) for i, row in enumerate(chosen)]
            mx.eval(own)
            out.update(zip(chosen, own, strict=True))
        return [out[row] for row in range(len(self.rows))]


def _dequantize_into(
    model: Any, parts: Mapping[str, Refined], quantizations: Mapping[str, Quantization], dtype: mx.Dtype
) -> None:
    """Replace modules by unquantized ones that hold the values of quantized tensors, in place."""
    modules = dict(model.named_modules())
    layers = [
        (path, unquantized_like(modules[path], dequantized(found, quantizations[path]).astype(dtype)))
        for path, found in parts.items()
    ]
    model.update_modules(tree_unflatten(layers))


@contextmanager
def _own_modules_at_the_end(model: Any, paths: Iterable[str]) -> Iterator[None]:
    """At the end the modules at some paths are those of the beginning, whatever replaced them."""
    modules = dict(model.named_modules())
    own = [(path, modules[path]) for path in paths]
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(own))


def block_objective(blocks: Blocks, block: int, start_error: float) -> Objective:
    """The squared error of a block's output over all real tokens, relative to ``start_error``; one term,
    ``block``.
    """

    def sums(_: nn.Module, batch: Batch) -> dict[str, mx.array]:
        return {"block": squared_errors(blocks.run(block, batch.extra["hidden"]), batch)}

    return Objective(
        lambda batch: {"block": trained_tokens(batch)},
        sums,
        {"block": 1.0 / start_error if start_error else 1.0},
    )


def squared_errors(output: mx.array, batch: Batch) -> mx.array:
    """The mean square over the channels of the difference to the target, summed over the real tokens."""
    difference = output.astype(mx.float32) - batch.extra["target"].astype(mx.float32)
    return (mx.square(difference).mean(axis=-1) * batch.mask).sum()
