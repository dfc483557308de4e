"""Training checkpoints; a run resumed from one is bitwise equal to an uninterrupted run.

``checkpoints/step-00000050/`` holds ``trainable.safetensors``, ``optimizer.safetensors`` and ``state.json``
(step, random state by rank, position in the data, length of metrics.jsonl). A folder appears complete, by one
rename. ``checkpoints/best/`` holds only the weights with the lowest validation loss.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.errors import FULL_DISK, FileError, ModelError
from mlx_distill.storage import digest, fsync_folder, os_errors, read_json

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
_OTHER_RUN = "keep the settings, or delete the checkpoints and start again"


def fingerprint(model: nn.Module) -> str:
    """A hash of the trainable parameters' names, shapes and types, which a checkpoint must match."""
    return digest(
        [[name, list(a.shape), str(a.dtype)] for name, a in tree_flatten(model.trainable_parameters())]
    )


def save(
    folder: Path, state: Mapping[str, Any], model: nn.Module, optimizer: optim.Optimizer, *, keep: int = 2
) -> Path:
    """Write ``folder/step-N`` atomically, then delete all checkpoints but the newest ``keep``.

    Args:
        folder: The folder of the checkpoints.
        state: JSON; ``state["step"]`` names the folder.
        model: Its trainable parameters are saved.
        optimizer: Its whole state is saved.
        keep: Number of checkpoints to keep.

    Raises:
        FileError: it cannot be written; the older checkpoints are intact.
    """
    arrays = {WEIGHTS: dict(tree_flatten(model.trainable_parameters())), OPTIMIZER: _flat_state(optimizer)}
    path = _write_folder(folder / f"step-{int(state['step']):08d}", arrays, _versioned(state, model))
    for old in steps(folder)[:-keep]:
        with os_errors():
            shutil.rmtree(old)
    return path


def save_best(folder: Path, state: Mapping[str, Any], model: nn.Module) -> Path:
    """Write the trainable weights alone to ``folder/best``."""
    arrays = {WEIGHTS: dict(tree_flatten(model.trainable_parameters()))}
    return _write_folder(folder / "best", arrays, _versioned(state, model))


def _versioned(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    return {**state, "format": FORMAT, "fingerprint": fingerprint(model)}


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / STATE).is_file()) if folder.is_dir() else []


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(steps(folder)), None)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``.

    Raises:
        FileError: it is damaged, or of another format version.
    """
    state = read_json(path / STATE)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileError(
            f"{path}: not a checkpoint of this version", fix=f"delete {path.parent} and start again"
        )
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint (of a step, or the best) into the model.

    Raises:
        ModelError: the checkpoint is of another model or of other adapters.
        FileError: a file is missing or damaged.
    """
    if read_state(path)["fingerprint"] != fingerprint(model):
        raise ModelError(
            f"{path}: a checkpoint of other trainable weights",
            fix="use the model that it was made with, or delete it",
        )
    flat = _read_arrays(path / WEIGHTS)
    model.update(_replace_arrays(path, flat, model.trainable_parameters()))


def load_optimizer(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> None:
    """Load the optimizer state of a checkpoint, array by array.

    Raises:
        ModelError: the checkpoint is of another optimizer.
    """
    flat = _read_arrays(path / OPTIMIZER)
    optimizer.init(model.trainable_parameters())
    names = {name for name, _ in tree_flatten(optimizer.state)}
    if names != set(flat):
        different = min(names ^ set(flat))
        raise ModelError(f"{path}: a checkpoint of another optimizer ({different})", fix=_OTHER_RUN)
    optimizer.state = _replace_arrays(path, flat, optimizer.state)
    optimizer.init(model.trainable_parameters())


def _replace_arrays(path: Path, flat: Mapping[str, mx.array], tree: Any) -> Any:
    """The tree with the arrays of a checkpoint, which must have the same names and shapes."""

    def stored(name: str, array: mx.array) -> mx.array:
        new = flat.get(name)
        if new is None or new.shape != array.shape:
            raise ModelError(f"{path}: {name} does not fit", fix=_OTHER_RUN)
        return new

    return tree_map_with_path(stored, tree)


def _flat_state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    return dict(tree_flatten(optimizer.state))


def _read_arrays(path: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, OSError, ValueError) as error:
        raise FileError(
            f"{path}: cannot be read: {error}",
            fix=f"delete {path.parent}: the checkpoint before it is used then",
        ) from error
    assert isinstance(arrays, dict)
    return arrays


def _write_folder(path: Path, arrays: Mapping[str, dict[str, mx.array]], state: Mapping[str, Any]) -> Path:
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in (temporary, old):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            temporary.mkdir()
            for name, flat in arrays.items():
                _save_arrays(temporary / name, flat)
            # Not atomically: the rename of the folder makes all files appear at once.
            (temporary / STATE).write_text(json.dumps(state, indent=2, allow_nan=False), encoding="utf-8")
            _sync(temporary.iterdir())
            fsync_folder(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    return path


def _save_arrays(path: Path, flat: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), flat)
    except RuntimeError as error:
        raise FileError(f"{path}: cannot be written: {error}", fix=FULL_DISK) from error


def _sync(files: Iterable[Path]) -> None:
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
