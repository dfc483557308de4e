"""Quantization: divergence from the unquantized model and flipped labels, by mode, method and seed.

    python benchmarks/quantize_bench.py                                  # every cell that is not measured yet
    python benchmarks/quantize_bench.py --models tiny-qwen3 --modes affine4 mxfp4 --seeds 0
    python benchmarks/quantize_bench.py --mixed                          # mixed precision against one mode

Models, rows and seeds are those of benchmarks/quantization_setup.py: the demo's, trained first where they are
not there. ``rtn`` is ``mx.quantize``; ``data-free`` what quantizing without rows writes; ``calibrate`` and
``distill`` are those of ``quantize.refine``, with 128 and 200 rows of another seed each. With ``--outliers``
some channels of tiny-qwen3 have large activations, its function unchanged. Each cell is written to
benchmarks/results/quantize.json when it is measured, so a stopped run goes on.

KL(unquantized || quantized) is in thousandths of a nat a token: over all tokens of 144 songs of unseen
templates and of 96 songs of templates like the calibration's, and over the answers' tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
RESULTS = ROOT / "benchmarks" / "results" / "quantize.json"
METHODS = ("rtn", "data-free", "weighted", "calibrate", "distill")
SETS = ("unseen", "seen")
MIXED_BUDGETS = (3.6, 4.0, 4.3, 4.55, 5.0, 5.55)


class Lab:
    """One of the models with its held-out rows, and quantized copies of it."""

    def __init__(self, name: str, outliers: bool, rows: int) -> None:
        from quantization_setup import put_outliers, setup

        from mlx_distill.distill.quantization_error import reference_outputs
        from mlx_distill.models.modules import dequantize_model

        self.setup, self.outliers = setup(name), outliers

        def load() -> Any:
            model = self.setup.load()
            dequantize_model(model)
            if outliers:
                put_outliers(model)
            return model

        self.load, self.model = load, load()
        self.rows = {which: self.setup.held_out(which)[: rows or None] for which in SETS}
        self.reference = {
            which: reference_outputs(self.model, rows, labels=self.setup.labels)
            for which, rows in self.rows.items()
        }

    def quantizations(self, mode: str) -> dict[str, Any]:
        """Of each module, with one mode."""
        from mlx_distill.models.mixed_precision import precision_options

        options = precision_options(self.setup.folder, [mode])
        return {path: next(iter(some)) for path, some in options.bits.items()}

    def measure(self, quantizations: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
        """The errors of the model with these tensors, on both sets of rows."""
        from mlx_distill.distill.quantization_error import quantization_error
        from mlx_distill.models.quantized_modules import quantized_layer, replaced_layers

        modules = dict(self.model.named_modules())
        layers = {
            path: quantized_layer(modules[path], q, parts[path], dequantize=True)
            for path, q in quantizations.items()
        }
        with replaced_layers(self.model, layers):
            return {
                which: quantization_error(
                    self.reference[which], self.model, rows, labels=self.setup.labels
                ).to_dict()
                for which, rows in self.rows.items()
            }


def cell(lab: Lab, mode: str, method: str, seed: int, refined: dict[Any, Any]) -> dict[str, Any]:
    """Quantize with a method, and measure. ``refined`` keeps the calibration that distill begins with."""
    import mlx.core as mx

    quantizations, began = lab.quantizations(mode), time.perf_counter()
    cpu = time.process_time()
    mx.reset_peak_memory()
    modules = dict(lab.model.named_modules())
    if method == "rtn":
        parts = {}
        for path, q in quantizations.items():
            found = mx.quantize(modules[path].weight.astype(mx.bfloat16), q.group_size, q.bits, mode=q.mode)
            parts[path] = dict(zip(("weight", "scales", "biases"), found, strict=False))
    elif method == "data-free":
        from mlx_distill.models.quantized_modules import rounded_parts

        parts = {path: rounded_parts(modules[path], q, mx.bfloat16) for path, q in quantizations.items()}
    else:
        found = _refined(lab, quantizations, method, seed, refined, mode)
        parts = {path: one.parts for path, one in found.items()}
    mx.eval(list(parts.values()))
    cost = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_mb": mx.get_peak_memory() / 1e6,
    }
    return {**lab.measure(quantizations, parts), **cost}


def _refined(
    lab: Lab, quantizations: Mapping[str, Any], method: str, seed: int, refined: dict[Any, Any], mode: str
) -> dict[str, Any]:
    from quantization_setup import TRAINING_ROWS

    from mlx_distill.distill.refine import RefineSettings, refine
    from mlx_distill.models.calibrate import calibrate

    if method in ("weighted", "calibrate"):
        rows = [row.tokens for row in lab.setup.calibration(seed)]
        found = dict(calibrate(lab.model, rows, quantizations, feedback=method == "calibrate"))
        if method == "calibrate":
            refined[mode, seed] = found
        return with_rounded(lab, quantizations, found)
    start = refined.get((mode, seed)) or _refined(lab, quantizations, "calibrate", seed, refined, mode)
    rows = [row.tokens for row in lab.setup.calibration(seed, TRAINING_ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        settings = RefineSettings(steps=TRAINING_ROWS // 4, batch_size=4, seed=seed)
        return refine(lab.load(), quantizations, start, rows, folder=Path(folder), settings=settings)


def with_rounded(lab: Lab, quantizations: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The refined modules, and rounded ones where calibration has no inputs to measure."""
    import mlx.core as mx

    from mlx_distill.models.quantized_modules import rounded_parts
    from mlx_distill.models.refined import Refined

    modules = dict(lab.model.named_modules())
    for path, q in quantizations.items():
        if path not in found:
            found[path] = Refined(rounded_parts(modules[path], q, mx.bfloat16), modules[path].weight)
    return found


def mixed(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mixed precision by the chooser against one mode everywhere, rounded, by bits a weight."""
    import mlx.core as mx

    from mlx_distill.distill.sensitivity import measure_sensitivity
    from mlx_distill.models.mixed_precision import choose_precision, modes_to_choose_from, precision_options
    from mlx_distill.models.quantized_modules import rounded_parts

    options = precision_options(lab.setup.folder, modes_to_choose_from("affine4"))
    began = time.perf_counter()
    every = {path: list(some) for path, some in options.bits.items()}
    table = measure_sensitivity(lab.model, lab.setup.calibration(0, 24), every, dequantize=True)
    seconds = time.perf_counter() - began
    modules = dict(lab.model.named_modules())

    def measured(quantizations: Mapping[str, Any]) -> dict[str, Any]:
        parts = {p: rounded_parts(modules[p], q, mx.bfloat16) for p, q in quantizations.items()}
        return {
            "bits_per_weight": options.bits_per_weight(quantizations),
            **lab.measure(quantizations, parts),
            "sensitivity_seconds": seconds,
        }

    def chosen(budget: float) -> Mapping[str, Any]:
        return choose_precision(options, table.kl, budget).quantizations

    for bits in sorted({q.bits for some in options.bits.values() for q in some}):
        same = {p: next(q for q in some if q.bits == bits) for p, some in options.bits.items()}
        yield f"affine{bits}", measured(same)
        size = options.bits_per_weight(same)
        if bits in (4, 5):
            yield f"mixed at affine{bits}'s size", measured(chosen(size))
    for budget in MIXED_BUDGETS:
        yield f"mixed {budget}", measured(chosen(budget))


def summary(cells: Mapping[str, Any]) -> list[str]:
    """A line for each model, mode and method: mean and standard deviation over the seeds."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for key, value in cells.items():
        groups.setdefault(tuple(key.split("|")[:-1]), []).append(value)
    lines = []
    for key, values in sorted(groups.items()):
        texts = []
        for which in SETS:
            kl, answers = ([1000 * v[which][name] for v in values] for name in ("kl", "answer_kl"))
            flips = [v[which]["flips"] for v in values]
            spread = f" ± {stdev(kl):.2f}" if len(kl) > 1 else ""
            more = f"(answers {mean(answers):.2f}, flips {mean(flips):.1f})"
            texts.append(f"{which} {mean(kl):.2f}{spread} {more}")
        lines.append(f"{' '.join(key):45} {len(values)}  " + "  ".join(texts))
    return lines


def main() -> None:
    from quantization_setup import MODELS, MODES, SEEDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--rows", type=int, default=0, help="held-out rows of each set; 0: all")
    options = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": {}}
    for name in options.models:
        lab = Lab(name, options.outliers, options.rows)
        title = name + (" with outliers" if options.outliers else "")
        if options.mixed:
            for what, value in mixed(lab):
                _store(stored, f"{title}|{what}|rounded|0", value)
            continue
        for mode in options.modes:
            refined: dict[Any, Any] = {}
            for seed in options.seeds:
                for method in options.methods:
                    own = 0 if method in ("rtn", "data-free") else seed
                    key = f"{title}|{mode}|{method}|{own}"
                    if key not in stored["cells"]:
                        _store(stored, key, cell(lab, mode, method, seed, refined))
    print("\n".join(summary(stored["cells"])))


def _store(stored: dict[str, Any], key: str, value: dict[str, Any]) -> None:
    from mlx_distill.runtime import machine, versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    stored["cells"][key] = value
    stored |= {"machine": machine(), "versions": versions(), "commit": commit.strip()}
    stored["blas_threads"] = os.environ.get("OPENBLAS_NUM_THREADS", "all")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print(key, {which: round(1000 * value[which]["kl"], 2) for which in SETS}, flush=True)


if __name__ == "__main__":
    import mlx_distill.runtime as runtime

    runtime.load_blas()
    main()
