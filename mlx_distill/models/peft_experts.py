"""PEFT's adapters on experts: on each expert alone, or on a parameter of all of them (``target_parameters``).

transformers 4 had a linear layer for each expert of Qwen3-MoE; since version 5 the experts of a layer are
parameters of three dimensions, as they always were in gpt-oss. PEFT then wraps the module of the experts once
for each parameter, so that the names of the matrices tell the depth of the wrapper and not the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models.adapter_import import BaseModel, no_module
from mlx_distill.models.checkpoint.layout import Rule
from mlx_distill.models.checkpoint.safetensors import TensorInfo
from mlx_distill.models.checkpoint.transforms import SplitBlocks, Stack, Transpose
from mlx_distill.models.peft_config import MERGE, PeftConfig

_WRAPPED = ".base_layer"


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of all experts of a layer, and the modules of mlx-lm's layout that it becomes."""

    rule: Rule
    modules: tuple[str, ...]

    def needed(self, rank: int, base: BaseModel) -> dict[str, tuple[int, ...]]:
        """The shapes of its matrices in PEFT's file."""
        shapes = [base.shapes[f"{module}.weight"] for module in self.modules]
        experts, _, inputs = shapes[0]
        outputs = sum(shape[1] for shape in shapes)
        return {"lora_a": (rank * experts, inputs), "lora_b": (outputs, rank * experts)}

    def unstacked(self, parts: Mapping[str, mx.array], rank: int) -> dict[str, mx.array]:
        """The matrices of PEFT's file, ``[experts, rank, in]`` and ``[experts, out, rank]``."""
        a, b = parts["lora_a"], parts["lora_b"]
        experts = a.shape[0] // rank
        return {
            "lora_a": a.reshape(experts, rank, a.shape[1]),
            "lora_b": b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1),
        }

    def by_module(self, parts: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The matrices under the names of an adapter folder; gate and up share ``A`` and divide ``B``."""
        out: dict[str, mx.array] = {}
        for index, module in enumerate(self.modules):
            b = parts["lora_b"]
            if isinstance(self.rule.transform, SplitBlocks):
                b = mx.split(b, 2, axis=1)[index]
            elif isinstance(self.rule.transform, Transpose) and self.rule.transform.split:
                b = b[:, index::2]
            out |= {f"{module}.lora_a": mx.contiguous(parts["lora_a"]), f"{module}.lora_b": mx.contiguous(b)}
        return out


def expert_parameter(path: str, base: BaseModel) -> ExpertParameter | None:
    """The parameter of experts at a path of transformers, such as ``layers.0.mlp.experts.down_proj``."""
    for rule in base.architecture.rules:
        numbers = rule.match_source(path)
        is_single = rule.quantized or isinstance(rule.transform, Stack)
        if numbers is not None and not is_single and rule.outputs[0].endswith(".weight"):
            modules = (output.replace("{l}", numbers["l"]) for output in rule.outputs)
            return ExpertParameter(rule, tuple(module.removesuffix(".weight") for module in modules))
    return None


def parameter_path(path: str, info: TensorInfo, config: PeftConfig, base: BaseModel) -> str:
    """The path of the parameter that a wrapper is on; of another module its own path.

    Args:
        path: As in PEFT's file, with a ``base_layer`` for each wrapper outside of it.
        info: For messages.
        config: With ``target_parameters``.
        base: The base model.

    Raises:
        ModelError: more wrappers than parameters that the config names.
    """
    module, depth = path, 0
    while module.endswith(_WRAPPED):
        module, depth = module.removesuffix(_WRAPPED), depth + 1
    leaves = [rule.source.rpartition(".")[2] for rule in base.architecture.rules]
    paths = [f"{module}.{leaf}" for leaf in dict.fromkeys(leaves)]
    known = [name for name in paths if expert_parameter(name, base) is not None]
    if not known:
        if depth:
            raise no_module(info, module, base)
        return path
    named = [name for name in known if config.is_parameter(name)]
    if depth >= len(named):
        raise ModelError(
            f"{info.where} is of a parameter that target_parameters does not name: PEFT would leave it out",
            fix="correct target_parameters in adapter_config.json, or " + MERGE,
        )
    return named[len(named) - 1 - depth]  # the first parameter is wrapped first


def single_expert(path: str, base: BaseModel) -> tuple[str, int] | None:
    """The module of mlx-lm's layout that holds the expert at a path of transformers 4, and its number."""
    for rule in base.architecture.rules:
        numbers = rule.match_source(f"{path}.weight")
        if numbers is not None and isinstance(rule.transform, Stack):
            output = rule.outputs[0].replace("{l}", numbers["l"])
            return output.removesuffix(".weight"), int(numbers["e"])
    return None


def stack_experts(
    path: str, members: Mapping[int, Mapping[str, mx.array]], count: int
) -> dict[str, mx.array]:
    """The matrices of single experts as those of the stack; zeros, which change nothing, for the others.

    Raises:
        ModelError: DoRA on some of the experts, whose magnitudes are not known for the others.
    """
    first = next(iter(members.values()))
    missing = next((e for e in range(count) if e not in members), None)
    if missing is not None and "m" in first:
        raise ModelError(
            f"{path}: DoRA on some experts and not on expert {missing}", fix="train all experts, or " + MERGE
        )
    return {
        f"{path}.{leaf}": mx.stack(
            [members[e][leaf] if e in members else mx.zeros_like(example) for e in range(count)]
        )
        for leaf, example in first.items()
    }
