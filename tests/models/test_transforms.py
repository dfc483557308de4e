"""Each transform against one line of numpy, whole and in blocks of rows, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill.models.checkpoint.safetensors import TensorInfo, read_header
from mlx_distill.models.checkpoint.transforms import (
    Mxfp4Words,
    Same,
    SplitBlocks,
    SplitColumns,
    SplitRows,
    Stack,
    Transpose,
)

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 1 << 16, (3, 8, 10), np.uint16)
PACK = RNG.integers(0, 256, (3, 6, 2, 16), np.uint8)


def words(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view(np.uint32).reshape(*blocks.shape[:2], -1)


CASES = [
    (Same(), [WIDE], [WIDE]),
    (Mxfp4Words(), [PACK], [words(PACK)]),
    (SplitRows(), [WIDE], [WIDE[:, ::2], WIDE[:, 1::2]]),
    (SplitRows(mxfp4=True), [PACK], [words(PACK[:, ::2]), words(PACK[:, 1::2])]),
    (SplitColumns(), [WIDE[0]], [WIDE[0][:, ::2], WIDE[0][:, 1::2]]),
    (SplitBlocks(), [WIDE], [WIDE[:, :4], WIDE[:, 4:]]),
    (Transpose(), [WIDE], [WIDE.swapaxes(1, 2)]),
    (Transpose(split=True), [WIDE], [WIDE[:, :, ::2].swapaxes(1, 2), WIDE[:, :, 1::2].swapaxes(1, 2)]),
    (Stack(), list(WIDE), [WIDE]),
]
_NAMES = {1: "U8", 2: "BF16", 4: "U32"}


def infos(arrays: list[np.ndarray], path: Path, tools: Any) -> tuple[TensorInfo, ...]:
    """The arrays in a file."""
    tools.write(
        path,
        {
            f"t{i:02d}": (_NAMES[a.itemsize], list(a.shape), np.ascontiguousarray(a).tobytes())
            for i, a in enumerate(arrays)
        },
    )
    header, _ = read_header(path)
    return tuple(header[f"t{i:02d}"] for i in range(len(arrays)))


@pytest.mark.parametrize(("transform", "before", "after"), CASES)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_rows_equal_numpy_there_and_back(
    transform: Any, before: list[Any], after: list[Any], step: int, tmp_path: Path, tools: Any
) -> None:
    originals, results = (
        infos(before, tmp_path / "a.safetensors", tools),
        infos(after, tmp_path / "b.safetensors", tools),
    )
    for specs, wanted, sources, read in (
        (transform.outputs(originals), after, originals, transform.rows),
        (transform.inputs(results), before, results, transform.undo_rows),
    ):
        assert [(dtype, tuple(shape)) for dtype, shape in specs] == [
            (_NAMES[w.itemsize], w.shape) for w in wanted
        ]
        for i, array in enumerate(wanted):
            rows = int(np.prod(array.shape[:-1]))
            parts = [read(sources, i, start, min(start + step, rows)) for start in range(0, rows, step)]
            assert np.concatenate(parts).tobytes() == np.ascontiguousarray(array).tobytes()
