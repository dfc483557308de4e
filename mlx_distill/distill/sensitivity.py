"""How much a model suffers from the quantization of each of its weights, measured one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

from mlx_distill.distill.quantization_error import ReferenceOutputs, quantization_error, reference_outputs
from mlx_distill.distill.teacher import TokenizedAnswer
from mlx_distill.models.grids import find_scales, round_to_grid
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.quantized_modules import quantized_layer, replaced_layers, rounded_parts
from mlx_distill.progress import NullProgress, Progress

# Products of a weight and a token that are spent: so many for every quantization of every weight; above, one
# quantization of each weight is measured; and above the larger number, on fewer rows. On a machine of 5
# teraflops they are 40 seconds and 13 minutes.
MAX_PRODUCTS_ALL = 10**14
MAX_PRODUCTS = 2 * 10**15
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Sensitivity:
    """The KL divergence in nats a token with one module alone quantized by rounding, for each module and each
    of its quantizations.

    Attributes:
        kl: The divergences.
        rows: Rows that they were measured on.
        every: Whether each was measured; else one of each module was, and the others have it times the ratio
            of the weights' squared errors.
    """

    kl: Mapping[str, Mapping[Quantization, float]]
    rows: int
    every: bool


@dataclass(frozen=True)
class SensitivityPlan:
    """What :func:`measure_sensitivity` will do: on how many rows, with how many forward passes over them, for
    every quantization or for one of each module.
    """

    rows: int
    passes: int
    every: bool
    products: int

    @property
    def text(self) -> str:
        """For people."""
        how = "every quantization" if self.every else "one quantization each, the others computed from it"
        return f"{self.passes} passes over {self.rows} rows ({how}), {2 * self.products / 1e12:,.1f} teraflop"


def plan_sensitivity(
    model: Any,
    answers: Sequence[TokenizedAnswer],
    quantizations: Mapping[str, Sequence[Quantization]],
    *,
    most_for_all: int = MAX_PRODUCTS_ALL,
    most: int = MAX_PRODUCTS,
) -> SensitivityPlan:
    """The passes that a measurement takes, within bounds of the products of a weight and a token.

    Args:
        model: The unquantized model.
        answers: Rows; the first ones are used.
        quantizations: Of each module.
        most_for_all: Bound up to which every quantization is measured.
        most: Bound up to which all rows are used for one quantization of each module.
    """
    parameters = count_weights(model)
    tokens, everything = [len(answer.tokens) for answer in answers], sum(map(len, quantizations.values()))
    products = everything * sum(tokens) * parameters
    if products <= most_for_all:
        return SensitivityPlan(len(answers), everything, True, products)
    rows, passes = len(answers), len(quantizations)
    while rows > _LEAST_ROWS and passes * sum(tokens[:rows]) * parameters > most:
        rows -= 1
    return SensitivityPlan(rows, passes, False, passes * sum(tokens[:rows]) * parameters)


def count_weights(model: Any) -> int:
    """The weights of a model, of quantized layers those that they encode."""
    return sum(
        prod(module.weight.shape) * 32 // getattr(module, "bits", 32)
        for _, module in model.named_modules()
        if "weight" in module
    )


def measure_sensitivity(
    model: Any,
    answers: Sequence[TokenizedAnswer],
    quantizations: Mapping[str, Sequence[Quantization]],
    plan: SensitivityPlan | None = None,
    *,
    dtypes: Mapping[str, mx.Dtype] | None = None,
    dequantize: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """KL(model || the model with one module quantized), for each module and each of its quantizations.

    Weights are rounded with the best scales for them, without rows. Where only one quantization of a module
    is measured, another one has its divergence times the ratio of the squared errors of the weights, since
    the divergence grows with the square of a small error.

    Args:
        model: The unquantized model; it is as before at the end.
        answers: Rendered rows.
        quantizations: Of each module; the first is the one that is measured where only one is.
        plan: From :func:`plan_sensitivity`; None for its result.
        dtypes: The stored type of each module's weight (of its scales in the affine modes); bfloat16 where it
            is not named.
        dequantize: Measure with dequantized weights: the same up to rounding, and faster on a CPU.
        batch_size: Rows a forward pass.
        progress: Shows the passes.
        check: Called before each pass; may raise.
    """
    plan = plan or plan_sensitivity(model, answers, quantizations)
    answers, dtypes = answers[: plan.rows], dtypes or {}
    reference = reference_outputs(model, answers, batch_size=batch_size)
    modules, out = dict(model.named_modules()), {}
    done = 0
    with (progress or NullProgress()).task("sensitivity", total=plan.passes, unit="measurement") as bar:
        for path, options in quantizations.items():
            module, dtype = modules[path], dtypes.get(path, mx.bfloat16)
            kl: dict[Quantization, float] = {}
            for q in options if plan.every else options[:1]:
                check()
                layer = quantized_layer(module, q, rounded_parts(module, q, dtype), dequantize=dequantize)
                kl[q] = _alone(model, path, layer, reference, answers, batch_size)
                done += 1
                bar.update(done, module=path)
            first = options[0]
            if len(kl) < len(options):
                errors = {q: squared_error(module.weight, q, dtype) for q in options}
                kl |= {q: kl[first] * errors[q] / max(errors[first], 1e-30) for q in options if q not in kl}
            out[path] = kl
    return Sensitivity(out, len(answers), plan.every)


def _alone(
    model: Any,
    path: str,
    layer: Any,
    reference: ReferenceOutputs,
    answers: Sequence[TokenizedAnswer],
    batch_size: int,
) -> float:
    with replaced_layers(model, {path: layer}):
        # A divergence of 0 comes out as some 1e-8 of either sign.
        return max(quantization_error(reference, model, answers, batch_size=batch_size).kl, 0.0)


def squared_error(weight: mx.array, quantization: Quantization, dtype: mx.Dtype) -> float:
    """The sum of the squared differences between a weight and its rounded values."""
    total = 0.0
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, (1 << 24) // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].astype(mx.float32)
        scales = find_scales(block, quantization, dtype=dtype)
        total += mx.sum(mx.square(block - round_to_grid(block, scales, quantization))).item()
    return total
