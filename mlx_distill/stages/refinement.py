"""What the quantize stage does with rows: the mode of each module, refined weights, whether they are kept.

The candidates and the gate that they have to pass are in :mod:`mlx_distill.stages.refined_candidates`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.stages.context import Context, Facts, check_stop
from mlx_distill.stages.refined_candidates import best_candidate
from mlx_distill.stages.student_chats import count_chats, student_chats
from mlx_distill.storage import scratch
from mlx_distill.text import counted, duration, size

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_distill.distill.quantization_error import QuantizationError, ReferenceOutputs
    from mlx_distill.distill.sensitivity import Sensitivity, SensitivityPlan
    from mlx_distill.distill.teacher import TokenizedAnswer
    from mlx_distill.models.mixed_precision import PrecisionOptions
    from mlx_distill.models.quantization import Quantization
    from mlx_distill.models.refined import Refined

SENSITIVITY_ROWS = 24
_UNIFORM_ROWS = 4  # of the table of sensitivity where no mode is chosen by it
_KEPT_SHARE = 0.2  # of the training rows, held out where there are no validation rows


@dataclass(frozen=True)
class Refinement:
    """What the writer needs, and what the manifest and the report say.

    Attributes:
        quantizations: Of each module, where they are chosen one by one.
        refined: The quantized tensors of each module; None rounds.
        facts: For the manifest.
    """

    quantizations: Mapping[str, Quantization] | None = None
    refined: Mapping[str, Refined] | None = None
    facts: Facts = field(default_factory=dict)


@dataclass
class Bench:
    """The unquantized student and the rows that quantized ones are measured on.

    Attributes:
        model: The student, its adapter merged.
        calibration: Rows to fit to.
        held_out: Rows to measure on, and what they are.
        reference: The unquantized student's outputs on them.
        dequantize: Measure with dequantized weights.
    """

    context: Context
    model: Any
    calibration: Sequence[TokenizedAnswer]
    held_out: Sequence[TokenizedAnswer]
    held_out_from: str
    labels: Any
    reference: ReferenceOutputs
    reference_seconds: float
    dequantize: bool
    dtypes: Mapping[str, mx.Dtype]

    def error(
        self, quantizations: Mapping[str, Quantization], refined: Mapping[str, Refined] | None = None
    ) -> QuantizationError:
        """The distance of the student with these modules quantized, by rounding where nothing is refined."""
        from mlx_distill.distill.quantization_error import quantization_error
        from mlx_distill.models.quantized_modules import quantized_layer, replaced_layers, rounded_parts

        modules, layers = dict(self.model.named_modules()), {}
        for path, q in quantizations.items():
            parts = refined[path].parts if refined else rounded_parts(modules[path], q, self.dtypes[path])
            layers[path] = quantized_layer(modules[path], q, parts, dequantize=self.dequantize)
        with replaced_layers(self.model, layers):
            return quantization_error(self.reference, self.model, self.held_out, labels=self.labels)

    def sensitivity(
        self,
        rows: Sequence[TokenizedAnswer],
        table: Mapping[str, Sequence[Quantization]],
        plan: SensitivityPlan,
    ) -> Sensitivity:
        """The divergence of the student on some rows with each module alone quantized."""
        from mlx_distill.distill.sensitivity import measure_sensitivity

        return measure_sensitivity(
            self.model,
            rows,
            table,
            plan,
            dtypes=self.dtypes,
            dequantize=self.dequantize,
            progress=self.context.progress,
            check=partial(check_stop, self.context),
        )


def refine_student(context: Context, folder: Path) -> Refinement:
    """Choose the modes and the weights of the quantized student with rows, as the recipe says.

    Args:
        context: Of the run.
        folder: Of the stage; its scratch folder keeps what is finished.

    Raises:
        ConfigError: a budget of bits that cannot be met.
        Interrupted: stopped on request.
    """
    from mlx_distill.models.config_files import is_adapter
    from mlx_distill.models.mixed_precision import modes_to_choose_from, precision_options

    settings, student = context.recipe.quantize, context.run / "student"
    if settings.refine == "none" and not settings.bits_per_weight:
        return Refinement()
    if settings.adapter == "keep" and is_adapter(student):
        context.progress.note(
            "quantize: rounded without rows, since the adapter is kept beside the quantized base "
            "(quantize.adapter: merge refines)"
        )
        return Refinement()
    bench = _open_bench(context, folder)
    if bench is None:
        context.progress.note("quantize: rounded without rows, since there are too few to refine with")
        return Refinement()
    plan = (student, settings.group_size, settings.adapter, settings.keep)
    family = precision_options(plan[0], modes_to_choose_from(settings.mode), *plan[1:])
    uniform = precision_options(plan[0], [settings.mode], *plan[1:])
    bench.dtypes = {**family.dtypes, **uniform.dtypes}
    quantizations = {path: next(iter(options)) for path, options in uniform.bits.items()}
    _note_estimate(bench, quantizations)
    facts: Facts = {"held_out": {"rows": len(bench.held_out), "from": bench.held_out_from}}
    if settings.bits_per_weight:
        quantizations, chosen = _choose(bench, family)
        facts |= chosen
    else:
        facts |= _uniform_sensitivity(bench, quantizations)
    facts |= _curve(bench, family, "" if settings.bits_per_weight else settings.mode)
    refined, told = best_candidate(bench, folder, quantizations)
    bits = uniform.bits_per_weight(quantizations) if not settings.bits_per_weight else None
    facts |= {**told, "bits_per_weight": bits or facts["chosen_bits_per_weight"]}
    return Refinement(quantizations, refined, {"refinement": facts})


def _open_bench(context: Context, folder: Path) -> Bench | None:
    from mlx_distill.distill.quantization_error import reference_outputs, tokenized_answers
    from mlx_distill.infer.label_scoring import find_label_trie
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.models.merged import load_merged
    from mlx_distill.models.modules import dequantize_model

    recipe, student = context.recipe, context.run / "student"
    tokenizer = load_tokenizer(student)
    labels = find_label_trie(tokenizer, context.task)

    def tokenized(rows: Sequence[dict[str, Any]]) -> list[TokenizedAnswer]:
        return tokenized_answers(tokenizer, rows, context.task, labels, max_length=recipe.distill.max_length)

    fit, measure, source = _choose_rows(context, recipe.quantize.refine_rows)
    calibration, held_out = tokenized(fit), tokenized(measure)
    if not calibration or not held_out:
        return None

    model, _ = load_merged(student, dtype=recipe.compute_dtype or "bfloat16")
    if recipe.dequantize:
        dequantize_model(model, recipe.compute_dtype or "bfloat16")
    began = time.perf_counter()
    reference = reference_outputs(model, held_out, labels=labels, folder=scratch(folder) / "reference")
    seconds = time.perf_counter() - began
    return Bench(
        context,
        model,
        calibration,
        held_out,
        source,
        labels,
        reference,
        seconds,
        recipe.dequantize,
        {},
    )


def _note_estimate(bench: Bench, quantizations: Mapping[str, Quantization]) -> None:
    """Say what the refinement will take; the device's rate is that of the pass over the held-out rows."""
    from mlx_distill.distill.refine_estimate import estimate_refine
    from mlx_distill.distill.refine_training import RefineSettings
    from mlx_distill.models.calibrate_estimate import estimate_calibration

    settings, progress = bench.context.recipe.quantize, bench.context.progress
    lengths, held_out = ([len(row.tokens) for row in rows] for rows in (bench.calibration, bench.held_out))
    found = estimate_calibration(
        bench.model, quantizations, sum(lengths), latents=settings.refine == "distill"
    )
    rate = sum(held_out) * found.token_flops / bench.reference_seconds
    progress.note(
        f"quantize: {counted(len(quantizations), 'module')}, {found.weights / 1e6:,.1f} million weights; "
        f"{counted(len(lengths), 'row')} of {sum(lengths):,} tokens to fit to, {len(held_out)} "
        f"{bench.held_out_from} to measure on"
    )
    if settings.refine != "none":
        took = duration(found.seconds(rate))
        progress.note(f"quantize: calibrate: about {took}, memory about {size(found.peak_bytes)}")
    if settings.refine == "distill":
        training = estimate_refine(bench.model, quantizations, lengths, RefineSettings().batch_size)
        took = duration(training.seconds(settings.refine_steps, rate))
        for line in (f"about {took}", *training.lines(settings.refine_steps)):
            progress.note(f"quantize: distill: {line}")


def _choose_rows(context: Context, count: int) -> tuple[list[Any], list[Any], str]:
    """Rows to fit to and rows to measure on: at equal distances of the training rows, and of the validation
    rows; without those, of a part of the training rows that is not fitted to.
    """
    total, valid = count_chats(context, "train"), count_chats(context, "valid")
    if valid:
        fit = _spread(student_chats(context, "train"), total, count)
        return fit, _spread(student_chats(context, "valid"), valid, count), "validation rows"
    held_out = int(total * _KEPT_SHARE)
    rows = list(student_chats(context, "train")) if total < 4 * count else None
    if rows is None:
        rows = _spread(student_chats(context, "train"), total, 2 * count)
        held_out = count
    fit, measure = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    return _spread(iter(fit), len(fit), count), measure[:count], "training rows that nothing was fitted to"


def _spread(rows: Iterator[Any], total: int, count: int) -> list[Any]:
    """``count`` of ``total`` rows, at equal distances."""
    if total <= count:
        return list(rows)
    wanted = {i * total // count for i in range(count)}
    return [row for number, row in enumerate(rows) if number in wanted]


def _choose(bench: Bench, options: PrecisionOptions) -> tuple[dict[str, Quantization], Facts]:
    """The modes that meet the size budget with the least loss."""
    from mlx_distill.distill.sensitivity import plan_sensitivity
    from mlx_distill.models.mixed_precision import choose_precision

    context, settings = bench.context, bench.context.recipe.quantize
    rows = bench.calibration[:SENSITIVITY_ROWS]
    table = {path: list(some) for path, some in options.bits.items()}
    plan = plan_sensitivity(bench.model, rows, table)
    context.progress.note(f"quantize: sensitivity of {len(table)} modules: {plan.text}")
    measured = bench.sensitivity(rows, table, plan)
    choice = choose_precision(options, measured.kl, settings.bits_per_weight)
    counts = Counter(mode_name(q) for q in choice.quantizations.values())
    modes = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    context.progress.note(f"quantize: {choice.bits_per_weight:.3f} bits a weight: {modes}")
    facts = {
        "sensitivity": sensitivity_facts(measured),
        "chosen": {path: mode_name(q) for path, q in choice.quantizations.items()},
        "chosen_bits_per_weight": choice.bits_per_weight,
    }
    return dict(choice.quantizations), facts


def _uniform_sensitivity(bench: Bench, quantizations: Mapping[str, Quantization]) -> Facts:
    """The table of sensitivity at one quantization of each module, where it takes little time."""
    from mlx_distill.distill.sensitivity import MAX_PRODUCTS_ALL, plan_sensitivity

    rows, table = bench.calibration[:_UNIFORM_ROWS], {path: [q] for path, q in quantizations.items()}
    plan = plan_sensitivity(bench.model, rows, table)
    if plan.products > MAX_PRODUCTS_ALL:
        return {}
    measured = bench.sensitivity(rows, table, plan)
    return {"sensitivity": sensitivity_facts(measured)}


def sensitivity_facts(measured: Sensitivity) -> Facts:
    """A table of sensitivity for the manifest: nats a token by module and mode."""
    modules = {
        path: {mode_name(q): round(kl, 9) for q, kl in some.items()} for path, some in measured.kl.items()
    }
    return {"rows": measured.rows, "every_mode_measured": measured.every, "kl": modules}


def _curve(bench: Bench, options: PrecisionOptions, around: str) -> Facts:
    """The divergence of the student with each mode of a family everywhere, by rounding, where that takes
    little time; of a mode ``around`` and its neighbours alone, where the student has one mode.
    """
    from mlx_distill.distill.sensitivity import MAX_PRODUCTS_ALL, count_weights

    by_mode: dict[str, dict[str, Quantization]] = {}
    for path, some in options.bits.items():
        for q in some:
            by_mode.setdefault(mode_name(q), {})[path] = q
    complete = {name: chosen for name, chosen in by_mode.items() if len(chosen) == len(options.bits)}
    order = sorted(complete, key=lambda name: options.bits_per_weight(complete[name]))
    if around in order:  # the mode itself and its neighbours
        at = order.index(around)
        complete = {name: complete[name] for name in order[max(at - 1, 0) : at + 2]}
    tokens = sum(len(answer.tokens) for answer in bench.held_out)
    if len(complete) * tokens * count_weights(bench.model) > MAX_PRODUCTS_ALL:
        return {}
    points = []
    with bench.context.progress.task("quantize: curve", total=len(complete), unit="mode") as bar:
        for number, (name, chosen) in enumerate(complete.items(), 1):
            check_stop(bench.context)
            error = bench.error(chosen)
            bits = options.bits_per_weight(chosen)
            points.append({"mode": name, "bits_per_weight": bits, **error.to_dict()})
            bar.update(number)
    return {"curve": sorted(points, key=lambda point: point["bits_per_weight"])}


def mode_name(quantization: Quantization) -> str:
    """The name of a quantization's mode in recipes.

    >>> from mlx_distill.models.quantization import parse_mode
    >>> mode_name(parse_mode("affine4")), mode_name(parse_mode("mxfp4"))
    ('affine4', 'mxfp4')
    """
    q = quantization
    return f"affine{q.bits}" if q.mode == "affine" else q.mode
