"""LoRA and DoRA adapters: put on, saved, loaded and merged.

The layers are mlx-lm's, so stock mlx-lm reads the files. Those with modules that trained whole it refuses:
they have to be merged for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.safetensors import read_header
from mlx_distill.models.config_files import ADAPTER_CONFIG, ADAPTER_FILE, read_object
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

_LEAVES = ("lora_a", "lora_b", "m")
_WHOLE = ("weight", "bias")


@dataclass(frozen=True)
class LoraSettings:
    r"""``W x + scale * B A dropout(x)`` on the modules whose name ends in one of ``target_modules``.

    Those of ``modules_to_save`` train whole beside; the names are PEFT's.
    ``kind`` is ``lora`` (Hu et al., arXiv 2106.09685) or ``dora`` (Liu et al., arXiv 2402.09353). The scale
    is :math:`\alpha / r`, or with ``rslora`` :math:`\alpha / \sqrt r` (Kalajdzievski, arXiv 2312.03732), so
    that a higher rank learns as fast.

    >>> LoraSettings(16, 32.0, 0.0, ["q_proj"]).scale, LoraSettings(16, 32.0, 0.0, ["q_proj"], rslora=True).scale
    (2.0, 8.0)
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


@dataclass(frozen=True)
class MergeRow:
    """One merged module.

    ``how`` is ``added`` (to plain weights, one rounding to their type) or ``dequantized_weight`` (the packed base
    became plain). ``update`` is the Frobenius norm of the update, ``error`` that of what rounding lost,
    relative to it.
    """

    path: str
    how: str
    update: float
    error: float


def add_lora(model: Any, settings: LoraSettings, seed: int = 0) -> list[str]:
    """Freeze the model and put adapters on it, in place; nothing changes in its outputs until they are
    trained.

    Args:
        model: mlx-lm's model; dense, quantized or mixed.
        settings: Rank, alpha, dropout and the targets: a target ``q_proj`` or ``self_attn.q_proj`` means
            every module whose path ends so, and likewise those that train whole: see
            :func:`~mlx_distill.models.modules.find_modules_to_save`.
        seed: Seed of the ``A`` matrices, which are uniform in ``± 1 / sqrt(inputs)``; ``B`` is zero.

    Returns:
        The paths of the adapted modules, then of those that train whole.

    Raises:
        ModelError: a target that matches nothing, or packed weights that should train whole.
        ConfigError: a rank above a dimension of any target, or a module that is to be adapted and to train
            whole.
    """
    found = linear_layers(model, settings.target_modules)
    whole = find_modules_to_save(model, settings.modules_to_save, [path for path, _ in found])
    check_rank(found, settings.rank)
    layers = [(path, _wrap(module, settings)) for path, module in found]
    keys = mx.random.split(mx.random.key(seed), len(layers))
    model.freeze()
    for key, (_, layer) in zip(keys, layers, strict=True):
        bound = 1 / math.sqrt(layer.lora_a.shape[-1] if layer.lora_a.ndim == 3 else layer.lora_a.shape[0])
        layer.lora_a = mx.random.uniform(-bound, bound, layer.lora_a.shape, key=key)
    model.update_modules(tree_unflatten(layers))
    return [path for path, _ in layers] + unfreeze_weights(whole)


def _wrap(module: Any, settings: LoraSettings) -> Any:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    experts = isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
    inputs = matrix_shape(module)[1]
    if settings.kind not in ("lora", "dora"):
        raise ModelError(f"unknown kind of adapter {settings.kind!r}", fix="lora or dora")
    if settings.kind == "dora":
        cls = DoRASwitchLinear if experts else DoRALinear
    else:
        cls = LoRASwitchLinear if experts else LoRALinear
    layer = cls.from_base(module, r=settings.rank, dropout=settings.dropout, scale=settings.scale)
    if (
        layer.lora_a.ndim == 2 and layer.lora_a.shape[0] != inputs
    ):  # mlx-lm counts wrongly where 32 / bits is not whole
        layer.lora_a = mx.zeros((inputs, settings.rank))
    return layer


def save_adapter(model: Any, folder: str | Path, settings: LoraSettings, base: str | Path) -> None:
    """Write ``adapters.safetensors``, ``adapter_config.json`` and the tokenizer's files; ``base`` is a folder
    or a Hub id.
    """
    folder = Path(folder)
    weights = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in _LEAVES and _is_adapter(name, model)
    }
    if not weights:
        raise ModelError("the model has no adapter", fix="call add_lora first")
    paths = sorted({name.rsplit(".", 1)[0] for name in weights})
    for name, module in find_modules_to_save(model, settings.modules_to_save):
        weights |= {f"{name}.{leaf}": module[leaf] for leaf in _WHOLE if leaf in module}
    config = adapter_config(settings, paths, len(model.layers), relative_base(base, folder))
    with atomic_path(folder / ADAPTER_FILE) as path:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    if Path(base).is_dir():
        copy_tokenizer(Path(base), folder)
    write_json(folder / ADAPTER_CONFIG, config)


def adapter_config(settings: LoraSettings, paths: Sequence[str], layers: int, base: str) -> dict[str, Any]:
    """What ``adapter_config.json`` holds: mlx-lm's keys, by which it goes, and ours beside them.

    >>> adapter_config(LoraSettings(4, 8.0, 0.0, ["q_proj"]), ["model.layers.0.self_attn.q_proj"], 1, "../base")["lora_parameters"]
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
    }


def _is_adapter(name: str, model: Any) -> bool:
    # ``m`` is DoRA's magnitude only beside lora_a; some architectures may call something else so.
    module = model
    for part in name.split(".")[:-1]:
        module = module[int(part)] if isinstance(module, list) else module[part]
    return "lora_a" in module


def relative_base(base: str | Path, folder: Path) -> str:
    """How an adapter's config names its base: relative to the adapter's folder where it is a folder, so that
    a run can be moved.
    """
    return (
        Path(os.path.relpath(Path(base).resolve(), folder.resolve())).as_posix()
        if Path(base).is_dir()
        else str(base)
    )


def adapter_settings(folder: str | Path) -> LoraSettings:
    """The settings that an adapter folder was written with."""
    path = Path(folder) / ADAPTER_CONFIG
    config = read_object(path)
    try:
        lora = config["lora_parameters"]
        rank, scale = int(lora["rank"]), float(lora["scale"])
        keys = config.get("target_modules") or lora.get("keys") or []
        rslora = bool(config.get("use_rslora"))
        alpha = scale * (math.sqrt(rank) if rslora else rank)  # the scale is what mlx-lm goes by
        dropout, kind = float(lora.get("dropout", 0.0)), config.get("fine_tune_type", "lora")
        return LoraSettings(
            rank, alpha, dropout, tuple(keys), kind, rslora, tuple(config.get("modules_to_save") or ())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error} is missing or wrong", fix="write the adapter again") from error


def load_adapter(model: Any, folder: str | Path) -> list[str]:
    """Put a saved adapter on its base model, in place, and freeze the rest; return the adapted paths.

    Modules that were trained whole take the place of the base's, in the type of its weights; of packed ones,
    in that of its norms.

    Raises:
        ModelError: a tensor that fits no module of the model, or in another shape: with file and tensor.
    """
    folder = Path(folder)
    settings = adapter_settings(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(f"{folder / ADAPTER_FILE} is missing", fix="train the adapter again")
    infos, _ = read_header(folder / ADAPTER_FILE)
    modules = dict(model.named_modules())
    places = {name: tuple(name.rsplit(".", 1)) for name in infos if "." in name}
    for name, info in infos.items():
        path, leaf = places.get(name, ("", ""))
        whole = leaf in _WHOLE and f"{path}.lora_a" not in infos
        if path not in modules or not (leaf in _LEAVES or (whole and leaf in modules[path])):
            raise ModelError(
                f"{info.where} fits no module of the base model", fix="check base in adapter_config.json"
            )
    paths = sorted({path for path, leaf in places.values() if leaf in _LEAVES})
    check_rank([(path, modules[path]) for path in paths], settings.rank)
    layers: list[tuple[str, Any]] = [(path, _wrap(modules[path], settings)) for path in paths]
    layers += [
        (path, _plain(modules[path], model.model.norm.weight.dtype))
        for path in sorted({path for path, leaf in places.values() if leaf in _WHOLE})
    ]
    weights = mx.load(str(folder / ADAPTER_FILE))
    for path, layer in layers:
        for leaf in (*_LEAVES, *_WHOLE):
            name = f"{path}.{leaf}"
            if leaf in layer and (name not in weights or weights[name].shape != layer[leaf].shape):
                raise ModelError(
                    f"{folder / ADAPTER_FILE}: tensor '{name}' does not fit the base model",
                    fix="check base in adapter_config.json",
                )
            if leaf in layer:
                layer[leaf] = weights[name].astype(layer[leaf].dtype) if leaf in _WHOLE else weights[name]
    model.freeze()
    model.update_modules(tree_unflatten(layers))
    return paths


def _plain(module: Any, dtype: mx.Dtype) -> Any:
    # A packed base is no hindrance: what was trained whole takes its place, in the type in which the model
    # computes.
    return (
        unquantized_like(module, dequantized_weight(module).astype(dtype)) if "scales" in module else module
    )


def has_adapter(model: Any) -> bool:
    """Whether any module of the model carries an adapter."""
    return any("lora_a" in module for _, module in model.named_modules())


def lora_delta(layer: Any) -> mx.array:
    """``scale * B A`` of one adapted layer in float32, ``[out, in]`` or ``[experts, out, in]``."""
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    return layer.scale * (b @ a) if a.ndim == 3 else layer.scale * (a @ b).T


def merge(model: Any) -> list[MergeRow]:
    """Add every adapter to its weights, in place.

    Plain weights are added to in float32 and rounded once to their type. A packed base is dequantized first
    and stays plain, in the type of the model's norms, since packing again would lose most of a small update;
    :func:`mlx_distill.models.quantize.quantize_folder` packs, and states the error.
    """
    rows, merged = [], []
    for path, layer in sorted(model.named_modules()):
        if "lora_a" not in layer:
            continue
        module, row = _merged(path, layer, model.model.norm.weight.dtype)
        rows.append(row)
        merged.append((path, module))
    model.update_modules(tree_unflatten(merged))
    return rows


def _merged(path: str, layer: Any, model_dtype: mx.Dtype) -> tuple[Any, MergeRow]:
    base = layer.linear
    packed = hasattr(base, "bits")
    weight = dequantized_weight(base) if packed else base.weight
    dtype = model_dtype if packed else weight.dtype
    exact = weight.astype(mx.float32) + lora_delta(layer)
    if "m" in layer:  # DoRA: the rows' norms are learned apart
        exact = exact * (layer.m / mx.sqrt(mx.sum(mx.square(exact), axis=-1)))[..., None]
    rounded = exact.astype(dtype)
    out = unquantized_like(base, rounded)
    update = mx.sqrt(mx.sum(mx.square(exact - weight.astype(mx.float32)))).item()
    error = mx.sqrt(mx.sum(mx.square(exact - rounded.astype(mx.float32)))).item() / max(update, 1e-30)
    return out, MergeRow(path, "dequantized" if packed else "added", float(update), float(error))


class DoRASwitchLinear(nn.Module):
    r"""Weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353) of each expert :math:`e` of a
    stack.

    .. math:: W'_e = m_e \frac{W_e + s B_e A_e}{\|W_e + s B_e A_e\|}

    with the norm of each row, taken as a constant in the backward pass as in the paper (section 4.3). The
    norm is put together from :math:`\|W\|^2`, computed once, and two products of rank r; the experts stay
    packed.

    Args:
        linear: mlx-lm's stack of experts, plain or packed.
        r: Rank.
        dropout: On the adapter's input.
        scale: s.
    """

    def __init__(self, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> None:
        super().__init__()
        experts, outputs, inputs = linear.num_experts, linear.output_dims, linear.input_dims
        self.linear, self.dropout, self.scale, self.num_experts = (
            linear,
            nn.Dropout(p=dropout),
            scale,
            experts,
        )
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, r, inputs))
        self.lora_b = mx.zeros((experts, outputs, r))
        # One expert at a time: packed ones are never all unpacked. No parameter, for it follows from the
        # base.
        self._squares = mx.stack(
            [mx.square(dequantized_weight(linear, expert)).sum(axis=-1) for expert in range(experts)]
        )
        self.m = mx.sqrt(self._squares)

    @classmethod
    def from_base(
        cls, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> DoRASwitchLinear:
        """As mlx-lm's adapters are made."""
        return cls(linear, r, dropout, scale)

    def norms(self) -> Float[mx.array, "e o"]:
        """The norm of each row of ``W + s B A``."""
        a, b = self.lora_a, self.lora_b
        along = self.linear(a.astype(self._base_type()), mx.arange(self.num_experts)).astype(mx.float32)
        if "bias" in self.linear:
            along = along - self.linear.bias[:, None]
        cross = (along.swapaxes(-1, -2) * b).sum(axis=-1)
        own = ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1)
        return mx.sqrt(mx.maximum(self._squares + 2 * self.scale * cross + self.scale**2 * own, 0.0))

    def _base_type(self) -> mx.Dtype:
        scales = self.linear.get("scales")
        kind = self.linear.weight.dtype if scales is None else scales.dtype
        return kind if mx.issubdtype(kind, mx.floating) else self.lora_a.dtype

    def __call__(
        self, x: Float[mx.array, "*b i"], indices: Integer[mx.array, "*k"], sorted_indices: bool = False
    ) -> mx.array:
        """As ``SwitchLinear``: each ``x`` through the expert that its index names."""

        def through(x: mx.array, weight: mx.array) -> mx.array:
            return mx.gather_mm(
                x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
            )

        y = self.linear(x, indices, sorted_indices=sorted_indices)
        y = y + (self.scale * through(through(self.dropout(x), self.lora_a), self.lora_b)).astype(y.dtype)
        factor = mx.expand_dims((self.m / mx.stop_gradient(self.norms()))[indices], -2)
        out = factor * y
        if "bias" in self.linear:  # it was added by the base, and is not scaled
            out = out + (1 - factor) * mx.expand_dims(self.linear.bias[indices], -2)
        return out.astype(y.dtype)
