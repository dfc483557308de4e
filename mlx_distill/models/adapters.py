"""LoRA and DoRA adapters: added to a model, saved and loaded.

The layers are mlx-lm's, so stock mlx-lm reads the files, except those with ``modules_to_save``: it raises for
them, and the adapter has to be merged first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import module_names
from mlx_distill.models.checkpoint.safetensors import read_header
from mlx_distill.models.config_files import ADAPTER_CONFIG, ADAPTER_FILE, adapter_columns, read_object
from mlx_distill.models.forward import compute_dtype
from mlx_distill.models.hub import copy_tokenizer
from mlx_distill.models.modules import (
    check_rank,
    dequantized_weight,
    find_modules_to_save,
    linear_layers,
    matrix_shape,
    unfreeze_weights,
    unquantized_like,
)
from mlx_distill.storage import atomic_path, write_json

ADAPTER_LEAVES = ("lora_a", "lora_b", "m")
SAVED_LEAVES = ("weight", "bias")  # of modules_to_save


@dataclass(frozen=True)
class LoraSettings:
    r"""``W x + scale * B A dropout(x)`` on the modules whose path ends in one of ``target_modules``.

    The modules of ``modules_to_save`` are trained fully; the names are PEFT's. ``kind`` is ``lora`` (Hu et
    al., arXiv 2106.09685) or ``dora`` (Liu et al., arXiv 2402.09353). The scale is :math:`\alpha / r`, or
    with ``rslora`` :math:`\alpha / \sqrt r` (Kalajdzievski, arXiv 2312.03732), with which the learning rate
    need not change with the rank.

    >>> LoraSettings(16, 32.0, 0.0, ["q_proj"]).scale
    2.0
    >>> LoraSettings(16, 32.0, 0.0, ["q_proj"], rslora=True).scale
    8.0
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: Sequence[str]
    kind: str = "lora"
    rslora: bool = False
    modules_to_save: Sequence[str] = ()

    @property
    def scale(self) -> float:
        """The factor on the low-rank update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def add_lora(model: Any, settings: LoraSettings, seed: int = 0) -> list[str]:
    """Freeze a model and add adapters to it, in place. Its outputs do not change until they are trained.

    Args:
        model: mlx-lm's model; unquantized, quantized or mixed.
        settings: Rank, alpha, dropout and targets. A target ``q_proj`` or ``self_attn.q_proj`` means every
            module whose path ends so; the same holds for ``modules_to_save``, see
            :func:`~mlx_distill.models.modules.find_modules_to_save`.
        seed: Seed of the ``A`` matrices, which are uniform in ``± 1 / sqrt(inputs)``; ``B`` is zero.

    Returns:
        The paths of the adapted modules, then of ``modules_to_save``.

    Raises:
        ModelError: a target that matches nothing, or quantized weights in ``modules_to_save``.
        ConfigError: a rank larger than a dimension of a target, or a module in both lists.
    """
    targets = linear_layers(model, settings.target_modules)
    saved = find_modules_to_save(model, settings.modules_to_save, [path for path, _ in targets])
    check_rank(targets, settings.rank)
    layers = [(path, _wrap(module, settings)) for path, module in targets]
    keys = mx.random.split(mx.random.key(seed), len(layers))
    model.freeze()
    for key, (_, layer) in zip(keys, layers, strict=True):
        bound = 1 / math.sqrt(layer.lora_a.shape[-1] if layer.lora_a.ndim == 3 else layer.lora_a.shape[0])
        layer.lora_a = mx.random.uniform(-bound, bound, layer.lora_a.shape, key=key)
    model.update_modules(tree_unflatten(layers))
    return [path for path, _ in layers] + unfreeze_weights(saved)


def _wrap(module: Any, settings: LoraSettings) -> Any:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    experts = isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
    inputs = matrix_shape(module)[1]
    if settings.kind not in ("lora", "dora"):
        raise ModelError(f"unknown type of adapter {settings.kind!r}", fix="lora or dora")
    if settings.kind == "dora":
        cls = DoRASwitchLinear if experts else DoRALinear
    else:
        cls = LoRASwitchLinear if experts else LoRALinear
    layer = cls.from_base(module, r=settings.rank, dropout=settings.dropout, scale=settings.scale)
    if layer.lora_a.ndim == 2 and layer.lora_a.shape[0] != inputs:
        # mlx-lm computes the number of inputs incorrectly if 32 / bits is not an integer.
        layer.lora_a = mx.zeros((inputs, settings.rank))
    return layer


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, a model computes what its base computes: each adapted module is replaced by the one that it
    wraps, so nothing is added and nothing is copied. What an adapter's ``modules_to_save`` have become stays.

    Args:
        model: With adapters of :func:`add_lora` or :func:`load_adapter`. One thread at a time uses it.
    """
    adapted = [(path, module) for path, module in model.named_modules() if "lora_a" in module]
    own = [(path, module["linear" if "linear" in module else "embedding"]) for path, module in adapted]
    model.update_modules(tree_unflatten(own))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


def save_adapter(model: Any, folder: str | Path, settings: LoraSettings, base: str | Path) -> None:
    """Write ``adapters.safetensors``, ``adapter_config.json`` and the tokenizer files.

    Args:
        model: With adapters.
        folder: To write to.
        settings: What :func:`add_lora` was given.
        base: The folder or Hub id of the base model.
    """
    folder = Path(folder)
    adapted = {path for path, module in model.named_modules() if "lora_a" in module}
    if not adapted:
        raise ModelError("the model has no adapter", fix="call add_lora first")
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        if path in adapted and leaf in ADAPTER_LEAVES:
            weights[name] = value
    for path, module in find_modules_to_save(model, settings.modules_to_save):
        weights |= {f"{path}.{leaf}": module[leaf] for leaf in SAVED_LEAVES if leaf in module}
    config = adapter_config(settings, sorted(adapted), len(model.layers), relative_base(base, folder))
    with atomic_path(folder / ADAPTER_FILE) as file:
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    if Path(base).is_dir():
        copy_tokenizer(Path(base), folder)
    write_json(folder / ADAPTER_CONFIG, config)


def adapter_config(
    settings: LoraSettings,
    paths: Sequence[str],
    layers: int,
    base: str,
    *,
    revision: str | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """The content of ``adapter_config.json``: the keys that mlx-lm reads, and keys of ours.

    Args:
        settings: Of the adapter.
        paths: Of its modules.
        layers: Number of layers of the base model.
        base: A path relative to the adapter, or a Hub id.
        revision: Commit, tag or branch of a base on the Hub.
        vocab_size: Columns of the embedding among ``modules_to_save``, where the base has another number.

    >>> settings = LoraSettings(4, 8.0, 0.0, ["q_proj"])
    >>> adapter_config(settings, ["model.layers.0.self_attn.q_proj"], 1, "../base")["lora_parameters"]
    {'rank': 4, 'scale': 2.0, 'dropout': 0.0, 'keys': ['self_attn.q_proj']}
    """
    keys = sorted({path.split(".", 3)[-1] if path.startswith("model.layers.") else path for path in paths})
    return {
        "fine_tune_type": settings.kind,
        "num_layers": layers,
        "lora_parameters": {
            "rank": settings.rank,
            "scale": settings.scale,
            "dropout": settings.dropout,
            "keys": keys,
        },
        "alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": list(settings.target_modules) or keys,
        "modules_to_save": list(settings.modules_to_save),
        "base": base,
        **({"revision": revision} if revision else {}),
        **({"vocab_size": vocab_size} if vocab_size else {}),
    }


def relative_base(base: str | Path, folder: Path) -> str:
    """The base as an adapter's config names it: a path relative to the adapter's folder, or a Hub id.

    A relative path stays valid when a run is moved.
    """
    if not Path(base).is_dir():
        return str(base)
    return Path(os.path.relpath(Path(base).resolve(), folder.resolve())).as_posix()


def adapter_settings(folder: str | Path) -> LoraSettings:
    """The settings that an adapter folder was written with."""
    path = Path(folder) / ADAPTER_CONFIG
    config = read_object(path)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ModelError(
            f"{path}: fine_tune_type {kind!r} is no adapter of low rank",
            fix="fuse it with its base (mlx_lm.fuse --model BASE --adapter-path FOLDER), and convert that",
        )
    try:
        lora = config["lora_parameters"]
        rank, scale = int(lora["rank"]), float(lora["scale"])
        keys = config.get("target_modules") or lora.get("keys") or []
        rslora = bool(config.get("use_rslora"))
        alpha = scale * (math.sqrt(rank) if rslora else rank)  # mlx-lm reads the scale
        dropout = float(lora.get("dropout", 0.0))
        saved = tuple(config.get("modules_to_save") or ())
        if rank < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1:
            raise ValueError("rank, scale or dropout")
        if not all(isinstance(name, str) for name in (*keys, *saved)):
            raise ValueError("keys or modules_to_save")
        return LoraSettings(rank, alpha, dropout, tuple(keys), kind, rslora, saved)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error} is missing or wrong", fix="write the adapter again") from error


def load_adapter(model: Any, folder: str | Path) -> list[str]:
    """Add a saved adapter to its base model, in place, and freeze the model; return the adapted paths.

    ``modules_to_save`` replace those of the base model, in the type of its weights, or in the type in which
    it computes if its weights are quantized. An embedding and a head of another number of columns replace
    those of the base if the adapter's config names that number.

    Raises:
        ModelError: a tensor that belongs to no module of the model, or has another shape: with file and
            tensor.
    """
    folder = Path(folder)
    settings = adapter_settings(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(f"{folder / ADAPTER_FILE} is missing", fix="train the adapter again")
    infos, _ = read_header(folder / ADAPTER_FILE)
    modules = {path: module for path, module in model.named_modules() if path}
    adapted: set[str] = set()
    saved: set[str] = set()
    for name, info in infos.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if module is not None and leaf in ADAPTER_LEAVES and not isinstance(module, _EMBEDDINGS):
            adapted.add(path)
        elif (
            module is not None
            and leaf in SAVED_LEAVES
            and leaf in module
            and (leaf == "bias" or f"{path}.lora_a" not in infos)
        ):
            saved.add(path)
        else:
            raise ModelError(
                f"{info.where} fits no module of the base model", fix="check base in adapter_config.json"
            )
    paths = sorted(adapted)
    weights = mx.load(str(folder / ADAPTER_FILE))
    dtype = compute_dtype(model)
    replaced = {
        path: _unquantized(modules[path], dtype) if f"{path}.weight" in infos else modules[path]
        for path in sorted(saved)
    }
    names = module_names(model)
    _replace_weights(replaced, weights, folder, (names.embedding, names.head))
    wrapped = {path: _wrap(replaced.get(path, modules[path]), settings) for path in paths}
    _set_matrices(wrapped, weights, folder)
    model.freeze()
    model.update_modules(tree_unflatten(list((replaced | wrapped).items())))
    return paths


_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def _unquantized(module: Any, dtype: mx.Dtype) -> Any:
    if "scales" not in module:
        return module
    return unquantized_like(module, dequantized_weight(module).astype(dtype))


def _replace_weights(
    modules: Mapping[str, Any], weights: Mapping[str, mx.array], folder: Path, resized: Sequence[str]
) -> None:
    """Set the weights and biases of modules from the arrays of an adapter, in the type that they have.

    Those of ``resized`` may have the number of rows that the adapter's config names.
    """
    columns = adapter_columns(folder)
    for path, module in modules.items():
        for leaf in SAVED_LEAVES:
            value = weights.get(f"{path}.{leaf}")
            if value is None:
                continue
            shape = module[leaf].shape
            if value.shape != shape and (path not in resized or value.shape != (columns, *shape[1:])):
                raise _misfit(folder, f"{path}.{leaf}")
            module[leaf] = value.astype(module[leaf].dtype)


def _set_matrices(layers: Mapping[str, Any], weights: Mapping[str, mx.array], folder: Path) -> None:
    """Set the matrices of adapters."""
    for path, layer in layers.items():
        for leaf in ADAPTER_LEAVES:
            value = weights.get(f"{path}.{leaf}")
            if value is None and leaf not in layer:
                continue
            if value is None or leaf not in layer or value.shape != layer[leaf].shape:
                raise _misfit(folder, f"{path}.{leaf}")
            layer[leaf] = value


def _misfit(folder: Path, name: str) -> ModelError:
    return ModelError(
        f"{folder / ADAPTER_FILE}: tensor {name!r} does not fit the base model",
        fix="check base in adapter_config.json",
    )


class DoRASwitchLinear(nn.Module):
    r"""Weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353) of each expert :math:`e` of a
    stack.

    .. math:: W'_e = m_e \frac{W_e + s B_e A_e}{\|W_e + s B_e A_e\|}

    The norm is that of each row, and is a constant in the backward pass as in the paper (section 4.3). It is
    computed from :math:`\|W\|^2`, which is computed once, and two products of rank r, so the experts stay
    quantized.

    Args:
        linear: mlx-lm's stack of experts, quantized or not.
        r: Rank.
        dropout: On the input of the adapter.
        scale: s.
    """

    def __init__(self, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> None:
        super().__init__()
        experts, outputs, inputs = linear.num_experts, linear.output_dims, linear.input_dims
        self.linear, self.scale, self.num_experts = linear, scale, experts
        self.dropout = nn.Dropout(p=dropout)
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, r, inputs))
        self.lora_b = mx.zeros((experts, outputs, r))
        # One expert is dequantized at a time. Not a parameter, since it follows from the base.
        self._squares = mx.stack(
            [mx.square(dequantized_weight(linear, expert)).sum(axis=-1) for expert in range(experts)]
        )
        self.m = mx.sqrt(self._squares)

    @classmethod
    def from_base(
        cls, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> DoRASwitchLinear:
        """The constructor of mlx-lm's adapters."""
        return cls(linear, r, dropout, scale)

    def norms(self) -> Float[mx.array, "e o"]:
        """The norm of each row of ``W + s B A``."""
        a, b = self.lora_a, self.lora_b
        product = self.linear(a.astype(self._base_dtype()), mx.arange(self.num_experts)).astype(mx.float32)
        if "bias" in self.linear:
            product = product - self.linear.bias[:, None]
        cross = (product.swapaxes(-1, -2) * b).sum(axis=-1)
        squares = ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1)
        return mx.sqrt(mx.maximum(self._squares + 2 * self.scale * cross + self.scale**2 * squares, 0.0))

    def _base_dtype(self) -> mx.Dtype:
        scales = self.linear.get("scales")
        dtype = self.linear.weight.dtype if scales is None else scales.dtype
        return dtype if mx.issubdtype(dtype, mx.floating) else self.lora_a.dtype

    def __call__(
        self, x: Float[mx.array, "*b i"], indices: Integer[mx.array, "*k"], sorted_indices: bool = False
    ) -> mx.array:
        """As ``SwitchLinear``: each ``x`` through the expert of its index."""

        def through(x: mx.array, weight: mx.array) -> mx.array:
            return mx.gather_mm(
                x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
            )

        y = self.linear(x, indices, sorted_indices=sorted_indices)
        y = y + (self.scale * through(through(self.dropout(x), self.lora_a), self.lora_b)).astype(y.dtype)
        factor = mx.expand_dims((self.m / mx.stop_gradient(self.norms()))[indices], -2)
        out = factor * y
        if "bias" in self.linear:  # the base added it, and DoRA does not scale it
            out = out + (1 - factor) * mx.expand_dims(self.linear.bias[indices], -2)
        return out.astype(y.dtype)
