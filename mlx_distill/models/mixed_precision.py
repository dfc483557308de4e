"""Mixed precision: a quantization for each tensor, so that a model meets a size budget at the least loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.errors import ConfigError
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


def modes_to_choose_from(mode: str) -> tuple[str, ...]:
    """The modes of the family that a mode belongs to.

    >>> modes_to_choose_from("mxfp4")
    ('mxfp4', 'nvfp4', 'mxfp8')
    """
    body = MIXED.get(mode, (mode, mode))[0]
    return FAMILIES["affine" if body.startswith("affine") else "floating"]


@dataclass(frozen=True)
class PrecisionOptions:
    """What a choice of quantizations has to know of a model.

    Attributes:
        bits: For each module the stored bits of its weight with each quantization that it may get, scales
            included.
        fixed_bits: Stored bits of everything else.
        parameters: Of the model.
    """

    bits: Mapping[str, Mapping[Quantization, int]]
    fixed_bits: int
    parameters: int

    def bits_per_weight(self, quantizations: Mapping[str, Quantization]) -> float:
        """Of the whole model, with these quantizations."""
        stored = sum(self.bits[path][quantization] for path, quantization in quantizations.items())
        return (self.fixed_bits + stored) / self.parameters


@dataclass(frozen=True)
class PrecisionStep:
    """One step of the choice: a module gets more bits. ``bits_per_weight`` and ``cost`` are those of the
    whole model after it.
    """

    path: str
    quantization: Quantization
    bits_per_weight: float
    cost: float


@dataclass(frozen=True)
class PrecisionChoice:
    """The quantization of each module, with the steps that led there: the first one is where all begin."""

    quantizations: Mapping[str, Quantization]
    steps: tuple[PrecisionStep, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the model for each of its parameters."""
        return self.steps[-1].bits_per_weight

    @property
    def cost(self) -> float:
        """The sum of the costs of all modules."""
        return self.steps[-1].cost


def choose_precision(options: PrecisionOptions, costs: Costs, bits_per_weight: float) -> PrecisionChoice:
    """Choose a quantization for each module, greedily by the cost that a stored bit saves.

    Every module begins with its smallest quantization. Then, again and again, the change of one module with
    the largest ``(cost before - cost after) / (bits after - bits before)`` is made, of those that fit the
    budget and save something. The costs of the modules are added up as if they were independent.

    Args:
        options: Of the model.
        costs: For each module and each of its quantizations.
        bits_per_weight: The budget: stored bits of the whole model (scales, and tensors that are not
            quantized, included) for each of its parameters.

    Raises:
        ConfigError: the smallest quantizations are above the budget, with the least possible one.

    >>> small, large = Quantization("affine", 3, 64), Quantization("affine", 4, 64)
    >>> options = PrecisionOptions({"a": {small: 300, large: 400}, "b": {small: 300, large: 400}}, 0, 200)
    >>> costs = {"a": {small: 0.5, large: 0.4}, "b": {small: 0.9, large: 0.3}}
    >>> choice = choose_precision(options, costs, 3.5)
    >>> choice.quantizations["b"].bits, choice.bits_per_weight, round(choice.cost, 3)
    (4, 3.5, 0.8)
    """
    bits, parameters = options.bits, options.parameters
    chosen = {path: min(sizes, key=lambda q: (sizes[q], costs[path][q])) for path, sizes in bits.items()}
    total = options.fixed_bits + sum(bits[path][q] for path, q in chosen.items())
    cost = sum(costs[path][q] for path, q in chosen.items())
    least, budget = total / parameters, bits_per_weight * parameters
    if total > budget:
        raise ConfigError(
            f"quantize.bits_per_weight: {bits_per_weight:g} is below {least:.3f}, which the model has with "
            "the smallest quantization of every module",
            fix=f"at least {least + 0.005:.2f}",
        )
    steps = [PrecisionStep("", next(iter(chosen.values())), least, cost)] if chosen else []
    while best := _best_change(bits, costs, chosen, budget - total):
        path, q = best
        total += bits[path][q] - bits[path][chosen[path]]
        cost += costs[path][q] - costs[path][chosen[path]]
        chosen[path] = q
        steps.append(PrecisionStep(path, q, total / parameters, cost))
    return PrecisionChoice(chosen, tuple(steps))


def _best_change(
    bits: Mapping[str, Mapping[Quantization, int]],
    costs: Costs,
    chosen: Mapping[str, Quantization],
    room: float,
) -> tuple[str, Quantization] | None:
    """The module and its larger quantization that save the most for each bit, within the room that is left;
    None where nothing fits or saves anything.
    """
    best, best_gain = None, 0.0
    for path, sizes in bits.items():
        now = chosen[path]
        for q, size in sizes.items():
            more = size - sizes[now]
            if 0 < more <= room and (gain := (costs[path][now] - costs[path][q]) / more) > best_gain:
                best, best_gain = (path, q), gain
    return best


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
    for mode in modes:
        jobs = plan_jobs(plan, updates, mode, group_size if mode.startswith("affine") else 0, keep)
        for job in jobs:
            path, q = job.tensor.name.removesuffix(".weight"), job.action.quantization
            stored[path] = 8 * sum(output.nbytes for output in job.outputs)
            if q is not None and not job.action.requantized:
                bits.setdefault(path, {})[q] = stored[path]
    fixed = sum(size for path, size in stored.items() if path not in bits)
    return PrecisionOptions(bits, fixed, sum(row.parameters for row in tensor_rows(plan, jobs, ())))
