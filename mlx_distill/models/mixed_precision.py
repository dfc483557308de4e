"""Mixed precision: a quantization for each tensor, so that a model meets a size budget at the least loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ConfigError
from mlx_distill.models.checkpoint.tensor_job import MLX_TYPES
from mlx_distill.models.config_files import is_adapter
from mlx_distill.models.convert import tensor_rows
from mlx_distill.models.hub import resolve
from mlx_distill.models.quantization import MIXED, Quantization
from mlx_distill.models.quantize import plan_jobs, plan_with_adapter

# The modes that are chosen from, by the family of ``quantize.mode``. Kernels of one family run at similar
# speeds, and the errors of a tensor fall with the bits within it.
FAMILIES = {
    "affine": ("affine3", "affine4", "affine5", "affine6", "affine8"),
    "floating": ("mxfp4", "nvfp4", "mxfp8"),
}
# The cost of each quantization that a module may get, such as the KL divergence with it alone quantized.
Costs = Mapping[str, Mapping[Quantization, float]]


def is_affine(mode: str) -> bool:
    """Whether most weights of a mode are quantized affinely, in groups of any size.

    >>> is_affine("mixed4"), is_affine("mxfp4")
    (True, False)
    """
    return MIXED.get(mode, (mode, mode))[0].startswith("affine")


def modes_to_choose_from(mode: str) -> tuple[str, ...]:
    """The modes of the family that a mode belongs to.

    >>> modes_to_choose_from("mxfp4")
    ('mxfp4', 'nvfp4', 'mxfp8')
    """
    return FAMILIES["affine" if is_affine(mode) else "floating"]


@dataclass(frozen=True)
class PrecisionOptions:
    """What a choice of quantizations has to know of a model.

    Attributes:
        bits: For each module the stored bits of its weight with each quantization that it may get, scales
            included.
        fixed_bits: Stored bits of everything else.
        parameters: Of the model.
        dtypes: For each module the type that its scales are stored in, in the affine modes.
    """

    bits: Mapping[str, Mapping[Quantization, int]]
    fixed_bits: int
    parameters: int
    dtypes: Mapping[str, mx.Dtype] = field(default_factory=dict)

    def bits_per_weight(self, quantizations: Mapping[str, Quantization]) -> float:
        """Of the whole model, with these quantizations."""
        stored = sum(self.bits[path][quantization] for path, quantization in quantizations.items())
        return (self.fixed_bits + stored) / self.parameters


@dataclass(frozen=True)
class PrecisionChoice:
    """The quantization of each module, the stored bits of the model for each of its parameters, and the sum
    of the costs.
    """

    quantizations: Mapping[str, Quantization]
    bits_per_weight: float
    cost: float


def choose_precision(
    options: PrecisionOptions, costs: Costs, bits_per_weight: float, *, units: int = 1 << 14
) -> PrecisionChoice:
    """The quantizations with the smallest sum of costs whose bits fit a budget.

    This is the multiple-choice knapsack problem, solved by dynamic programming over the budget: after each
    module, the least cost for every number of bits spent. (Greedily by the cost that a bit saves, the last
    large module that just does not fit leaves its room to small ones: 10 % more cost in one of six budgets of
    tiny-qwen3.) The costs of the modules are added up as if they were independent.

    Args:
        options: Of the model.
        costs: For each module and each of its quantizations.
        bits_per_weight: The budget: stored bits of the whole model (scales, and tensors that are not
            quantized, included) for each of its parameters.
        units: Parts of the budget that sizes are rounded up to.

    Raises:
        ConfigError: the smallest quantizations are above the budget, with the least possible one.

    >>> small, large = Quantization("affine", 3, 64), Quantization("affine", 4, 64)
    >>> options = PrecisionOptions({"a": {small: 300, large: 400}, "b": {small: 300, large: 400}}, 0, 200)
    >>> costs = {"a": {small: 0.5, large: 0.4}, "b": {small: 0.9, large: 0.3}}
    >>> choice = choose_precision(options, costs, 3.5)
    >>> choice.quantizations["b"].bits, choice.bits_per_weight, round(choice.cost, 3)
    (4, 3.5, 0.8)
    """
    smallest = {path: min(sizes, key=lambda q: sizes[q]) for path, sizes in options.bits.items()}
    least = options.bits_per_weight(smallest)
    if bits_per_weight < least:
        raise ConfigError(
            f"quantize.bits_per_weight: {bits_per_weight:g} is below {least:.3f}, which the model has with "
            "the smallest quantization of every module",
            fix=f"at least {least + 0.005:.2f}",
        )
    # What is shared out is the room above the smallest quantizations.
    room = (bits_per_weight - least) * options.parameters
    unit = max(room / units, 1.0)
    units = int(room / unit)
    spent, picks = np.zeros(units + 1), []
    for path, sizes in options.bits.items():
        choices = sorted(sizes, key=lambda q: sizes[q])
        more = [math.ceil((sizes[q] - sizes[smallest[path]]) / unit) for q in choices]
        tried = np.full((len(choices), units + 1), np.inf)
        for line, q, size in zip(tried, choices, more, strict=True):
            line[size:] = spent[: max(units + 1 - size, 0)] + costs[path][q]
        pick = tried.argmin(axis=0)
        spent = np.take_along_axis(tried, pick[None], axis=0)[0]
        picks.append((path, choices, more, pick))
    chosen, left = {}, units
    for path, choices, more, pick in reversed(picks):
        number = int(pick[left])
        chosen[path] = choices[number]
        left -= more[number]
    chosen = {path: chosen[path] for path in options.bits}
    cost = sum(costs[path][q] for path, q in chosen.items())
    return PrecisionChoice(chosen, options.bits_per_weight(chosen), cost)


def precision_options(
    source: str | Path,
    modes: Sequence[str],
    group_size: int = 0,
    adapter: str = "merge",
    keep: Sequence[str] = ("router",),
) -> PrecisionOptions:
    """The quantizations that each module of a model may get, with their stored bits.

    Weights that are quantized already keep their bits, also those that an adapter changes.

    Args:
        source: A model folder, or an adapter folder.
        modes: To choose from.
        group_size: As for :func:`~mlx_distill.models.quantize.quantize_into`, of affine modes.
        adapter: ``merge`` or ``keep``.
        keep: Parts of the names of modules that are not quantized.
    """
    folder = resolve(source)
    plan, updates = plan_with_adapter(folder, is_adapter(folder) and adapter == "merge")
    bits: dict[str, dict[Quantization, int]] = {}
    stored: dict[str, int] = {}
    dtypes: dict[str, mx.Dtype] = {}
    for mode in modes:
        jobs = plan_jobs(plan, updates, mode, group_size if is_affine(mode) else 0, keep)
        for job in jobs:
            path, q = job.tensor.name.removesuffix(".weight"), job.action.quantization
            stored[path] = 8 * sum(output.nbytes for output in job.outputs)
            if q is not None and not job.action.requantized:
                bits.setdefault(path, {})[q] = stored[path]
                dtypes[path] = MLX_TYPES[job.action.dtype or job.tensor.dtype]
    fixed = sum(size for path, size in stored.items() if path not in bits)
    parameters = sum(row.parameters for row in tensor_rows(plan, jobs, ()))
    return PrecisionOptions(bits, fixed, parameters, dtypes)
