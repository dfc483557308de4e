"""Refinement of quantized weights by training, beside rounding, calibration and mlx_lm.quant.dwq.

    python benchmarks/refine_bench.py                                 # tiny-qwen3, all modes, three seeds
    python benchmarks/refine_bench.py --model tiny-gpt-oss --modes mxfp4 nvfp4 affine4
    python benchmarks/refine_bench.py --modes affine4 --methods dwq   # rates on seed 0, the best on all seeds

Each method gets the same 200 training rows (50 steps of 4) after the same 128 calibration rows; a seed
changes both. Measured is the KL divergence from the unquantized model on held-out songs, in thousandths of
a nat a token, over all tokens and over those of the answers, and the rows whose most probable label changes.
Results are added to benchmarks/results/refine.json one by one, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from quantization_setup import MODES, SEEDS, TRAINING_ROWS, Setup, setup

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "refine.json"
METHODS = ("rtn", "search", "calibrate", "distill", "blocks")
DWQ_RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4)
STEPS, BATCH = 50, 4
_TRAINING_SEED = 40  # added to the seed of the calibration rows: the training rows are others


@dataclass
class Case:
    """One model in one mode with the rows of one seed; what its methods share is computed once."""

    setup: Setup
    mode: str
    seed: int
    model: Any = None
    quantizations: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """The unquantized model and the quantization of each of its layers."""
        self.model = self.setup.load()
        self.quantizations = quantizations(self.model, self.mode)

    def calibrated(self) -> dict[str, Any]:
        """Weighted scales and GPTQ, of 128 rows; an embedding that is not the head is rounded."""
        from mlx_distill.distill.refine_training import started
        from mlx_distill.models.calibrate import calibrate

        if not self.start:
            rows = [row.tokens for row in self.setup.calibration(self.seed)]
            found = dict(calibrate(self.model, rows, self.quantizations))
            modules = dict(self.model.named_modules())
            self.start = {
                path: started(modules[path], found.get(path), q) for path, q in self.quantizations.items()
            }
        return self.start

    def training(self) -> list[Any]:
        """The tokens of the training rows."""
        rows = self.setup.calibration(_TRAINING_SEED + self.seed, TRAINING_ROWS)
        return [list(row.tokens) for row in rows]


def quantizations(model: Any, mode: str) -> dict[str, Any]:
    """Of every linear layer, embedding and stack of experts that is not quantized yet, but the routers."""
    from mlx_distill.models.architectures.registry import module_names
    from mlx_distill.models.modules import matrix_shape
    from mlx_distill.models.quantization import AFFINE_GROUP_SIZES, parse_mode

    routers, out = module_names(model).routers, {}
    for path, module in model.named_modules():
        if "weight" not in module or module.weight.ndim < 2 or "scales" in module:
            continue
        if not path.endswith(tuple(f".{name}" for name in routers)):
            columns = matrix_shape(module)[1]
            sizes = [size for size in AFFINE_GROUP_SIZES if size <= 64 and columns % size == 0]
            out[path] = parse_mode(mode, sizes[0] if mode.startswith("affine") else 0)
    return out


def rtn(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rounding to nearest by mx.quantize, of the weights in bfloat16."""
    import mlx.core as mx

    modules, out = dict(case.model.named_modules()), {}
    for path, q in case.quantizations.items():
        weight = modules[path].weight.astype(mx.bfloat16)
        arrays = mx.quantize(weight, q.group_size, q.bits, mode=q.mode)
        out[path] = dict(zip(("weight", "scales", "biases"), arrays, strict=False))
    return out, {}


def search(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights rounded to nearest on the scales of calibration."""
    from mlx_distill.models.grids import pack, stored_scales

    modules = dict(case.model.named_modules())
    out = {
        path: pack(modules[path].weight, stored_scales(case.calibrated()[path].parts, q), q)
        for path, q in case.quantizations.items()
    }
    return out, {}


def calibrated(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weighted scales and GPTQ."""
    return {path: part.parts for path, part in case.calibrated().items()}, {}


def refined(case: Case, memory_bytes: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training end to end, or with one byte of memory block by block."""
    from mlx_distill.distill.refine import refine
    from mlx_distill.distill.refine_blocks import FACTS
    from mlx_distill.distill.refine_training import RefineSettings

    settings = RefineSettings(steps=STEPS, batch_size=BATCH, memory_bytes=memory_bytes)
    with tempfile.TemporaryDirectory() as folder:
        out = refine(
            case.model,
            case.quantizations,
            case.calibrated(),
            case.training(),
            folder=Path(folder),
            settings=settings,
        )
        facts = json.loads((Path(folder) / FACTS).read_text())
    return {path: part.parts for path, part in out.items()}, facts


def dwq(case: Case, rate: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """mlx_lm.quant.dwq.dwq_quantize, from rounding to nearest, with its own temperature and optimizer."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_unflatten
    from mlx_lm.quant.dwq import dwq_quantize

    from mlx_distill.runtime import peak_memory, reset_peak_memory

    reference, model = case.model, case.setup.load()
    modules, layers = dict(model.named_modules()), []
    for path, parts in rtn(case)[0].items():
        q = case.quantizations[path]
        layer = modules[path].to_quantized(q.group_size, q.bits, mode=q.mode)
        for name, array in parts.items():
            layer[name] = array.astype(mx.float32) if name != "weight" else array
        layers.append((path, layer))
    model.freeze()
    model.update_modules(tree_unflatten(layers))
    rows = [(row, 0) for row in case.training()]
    reset_peak_memory()
    began = time.perf_counter()
    dwq_quantize(
        model,
        lambda batch, index, split: reference(batch),
        optim.Adam(learning_rate=rate, bias_correction=True),
        rows,
        rows[:BATCH],
        BATCH,
        1024,
        case.seed,
        dtype=mx.float32,
    )
    modules = dict(model.named_modules())
    out = {
        path: {
            "weight": modules[path].weight,
            "scales": modules[path].scales.astype(mx.bfloat16),
            "biases": modules[path].biases.astype(mx.bfloat16),
        }
        for path in case.quantizations
    }
    return out, {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()}


Method = Callable[[Case], tuple[Mapping[str, Any], Mapping[str, Any]]]


def method_of(name: str) -> Method:
    """A method by its name."""
    plain: dict[str, Method] = {"rtn": rtn, "search": search, "calibrate": calibrated, "distill": refined}
    if name in plain:
        return plain[name]
    if name == "blocks":
        return lambda case: refined(case, 1)
    return lambda case: dwq(case, float(name.removeprefix("dwq ")))


def measure(case: Case, parts: Mapping[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    """The error of a model with these quantized tensors on both sets of held-out rows."""
    from mlx.utils import tree_unflatten

    from mlx_distill.distill.quantization_error import quantization_error, reference_outputs
    from mlx_distill.models.quantized_modules import quantized_layer

    model, layers, out = case.setup.load(), [], {}
    modules = dict(model.named_modules())
    for path, part in parts.items():
        q = case.quantizations[path]
        layers.append((path, quantized_layer(modules[path], q, part, dequantize=True)))
    model.update_modules(tree_unflatten(layers))
    for which in ("unseen", "seen"):
        answers = case.setup.held_out(which)
        if which not in references:
            references[which] = reference_outputs(case.model, answers, labels=case.setup.labels)
        error = quantization_error(references[which], model, answers, labels=case.setup.labels)
        out[which] = {
            "kl": 1000 * error.kl,
            "answer_kl": 1000 * error.answer_kl,
            "flips": error.flips,
            "rows": error.rows,
        }
    return out


def main() -> None:
    """Measure what is not in the results yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    made = setup(options.model)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    results |= {"versions": versions(), "settings": {"steps": STEPS, "batch_size": BATCH}}
    references: dict[str, Any] = {}
    for mode in options.modes:
        for seed in options.seeds:
            case = Case(made, mode, seed)
            for name in expanded(options.methods, results, made.name, seed):
                key = {"model": made.name, "mode": mode, "seed": seed, "method": name}
                if any(key.items() <= run.items() for run in results["runs"]):
                    continue
                if case.model is None:
                    case.load()
                began = time.process_time()
                parts, facts = method_of(name)(case)
                facts = {**facts, "cpu_seconds": time.process_time() - began}
                run = {**key, **measure(case, parts, references), "facts": facts}
                results["runs"].append(run)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                shown = "  ".join(f"{w} {run[w]['kl']:.2f}" for w in ("unseen", "seen"))
                print(made.name, mode, seed, name, shown, flush=True)
    print("\n".join(table(results["runs"])))


def expanded(methods: list[str], results: Mapping[str, Any], model: str, seed: int) -> list[str]:
    """``dwq`` is every rate on the first seed, and on the others the rate that was best there."""
    out = [name for name in methods if name != "dwq"]
    if "dwq" in methods and seed == SEEDS[0]:
        out += [f"dwq {rate:g}" for rate in DWQ_RATES]
    elif "dwq" in methods:
        tried = [r for r in results["runs"] if r["method"].startswith("dwq") and r["seed"] == SEEDS[0]]
        out.append(min(tried, key=lambda run: run["unseen"]["kl"])["method"])
    return out


def table(runs: list[Mapping[str, Any]]) -> list[str]:
    """The means over the seeds, and how much less than rounding to nearest."""
    lines = [
        "| model | mode | method | seeds | KL unseen | less | KL seen | less | answers unseen | answers seen "
        "| flips unseen | flips seen | s a step | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["mode"], run["method"]), []).append(run)
    for (model, mode, method), found in sorted(groups.items()):

        def of(which: str, what: str, found: list[Mapping[str, Any]] = found) -> float:
            return mean(run[which][what] for run in found)

        plain = groups.get((model, mode, "rtn"), found)
        cells = []
        for which in ("unseen", "seen"):
            kl = of(which, "kl")
            cells += [f"{kl:.2f}", f"{1 - kl / of(which, 'kl', plain):.0%}"]
        for what, digits in (("answer_kl", 2), ("flips", 1)):
            cells += [f"{of(which, what):.{digits}f}" for which in ("unseen", "seen")]
        seconds = [run["facts"]["seconds"] / STEPS for run in found if "seconds" in run["facts"]]
        peaks = [run["facts"]["peak_memory_bytes"] / 1e6 for run in found if "seconds" in run["facts"]]
        cells += [f"{mean(seconds):.2f}", f"{mean(peaks):.0f}"] if seconds else ["", ""]
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
    main()
