"""The table of rules (source pattern -> destination, transform) of an architecture, and plans made from it,
either way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.safetensors import DTYPE_BYTES, Source
from mlx_distill.models.checkpoint.transforms import Same, Stack, Transform


@dataclass(frozen=True)
class Rule:
    """One line of the table: tensors named ``source`` become those named ``outputs``.

    ``{l}`` stands for the layer's number and ``{e}`` for the expert's; a source with ``{e}`` means all
    experts of the layer.
    """

    source: str
    outputs: tuple[str, ...]
    transform: Transform

    @property
    def packed(self) -> bool:
        """Whether the outputs are MXFP4 words or scales and not floats."""
        return self.source.endswith(("_blocks", "_scales"))

    def match_source(self, name: str) -> dict[str, str] | None:
        """The numbers in ``name`` where it is a source of this rule."""
        found = _pattern(self.source).fullmatch(name)
        return found.groupdict() if found else None

    def match_output(self, name: str) -> tuple[int, dict[str, str]] | None:
        """Which output ``name`` is, and its numbers."""
        for i, template in enumerate(self.outputs):
            if found := _pattern(template).fullmatch(name):
                return i, found.groupdict()
        return None


_patterns: dict[str, re.Pattern[str]] = {}


def _pattern(template: str) -> re.Pattern[str]:
    if template not in _patterns:
        _patterns[template] = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(template)))
    return _patterns[template]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to come: its name, type and shape, and how to get any of its rows from the sources."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    rule: str
    read: Callable[[int, int], np.ndarray]

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows: all other dimensions together."""
        return prod(self.shape[:-1]) if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def where(self) -> str:
        """``file: tensor 'source name'``, for messages."""
        return self.sources[0].where


@dataclass(frozen=True)
class Architecture:
    """What is known of one ``model_type``.

    ``classes`` imports mlx-lm's (Model, ModelArgs); ``arguments`` turns a config of either spelling into what
    ModelArgs needs and refuses what cannot be computed rightly; ``mend`` corrects a built model; ``shapes``
    says which tensors those arguments ask for; ``rules`` is the table; ``routers`` are module endings;
    ``stock_differs`` says where stock mlx-lm computes something else.
    """

    model_type: str
    classes: Callable[[], tuple[Any, Any]]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    mend: Callable[[Any, Mapping[str, Any]], None]
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    rules: tuple[Rule, ...] = ()
    routers: tuple[str, ...] = ()
    stock_differs: Callable[[Mapping[str, Any]], str | None] = lambda config: None

    def dropped(self, name: str, config: Mapping[str, Any]) -> str | None:
        """Why a source tensor is not needed, or None where it is."""
        if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
            return "tied to the embedding"
        if name.endswith("rotary_emb.inv_freq"):
            return "computed from the config"
        return None


def check_activation(config: Mapping[str, Any]) -> None:
    """Refuse an activation that mlx-lm's classes do not compute: they know SiLU alone, and never look.

    Raises:
        ModelError: another ``hidden_act``.
    """
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(
            f"config.json: hidden_act {config['hidden_act']!r} is not supported", fix="only silu is"
        )


def forward_plan(
    architecture: Architecture, tensors: Mapping[str, Source], config: Mapping[str, Any]
) -> tuple[list[TensorPlan], list[tuple[Source, str]]]:
    """Original layout (or ours, which the rules leave alone) to ours: what comes out, and what is left out
    and why.

    Raises:
        ModelError: an expert is missing, or a shape does not fit its rule.
    """
    groups: dict[tuple[Rule, str], list[tuple[int, Source]]] = defaultdict(list)
    planned: list[TensorPlan] = []
    left_out: list[tuple[Source, str]] = []
    for name, info in tensors.items():
        if reason := architecture.dropped(name, config):
            left_out.append((info, reason))
            continue
        for rule in architecture.rules:
            if (numbers := rule.match_source(name)) is not None:
                groups[rule, numbers["l"]].append((int(numbers.get("e", 0)), info))
                break
        else:
            planned.append(_plan(name, Same(), (info,), 0, "same"))
    for (rule, layer), members in groups.items():
        infos = _in_order(rule, layer, members, config)
        for i, template in enumerate(rule.outputs):
            planned.append(
                _plan(
                    template.replace("{l}", layer),
                    rule.transform,
                    infos,
                    i,
                    type(rule.transform).__name__.lower(),
                )
            )
    names = [p.name for p in planned]
    if len(set(names)) != len(names):
        twice = next(p for p in planned if names.count(p.name) > 1)
        raise ModelError(f"{twice.where}: the checkpoint holds it in two layouts", fix="remove one of them")
    return sorted(planned, key=_order), left_out


def _plan(name: str, transform: Transform, infos: tuple[Source, ...], index: int, rule: str) -> TensorPlan:
    dtype, shape = transform.outputs(infos)[index]
    return TensorPlan(name, dtype, shape, infos, rule, lambda a, b: transform.rows(infos, index, a, b))


def _in_order(
    rule: Rule, layer: str, members: list[tuple[int, Source]], config: Mapping[str, Any]
) -> tuple[Source, ...]:
    members.sort(key=lambda pair: pair[0])
    if isinstance(rule.transform, Stack):
        count = int(config.get("num_experts") or config.get("num_local_experts") or len(members))
        numbers = {e for e, _ in members}
        for e in range(count):
            if e not in numbers:
                missing = rule.source.replace("{l}", layer).replace("{e}", str(e))
                raise ModelError(
                    f"{members[0][1].where}: its sibling {missing!r} is missing",
                    fix="download the checkpoint again",
                )
    return tuple(info for _, info in members)


def _order(plan: TensorPlan) -> tuple[object, ...]:
    """Layers by number, so that a shard holds neighbours; what is outside the layers first."""
    found = re.search(r"\.layers\.(\d+)\.", plan.name)
    return (int(found.group(1)) if found else -1, plan.name)


def wildcard_name(name: str) -> str:
    """A tensor's name with its numbers left open, so that layers and experts fall together.

    >>> folded("model.layers.3.mlp.experts.11.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def backward_plan(architecture: Architecture, tensors: Mapping[str, Source]) -> list[TensorPlan]:
    """Ours to the original layout."""
    groups: dict[tuple[Rule, str], dict[int, Source]] = defaultdict(dict)
    planned: list[TensorPlan] = []
    for name, info in tensors.items():
        for rule in architecture.rules:
            found = rule.match_output(name)
            if found is not None and rule.packed == (info.dtype in ("U32", "U8")):
                groups[rule, found[1]["l"]][found[0]] = info
                break
        else:
            planned.append(_plan(name, Same(), (info,), 0, "same"))
    for (rule, layer), members in groups.items():
        infos = tuple(info for _, info in sorted(members.items()))
        if len(infos) != len(rule.outputs):
            raise ModelError(
                f"{infos[0].where}: its counterpart is missing or of another type",
                fix="convert the checkpoint again",
            )
        transform = rule.transform
        for i, (dtype, shape) in enumerate(transform.inputs(infos)):
            name = rule.source.replace("{l}", layer).replace("{e}", str(i))
            read = _undo(transform, infos, i)
            planned.append(TensorPlan(name, dtype, shape, infos, type(transform).__name__.lower(), read))
    return sorted(planned, key=_order)


def _undo(transform: Transform, infos: Sequence[Source], index: int) -> Callable[[int, int], np.ndarray]:
    return lambda a, b: transform.undo_rows(infos, index, a, b)


def source_name(architecture: Architecture, output: str, present: Mapping[str, Source]) -> str:
    """What a missing tensor of ours is called in the layout that the checkpoint uses, for messages."""
    packed = any(name.endswith("_blocks") for name in present)
    for rule in architecture.rules:
        if (found := rule.match_output(output)) and (
            rule.packed == packed or not rule.source.endswith("_proj")
        ):
            if any(rule.match_source(name) is not None for name in present) or rule.packed:
                return rule.source.replace("{l}", found[1]["l"]).replace("{e}", "0")
    return output
