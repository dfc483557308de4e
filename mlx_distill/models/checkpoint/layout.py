"""What is known about a model family, and the mapping of its checkpoint tensors to mlx-lm's, both ways.

An :class:`Architecture` holds a table of :class:`Rule`. :func:`forward_plan` applies it to the tensors of a
checkpoint, :func:`backward_plan` undoes it. Both only read headers: a :class:`TensorPlan` reads rows on
demand.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.rope import RopeSettings, rope_settings
from mlx_distill.models.checkpoint.safetensors import DTYPE_BYTES, Source
from mlx_distill.models.checkpoint.transforms import Same, Stack, Transform
from mlx_distill.models.config_fields import DECODER_FIELDS, Fields


@dataclass(frozen=True)
class Rule:
    """Tensors named ``source`` in the original layout become the tensors named ``outputs`` in mlx-lm's.

    ``{l}`` stands for a layer number and ``{e}`` for an expert number; a source with ``{e}`` means all
    experts of a layer. ``quantized`` marks the tensors of quantized weights (words and scales).
    """

    source: str
    outputs: tuple[str, ...]
    transform: Transform
    quantized: bool = False

    def match_source(self, name: str) -> dict[str, str] | None:
        """The layer and expert numbers in ``name`` if it is a source of this rule."""
        match = _pattern(self.source).fullmatch(name)
        return match.groupdict() if match else None

    def match_output(self, name: str) -> tuple[int, dict[str, str]] | None:
        """The index of the output that ``name`` is, and its layer number; None if it is no output."""
        for i, template in enumerate(self.outputs):
            if match := _pattern(template).fullmatch(name):
                return i, match.groupdict()
        return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is computed from its sources while it is read, a range of rows at a time.

    It is a :class:`~mlx_distill.models.checkpoint.safetensors.Source` itself, so plans can be chained.
    ``rule`` names the transform for reports; ``read_rows(start, stop)`` returns raw bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    rule: str
    read_rows: Callable[[int, int], np.ndarray]

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows: the product of all other dimensions."""
        return prod(self.shape[:-1]) if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def file(self) -> Path:
        """The file of the first source."""
        return self.sources[0].file

    @property
    def where(self) -> str:
        """``file: tensor 'source name'``, for messages."""
        return self.sources[0].where

    def read(self, start: int = 0, stop: int | None = None, *, columns: int | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the tensor seen as a matrix with ``columns`` columns."""
        width = self.columns
        columns = columns or width
        stop = prod(self.shape) // columns if stop is None else stop
        if columns == width:
            return self.read_rows(start, stop)
        first, last = start * columns // width, -(-stop * columns // width)
        values = self.read_rows(first, last).reshape(-1)
        skip = start * columns - first * width
        return values[skip : skip + (stop - start) * columns].reshape(-1, columns)

    def read_block(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """A block of rows and columns; whole rows are computed."""
        return self.read_rows(*rows)[:, slice(*columns)]


@dataclass(frozen=True)
class ModuleNames:
    """Where the modules that other packages need are in mlx-lm's module tree.

    ``trunk`` computes the hidden states. ``routers`` and ``experts`` are the ends of module paths, such as
    ``mlp.router``; the others are whole paths.
    """

    trunk: str = "model"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class NativeQuantization:
    """The quantization that the original checkpoints of a family have: of the experts, in one mode.

    ``not_converted`` is what ``modules_to_not_convert`` of ``quantization_config`` lists.
    """

    mode: str
    not_converted: tuple[str, ...]


def final_logit_softcapping(model: Any) -> float | None:
    """The attribute of mlx-lm's models with logit soft-capping; None for the others."""
    return getattr(model, "final_logit_softcapping", None)


@dataclass(frozen=True)
class Architecture:
    """What is known about one ``model_type``; code elsewhere asks these fields and never compares the type.

    Args:
        model_type: The key in config.json.
        classes: Imports and returns mlx-lm's ``(Model, ModelArgs)``.
        arguments: Turns a config into the keyword arguments of ``ModelArgs``; raises on what mlx-lm's class
            would compute incorrectly.
        patch: Corrects a built model in place, so that it computes what transformers computes.
        shapes: The tensors that these arguments need, in mlx-lm's layout.
        rules: How the tensors of the original layout map to mlx-lm's; others keep their names.
        modules: Module paths.
        rope: The rotary embedding that a config means, defaults of the family included.
        native_quantization: The quantization of the original checkpoints, if any.
        config_aliases: Keys that stock mlx-lm reads, each with the name that transformers writes instead.
        logit_softcap: ``c`` of a model whose logits are ``c * tanh(z / c)``; None where the family has none.
        stock_difference: Why stock mlx-lm computes other logits for a config; None where it does not.
        fields: The fields of config.json that are known, and the values that are computed.
    """

    model_type: str
    classes: Callable[[], tuple[Any, Any]]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    patch: Callable[[Any, Mapping[str, Any]], None]
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    rules: tuple[Rule, ...] = ()
    modules: ModuleNames = field(default_factory=ModuleNames)
    rope: Callable[[Mapping[str, Any]], RopeSettings] = rope_settings
    native_quantization: NativeQuantization | None = None
    config_aliases: Mapping[str, str] = field(default_factory=dict)
    logit_softcap: Callable[[Any], float | None] = final_logit_softcapping
    stock_difference: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    fields: Fields = field(default_factory=lambda: DECODER_FIELDS)

    def unused(self, name: str, config: Mapping[str, Any]) -> str | None:
        """Why a source tensor is not needed, or None if it is."""
        if name == f"{self.modules.head}.weight" and config.get("tie_word_embeddings", False):
            return "tied to the embedding"
        if name.endswith("rotary_emb.inv_freq"):
            return "computed from the config"
        return None

    def holds_natively(self, path: str, mode: str) -> bool:
        """Whether the original layout can hold the module at ``path`` quantized in ``mode``."""
        native = self.native_quantization
        return (
            native is not None and mode == native.mode and any(f".{e}." in path for e in self.modules.experts)
        )

    def is_quantized_source(self, name: str) -> bool:
        """Whether ``name`` is a tensor of quantized weights in the original layout."""
        return any(rule.quantized and rule.match_source(name) is not None for rule in self.rules)


def forward_plan(
    architecture: Architecture, tensors: Mapping[str, Source], config: Mapping[str, Any]
) -> tuple[list[TensorPlan], list[tuple[Source, str]]]:
    """Plan the tensors of mlx-lm's layout from those of the original layout, or of mlx-lm's own.

    Returns:
        The plans, and the tensors that are not needed with the reason.

    Raises:
        ModelError: an expert is missing, or a shape does not fit its rule.
    """
    groups: dict[tuple[Rule, str], list[tuple[int, Source]]] = defaultdict(list)
    plans: list[TensorPlan] = []
    left_out: list[tuple[Source, str]] = []
    for name, source in tensors.items():
        if reason := architecture.unused(name, config):
            left_out.append((source, reason))
            continue
        for rule in architecture.rules:
            if (numbers := rule.match_source(name)) is not None:
                groups[rule, numbers["l"]].append((int(numbers.get("e", 0)), source))
                break
        else:
            plans.append(_plan(name, Same(), (source,), 0))
    for (rule, layer), members in groups.items():
        sources = _in_expert_order(rule, layer, members, config)
        for i, template in enumerate(rule.outputs):
            plans.append(_plan(template.replace("{l}", layer), rule.transform, sources, i))
    names = [p.name for p in plans]
    if len(set(names)) != len(names):
        duplicate = next(p for p in plans if names.count(p.name) > 1)
        raise ModelError(
            f"{duplicate.where}: the checkpoint holds it in two layouts", fix="remove one of them"
        )
    return sorted(plans, key=_by_layer), left_out


def _plan(name: str, transform: Transform, sources: tuple[Source, ...], index: int) -> TensorPlan:
    dtype, shape = transform.outputs(sources)[index]

    def read_rows(start: int, stop: int) -> np.ndarray:
        return transform.rows(sources, index, start, stop)

    return TensorPlan(name, dtype, shape, sources, transform.name, read_rows)


def _in_expert_order(
    rule: Rule, layer: str, members: list[tuple[int, Source]], config: Mapping[str, Any]
) -> tuple[Source, ...]:
    members.sort(key=lambda pair: pair[0])
    if isinstance(rule.transform, Stack):
        count = int(config.get("num_experts") or config.get("num_local_experts") or len(members))
        numbers = {expert for expert, _ in members}
        for expert in range(count):
            if expert not in numbers:
                missing = rule.source.replace("{l}", layer).replace("{e}", str(expert))
                raise ModelError(
                    f"{members[0][1].where}: tensor {missing!r} of the same layer is missing",
                    fix="download the checkpoint again",
                )
    return tuple(source for _, source in members)


def _by_layer(plan: TensorPlan) -> tuple[object, ...]:
    """Sort by layer number, so that a shard holds whole layers; tensors outside the layers come first."""
    match = re.search(r"\.layers\.(\d+)\.", plan.name)
    return (int(match.group(1)) if match else -1, plan.name)


def wildcard_name(name: str) -> str:
    """A tensor name with its numbers replaced by ``*``, the same for all layers and experts.

    >>> wildcard_name("model.layers.3.mlp.experts.11.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def backward_plan(architecture: Architecture, tensors: Mapping[str, Source]) -> list[TensorPlan]:
    """Plan the tensors of the original layout from those of mlx-lm's.

    Raises:
        ModelError: a tensor of a group that is joined into one is missing.
    """
    groups: dict[tuple[Rule, str], dict[int, Source]] = defaultdict(dict)
    plans: list[TensorPlan] = []
    for name, source in tensors.items():
        for rule in architecture.rules:
            match = rule.match_output(name)
            if match is not None and rule.quantized == (source.dtype in ("U32", "U8")):
                groups[rule, match[1]["l"]][match[0]] = source
                break
        else:
            plans.append(_plan(name, Same(), (source,), 0))
    for (rule, layer), members in groups.items():
        sources = tuple(source for _, source in sorted(members.items()))
        if len(sources) != len(rule.outputs):
            raise ModelError(
                f"{sources[0].where}: its counterpart is missing or of another type",
                fix="convert the checkpoint again",
            )
        for i, (dtype, shape) in enumerate(rule.transform.inputs(sources)):
            name = rule.source.replace("{l}", layer).replace("{e}", str(i))
            read_rows = _undo(rule.transform, sources, i)
            plans.append(TensorPlan(name, dtype, shape, sources, rule.transform.name, read_rows))
    return sorted(plans, key=_by_layer)


def _undo(transform: Transform, sources: Sequence[Source], index: int) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: transform.undo_rows(sources, index, start, stop)


def source_name(architecture: Architecture, output: str, present: Mapping[str, Source]) -> str:
    """The name of a missing tensor in the layout that the checkpoint uses, for messages."""
    quantized = any(architecture.is_quantized_source(name) for name in present)
    rules = [(rule, match) for rule in architecture.rules if (match := rule.match_output(output))]
    for rule, (_, numbers) in [pair for pair in rules if pair[0].quantized == quantized] or rules:
        if rule.quantized or any(rule.match_source(name) is not None for name in present):
            return rule.source.replace("{l}", numbers["l"]).replace("{e}", "0")
    return output
