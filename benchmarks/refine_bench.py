"""Quantized students: the divergence from the unquantized one and the labels flipped, by mode and method.

    python benchmarks/refine_bench.py                                   # tiny-qwen3, all modes, three seeds
    python benchmarks/refine_bench.py --models tiny-gpt-oss --modes mxfp4 nvfp4 affine4
    python benchmarks/refine_bench.py --models tiny-qwen3-outliers --methods rtn calibrate
    python benchmarks/refine_bench.py --modes affine4 affine5 nvfp4 --methods data-free mixed
    python benchmarks/refine_bench.py --modes affine4 --methods dwq     # rates on seed 0, the best on others

Models and rows are those of quantization_setup.py. The methods:

- ``rtn`` is mx.quantize, ``data-free`` what quantizing without rows writes; neither depends on a seed;
- ``weighted`` and ``calibrate`` are activation-weighted scales without and with error feedback, of 128 rows;
- ``distill`` and ``blocks`` train from there on 200 other rows (50 steps of 4), end to end or block by block;
- ``dwq R`` is mlx_lm.quant.dwq on the same training rows and steps at the rate R;
- ``mixed`` chooses the mode of each module so that the model is at most as large as with the mode everywhere,
  by sensitivities on 24 calibration rows, and rounds; ``mixed+calibrate`` calibrates that choice.

Measured is the KL divergence from the unquantized model on held-out songs, in thousandths of a nat a token,
over all tokens and over those of the answers, and the rows whose most probable label changes. Peak memory is
that of MLX's allocator. Results are added to benchmarks/results/refine.json one by one, so that an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quantization_setup import MODELS, MODES, SEEDS, TRAINING_ROWS, Setup, setup

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "refine.json"
WITHOUT_ROWS = ("rtn", "data-free")
METHODS = (
    "rtn",
    "data-free",
    "weighted",
    "calibrate",
    "distill",
    "blocks",
    "dwq",
    "mixed",
    "mixed+calibrate",
)
DEFAULT_METHODS = ("rtn", "calibrate", "distill")
SETS = ("unseen", "seen")
DWQ_RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4)
STEPS, BATCH = 50, 4
SENSITIVITY_ROWS = 24
_TRAINING_SEED = 40  # added to the seed of the calibration rows: the training rows are others


class Lab:
    """One of the models with its held-out rows, which all cells are measured on."""

    def __init__(self, made: Setup) -> None:
        from mlx_distill.distill.quantization_error import reference_outputs

        self.setup, self.model = made, made.load()
        self.rows = {which: made.held_out(which) for which in SETS}
        self.reference = {
            which: reference_outputs(self.model, rows, labels=made.labels)
            for which, rows in self.rows.items()
        }

    def options(self, *modes: str) -> Any:
        """The quantizations that each module may get."""
        from mlx_distill.models.mixed_precision import precision_options

        return precision_options(self.setup.folder, modes)

    def measure(self, quantizations: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
        """The errors of the model with these tensors, on both sets of rows."""
        from mlx_distill.distill.quantization_error import quantization_error
        from mlx_distill.models.quantized_modules import quantized_layer, replaced_layers

        modules, out = dict(self.model.named_modules()), {}
        layers = {
            path: quantized_layer(modules[path], q, parts[path], dequantize=True)
            for path, q in quantizations.items()
        }
        with replaced_layers(self.model, layers):
            for which, rows in self.rows.items():
                error = quantization_error(self.reference[which], self.model, rows, labels=self.setup.labels)
                kl = {"kl": 1000 * error.kl, "answer_kl": 1000 * error.answer_kl}
                out[which] = {**kl, "flips": error.flips, "rows": error.rows}
        return out


@dataclass
class Case:
    """One model in one mode with the rows of one seed; what its methods share is computed once."""

    lab: Lab
    mode: str
    seed: int
    quantizations: dict[str, Any] = field(init=False)
    start: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = self.lab.options(self.mode)
        self.quantizations = {path: next(iter(some)) for path, some in self.options.bits.items()}

    def calibrated(self) -> dict[str, Any]:
        """Weighted scales and GPTQ, which training begins with."""
        if not self.start:
            self.start = self.fitted(self.quantizations)
        return self.start

    def weighted(self) -> dict[str, Any]:
        """Weighted scales alone, which offsets of affine modes begin with."""
        is_affine = any(q.mode == "affine" for q in self.quantizations.values())
        return self.fitted(self.quantizations, feedback=False) if is_affine else {}

    def fitted(self, quantizations: Mapping[str, Any], feedback: bool = True) -> dict[str, Any]:
        """The refined modules of a calibration; an embedding that is not the head is rounded."""
        from mlx_distill.distill.refine_training import started
        from mlx_distill.models.calibrate import calibrate
        from mlx_distill.models.rounding import Rounding

        rows = [row.tokens for row in self.lab.setup.calibration(self.seed)]
        rounding = Rounding(feedback=feedback)
        found = dict(calibrate(self.lab.model, rows, quantizations, rounding=rounding))
        modules = dict(self.lab.model.named_modules())
        return {path: started(modules[path], found.get(path), q) for path, q in quantizations.items()}

    def training(self) -> list[Any]:
        """The tokens of the training rows."""
        rows = self.lab.setup.calibration(_TRAINING_SEED + self.seed, TRAINING_ROWS)
        return [list(row.tokens) for row in rows]

    def mixed(self) -> dict[str, Any]:
        """The quantizations of the choice that is at most as large as the mode everywhere."""
        from mlx_distill.distill.sensitivity import measure_sensitivity
        from mlx_distill.models.mixed_precision import choose_precision, modes_to_choose_from

        family = self.lab.options(*modes_to_choose_from(self.mode))
        rows = self.lab.setup.calibration(self.seed, SENSITIVITY_ROWS)
        table = {path: list(some) for path, some in family.bits.items()}
        found = measure_sensitivity(self.lab.model, rows, table, dequantize=True)
        budget = self.options.bits_per_weight(self.quantizations)
        self.options = family  # which knows the sizes of all that may be chosen
        return dict(choose_precision(family, found.kl, budget).quantizations)


Parts = dict[str, Mapping[str, Any]]  # the tensors of each module


def rtn(case: Case) -> Parts:
    """Rounding to nearest by mx.quantize, of the weights in bfloat16."""
    import mlx.core as mx

    modules, out = dict(case.lab.model.named_modules()), {}
    for path, q in case.quantizations.items():
        arrays = mx.quantize(modules[path].weight.astype(mx.bfloat16), q.group_size, q.bits, mode=q.mode)
        out[path] = dict(zip(("weight", "scales", "biases"), arrays, strict=False))
    return out


def rounded(case: Case, quantizations: Mapping[str, Any]) -> Parts:
    """What quantizing without rows writes."""
    import mlx.core as mx

    from mlx_distill.models.quantized_modules import rounded_parts

    modules = dict(case.lab.model.named_modules())
    return {path: rounded_parts(modules[path], q, mx.bfloat16) for path, q in quantizations.items()}


def refined(case: Case, memory_bytes: int = 0) -> tuple[Parts, dict[str, Any]]:
    """Training end to end, or with one byte of memory block by block."""
    from mlx_distill.distill.refine import RefineJob, RefineSettings, refine
    from mlx_distill.distill.refine_blocks import FACTS

    settings = RefineSettings(steps=STEPS, batch_size=BATCH, memory_bytes=memory_bytes)
    with tempfile.TemporaryDirectory() as folder:
        out = refine(
            RefineJob(
                case.lab.setup.load(),
                case.quantizations,
                case.calibrated(),
                case.training(),
                folder=Path(folder),
                settings=settings,
                weighted=case.weighted(),
            )
        )
        facts = json.loads((Path(folder) / FACTS).read_text())
    return {path: part.parts for path, part in out.items()}, facts


def dwq(case: Case, rate: float) -> tuple[Parts, dict[str, Any]]:
    """mlx_lm.quant.dwq.dwq_quantize, from rounding to nearest, with its own temperature and optimizer."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_unflatten
    from mlx_lm.quant.dwq import dwq_quantize

    from mlx_distill.runtime import peak_memory

    model = case.lab.setup.load()
    modules, layers = dict(model.named_modules()), []
    for path, parts in rtn(case).items():
        q = case.quantizations[path]
        layer = modules[path].to_quantized(q.group_size, q.bits, mode=q.mode)
        for name, array in parts.items():
            layer[name] = array.astype(mx.float32) if name != "weight" else array
        layers.append((path, layer))
    model.freeze()
    model.update_modules(tree_unflatten(layers))
    rows = [(row, 0) for row in case.training()]
    began = time.perf_counter()
    dwq_quantize(
        model,
        lambda batch, index, split: case.lab.model(batch),
        optim.Adam(learning_rate=rate, bias_correction=True),
        rows,
        rows[:BATCH],
        BATCH,
        1024,
        case.seed,
        dtype=mx.float32,
    )
    modules = dict(model.named_modules())
    out: Parts = {
        path: {
            "weight": modules[path].weight,
            "scales": modules[path].scales.astype(mx.bfloat16),
            "biases": modules[path].biases.astype(mx.bfloat16),
        }
        for path in case.quantizations
    }
    return out, {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()}


def tensors(case: Case, method: str) -> tuple[Mapping[str, Any], Parts, dict[str, Any]]:
    """The quantization and the tensors of each module by a method; of training its seconds and memory."""

    def fitted(quantizations: Mapping[str, Any], feedback: bool = True) -> Parts:
        return {path: one.parts for path, one in case.fitted(quantizations, feedback).items()}

    own = case.quantizations
    if method == "rtn":
        return own, rtn(case), {}
    if method == "data-free":
        return own, rounded(case, own), {}
    if method == "weighted":
        return own, fitted(own, feedback=False), {}
    if method == "calibrate":
        return own, {path: one.parts for path, one in case.calibrated().items()}, {}
    if method.startswith("mixed"):
        chosen = case.mixed()
        return chosen, fitted(chosen) if method.endswith("calibrate") else rounded(case, chosen), {}
    if method.startswith("dwq"):
        return own, *dwq(case, float(method.removeprefix("dwq ")))
    return own, *refined(case, 1 if method == "blocks" else 0)


def cell(case: Case, method: str) -> dict[str, Any]:
    """What a method gives, and what it costs; training does not count the calibration before it."""
    import mlx.core as mx

    from mlx_distill.runtime import peak_memory, reset_peak_memory

    if method in ("distill", "blocks"):
        case.calibrated()
    reset_peak_memory()
    began = time.process_time()
    quantizations, parts, training = tensors(case, method)
    mx.eval(list(parts.values()))
    facts = {
        "cpu_seconds": time.process_time() - began,
        "peak_memory_bytes": peak_memory(),
        "bits_per_weight": case.options.bits_per_weight(quantizations),
        **training,
    }
    return {**case.lab.measure(quantizations, parts), "facts": facts}


def main() -> None:
    """Measure what is not in the results yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS[:1], choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    results |= {"versions": versions(), "settings": {"steps": STEPS, "batch_size": BATCH}}
    for name in options.models:
        lab = None
        for key in missing(options, name, results):
            lab = lab or Lab(setup(name))
            case = _case(lab, key["mode"], key["seed"])
            run = {**key, **cell(case, key["method"])}
            results["runs"].append(run)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            shown = "  ".join(f"{which} {run[which]['kl']:.2f}" for which in SETS)
            print(*key.values(), shown, flush=True)
    print("\n".join(table(results["runs"])))


_cases: dict[tuple[str, str, int], Case] = {}


def _case(lab: Lab, mode: str, seed: int) -> Case:
    """The latest case is kept: its calibration is what training begins with."""
    key = (lab.setup.name, mode, seed)
    if key not in _cases:
        _cases.clear()
        _cases[key] = Case(lab, mode, seed)
    return _cases[key]


def missing(options: argparse.Namespace, model: str, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells of a model that are asked for and not measured; without rows there is one seed."""
    for mode in options.modes:
        for seed in options.seeds:
            for method in expanded(options.methods, results, model, seed):
                key = {"model": model, "mode": mode, "seed": seed, "method": method}
                if method in WITHOUT_ROWS and seed != SEEDS[0]:
                    continue
                if not any(key.items() <= run.items() for run in results["runs"]):
                    yield key


def expanded(methods: list[str], results: Mapping[str, Any], model: str, seed: int) -> list[str]:
    """``dwq`` is every rate on the first seed, and on the others the rate that was best there."""
    out = [name for name in methods if name != "dwq"]
    if "dwq" in methods and seed == SEEDS[0]:
        out += [f"dwq {rate:g}" for rate in DWQ_RATES]
    elif "dwq" in methods:
        tried = [
            run
            for run in results["runs"]
            if run["method"].startswith("dwq") and (run["model"], run["seed"]) == (model, SEEDS[0])
        ]
        out.append(min(tried, key=lambda run: run["unseen"]["kl"])["method"])
    return out


def table(runs: list[Mapping[str, Any]]) -> list[str]:
    """Means and standard deviations over the seeds, and how much less than rounding to nearest."""
    lines = [
        "| model | mode | method | seeds | bits a weight | KL unseen | less | KL seen | less "
        "| answers unseen | answers seen | flips unseen | flips seen | CPU s | s a step | peak MB |",
        "|" + "---|" * 16,
    ]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["mode"], run["method"]), []).append(run)
    for (model, mode, method), found in sorted(groups.items()):

        def of(which: str, what: str, found: list[Mapping[str, Any]] = found) -> list[float]:
            return [run[which][what] for run in found if what in run[which]]

        plain = groups.get((model, mode, "rtn"), groups.get((model, mode, "data-free"), found))
        bits = of("facts", "bits_per_weight")
        cells = [f"{mean(bits):.3f}" if bits else ""]
        for which in SETS:
            kl = of(which, "kl")
            spread = f" ± {stdev(kl):.2f}" if len(kl) > 1 else ""
            cells += [f"{mean(kl):.2f}{spread}", f"{1 - mean(kl) / mean(of(which, 'kl', plain)):.0%}"]
        for what, digits in (("answer_kl", 2), ("flips", 1)):
            cells += [f"{mean(of(which, what)):.{digits}f}" for which in SETS]
        cpu, seconds, peaks = (of("facts", name) for name in ("cpu_seconds", "seconds", "peak_memory_bytes"))
        cells += [f"{mean(cpu):.1f}", f"{mean(seconds) / STEPS:.2f}" if seconds else ""]
        cells.append(f"{mean(peaks) / 1e6:.0f}" if peaks else "")
        lines.append(f"| {model} | {mode} | {method} | {len(found)} | {' | '.join(cells)} |")
    return lines


def versions() -> dict[str, Any]:
    """Of the packages, the machine and the commit."""
    from mlx_distill.runtime import machine
    from mlx_distill.runtime import versions as packages

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {**packages(), "machine": machine(), "cores": os.cpu_count(), "system": platform.machine()} | {
        "commit": commit.stdout.strip()
    }


if __name__ == "__main__":
    from mlx_distill.runtime import load_blas

    load_blas()
    main()
