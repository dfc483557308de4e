"""What a teacher's probabilities are worth: ways of distilling on tasks whose exact probabilities are known.

    python benchmarks/distill_bench.py --quick            # one suite, three seeds, about 12 minutes of CPU
    python benchmarks/distill_bench.py --seeds 5          # every suite
    python benchmarks/distill_bench.py --tune --table --suites fields      # every token-level loss
    python benchmarks/distill_bench.py --tune --suites label --rate 1e-3   # other seeds and songs, kept apart

A suite is one setting: the task, the student's base, rows and steps. Methods are those of
``distill_setup.py``. Rates and weights were chosen on seeds 200 and 201 and songs of seed 30 (``--tune``);
what is reported is seeds from 100 on and songs of seed 31. A killed run goes on: each student is kept.
``--jobs`` trains several students at a time, one thread of BLAS each. The
exit code is 1 where a floor fails, which is a regression alarm and not a claim, and 4 where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from distill_setup import (
    HELD_OUT_ROWS,
    HELD_OUT_SEED,
    METHODS,
    OTHER_TABLE,
    SAME_TABLE,
    TUNING_SEED,
    Lab,
    load_arrays,
    save_arrays,
)

from mlx_distill.errors import Interrupted
from mlx_distill.metrics.known_probabilities import (
    attainable_accuracy,
    divergences,
    exact_calibration_error,
    expected_accuracy,
)
from mlx_distill.runtime import load_blas

RESULTS = ROOT / "benchmarks" / "results" / "distill.json"
FOLDER = Path(tempfile.gettempdir()) / "mlx-distill-bench"
SEEDS, TUNING_SEEDS = (100, 101, 102, 103, 104), (200, 201)
RESAMPLES = 2000


@dataclass(frozen=True)
class Suite:
    """A setting: form, student's base, rows, steps, learning rate, and the methods that are compared."""

    form: str
    base: str
    rows: int
    steps: int
    rate: float
    methods: tuple[str, ...]
    reference: tuple[str, ...]  # the methods that the others are compared with: the fair controls first
    table: tuple[str, ...] = ()  # the methods of --table, besides


SUITES = {
    "label": Suite(
        "label",
        "gpt-oss",
        200,
        60,
        3e-3,
        ("labels", "text", "label", "labels_hard", "teacher_hard"),
        ("labels_hard", "teacher_hard", "labels", "text"),
        (
            "default_greedy",
            "label7_groups10_sampled1",
            "default_groups1_sampled1",
            "default_groups3_sampled1",
            "default_groups10_sampled1",
            "label_sampled1",
            "text10_sampled1",
            "groups10_sampled1",
        ),
    ),
    "few_rows": Suite(
        "label",
        "gpt-oss",
        100,
        120,
        3e-3,
        ("label", "labels_hard", "teacher_hard"),
        ("labels_hard", "teacher_hard"),
    ),
    "fields": Suite(
        "fields",
        "gpt-oss",
        200,
        120,
        6e-3,
        ("labels", "text10_sampled", "groups10_sampled"),
        ("text10_sampled", "labels"),
        (
            *OTHER_TABLE,
            "text10_sampled1",
            "groups3_sampled1",
            "groups10_sampled1",
            "groups10_sampled2",
            "groups_mid10_sampled1",
            "groups30_sampled1",
            "default_greedy",
            "label7_groups10_sampled1",
            "default_groups1_sampled1",
            "default_groups3_sampled1",
            "default_groups10_sampled1",
        ),
    ),
    "same_tokenizer": Suite(
        "fields",
        "qwen",
        200,
        60,
        6e-3,
        ("labels", "label_sampled", "kl10_sampled"),
        ("labels", "label_sampled"),
        (
            *SAME_TABLE,
            "kl10_sampled1",
            "kl30_sampled1",
            "default_greedy",
            "label7_groups10_sampled1",
            "default_groups1_sampled1",
            "default_groups3_sampled1",
            "default_groups10_sampled1",
        ),
    ),
}
# suite, method, figure, how, other, limit: "ratio" of the means, "difference" of the means, or "value".
FLOORS: tuple[tuple[str, str, str, str, str, float], ...] = (
    ("label", "label", "agree", "difference >=", "labels", 0.08),
    ("label", "label", "agree", "difference >=", "text", 0.06),
    ("label", "label", "agree", "difference >=", "labels_hard", -0.03),
    ("label", "label", "agree", "difference >=", "teacher_hard", -0.03),
    ("label", "label", "kl_teacher", "ratio <=", "labels", 0.75),
    ("label", "label", "kl_teacher", "ratio <=", "labels_hard", 0.90),
    ("label", "label", "kl_teacher", "ratio <=", "teacher_hard", 0.85),
    ("label", "label", "kl_true", "ratio <=", "labels_hard", 0.90),
    ("label", "label", "kl_true", "ratio <=", "teacher_hard", 0.90),
    ("few_rows", "label", "kl_teacher", "ratio <=", "labels_hard", 0.5),
    ("few_rows", "label", "kl_teacher", "ratio <=", "teacher_hard", 0.5),
    ("few_rows", "label", "calibration", "ratio <=", "labels_hard", 0.5),
    ("few_rows", "label", "calibration", "ratio <=", "teacher_hard", 0.5),
    ("fields", "groups10_sampled", "fields", "ratio <=", "text10_sampled", 0.87),
    ("fields", "groups10_sampled", "fields", "ratio <=", "labels", 0.68),
    ("fields", "groups10_sampled", "fields", "value <=", "", 1.30),
    ("fields", "groups10_sampled", "agree", "difference >=", "text10_sampled", -0.03),
    ("fields", "groups10_sampled", "valid", "value >=", "", 95.0),
    ("same_tokenizer", "kl10_sampled", "fields", "ratio <=", "labels", 0.90),
    ("fields", "teacher", "kl_true", "value <=", "", 0.40),
)
COLUMNS = {
    "label": ("agree", "kl_teacher", "bayes_agree", "kl_true", "expected_accuracy", "calibration"),
    "fields": ("agree", "fields", "kl_true", "excess", "rest", "valid"),
}


class Key(NamedTuple):
    """Which student: suite, method, seed and learning rate."""

    suite: str
    method: str
    seed: int
    rate: float


def row_figures(form: str, model: Mapping[str, Any], held_out: Any) -> dict[str, np.ndarray]:
    """The figures of a model that have a value a held-out song."""
    teacher, exact = held_out.teacher, held_out.exact
    verdict = model["verdict"]
    out = {"agree": np.equal(verdict.argmax(1), teacher["verdict"].argmax(1)).astype(float)}
    known = {name: np.pad(p, ((0, 0), (0, model[name].shape[1] - p.shape[1]))) for name, p in exact.items()}
    of_teacher = {name: divergences(teacher[name], model[name]) for name in exact}
    out["kl_true"] = np.nansum([divergences(p, model[name]) for name, p in known.items()], axis=0)
    if form == "label":
        p = exact["verdict"]
        out |= {"kl_teacher": of_teacher["verdict"], "expected_accuracy": expected_accuracy(p, verdict)}
        out["bayes_agree"] = np.equal(verdict.argmax(1), p.argmax(1)).astype(float)
        return out
    out["fields"] = np.nansum(list(of_teacher.values()), axis=0)
    out |= {f"kl {name}": values for name, values in of_teacher.items()}
    out["excess"] = teacher["logprobs"] - model["logprobs"]
    out["rest"] = np.nanmean([model[name][:, -1] for name in exact], axis=0)
    return out


def figures(form: str, model: Mapping[str, Any], held_out: Any) -> dict[str, float]:
    """The figures of a model over all held-out songs."""
    out = {name: float(np.nanmean(values)) for name, values in row_figures(form, model, held_out).items()}
    if form == "label":
        out["calibration"] = exact_calibration_error(held_out.exact["verdict"], model["verdict"])
    return {name: round(value, 5) for name, value in out.items()}


def interval(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean paired difference, seeds and songs drawn anew."""
    difference = np.array(first) - np.array(second)
    seeds, songs = difference.shape
    rng = np.random.default_rng(0)
    means = [
        np.nanmean(difference[rng.integers(0, seeds, seeds)][:, rng.integers(0, songs, songs)])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


_LABS: dict[str, Lab] = {}  # of a process that trains students


def _student(
    key: Key, folder: Path, held_out: Mapping[str, tuple[int, int]]
) -> tuple[Key, dict[str, Any], dict[str, np.ndarray]]:
    load_blas()
    s = SUITES[key.suite]
    if s.form not in _LABS:
        _LABS[s.form] = Lab(s.form, folder, held_out[s.form])
    facts, arrays = _LABS[s.form].student(
        METHODS[key.method], key.seed, rows=s.rows, steps=s.steps, base=s.base, rate=key.rate
    )
    return key, facts, arrays


def _students(
    keys: Sequence[Key], folder: Path, held_out: Mapping[str, tuple[int, int]], jobs: int
) -> Iterator[tuple[Key, dict[str, Any], dict[str, np.ndarray]]]:
    """Students as they become ready."""
    if jobs == 1:
        yield from (_student(key, folder, held_out) for key in keys)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_student, key, folder, held_out) for key in keys]
        try:
            yield from (future.result() for future in as_completed(waiting))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Runs:
    """The students of a results file: what is measured, and the distributions of each."""

    def __init__(self, path: Path, folder: Path, tune: bool) -> None:
        self.path, self.folder, self.tune = path, folder, tune
        self.results = json.loads(path.read_text()) if path.is_file() else {"runs": [], "teachers": {}}
        self.labs: dict[str, Lab] = {}

    def lab(self, form: str) -> Lab:
        """The lab of a form; its teacher is recorded."""
        if form not in self.labs:
            seed = TUNING_SEED if self.tune else HELD_OUT_SEED
            self.labs[form] = lab = Lab(form, self.folder, (seed, HELD_OUT_ROWS[form]))
            exact = lab.held_out.exact["verdict"]
            self.results["teachers"][form] = {
                "rows": lab.teacher_rows,
                "attainable_accuracy": round(float(attainable_accuracy(exact).mean()), 4),
                **figures(form, lab.held_out.teacher, lab.held_out),
            }
            self.save()
        return self.labs[form]

    def arrays(self, run: Mapping[str, Any]) -> Path:
        """The file with a student's distributions."""
        return self.folder / f"{'-'.join(str(run[key]) for key in Key._fields)}.npz"

    def missing(self, wanted: Sequence[Key]) -> list[Key]:
        """Those of some students that are not there."""
        return [
            key
            for key in wanted
            if not self.arrays(key._asdict()).is_file()
            or not any(key._asdict().items() <= run.items() for run in self.results["runs"])
        ]

    def measure(self, wanted: Sequence[Key], jobs: int = 1) -> None:
        """Train and read the students that are not there yet, several at a time."""
        missing, started = self.missing(wanted), time.monotonic()
        held_out = {}
        for form in {SUITES[key.suite].form for key in missing}:
            held_out[form] = (self.lab(form).held_out_seed, self.lab(form).held_out_rows)
            for base in {SUITES[key.suite].base for key in missing}:
                self.lab(form).fresh(base)  # converts it, before several processes ask for it
        for done, (key, facts, arrays) in enumerate(_students(missing, self.folder, held_out, jobs), 1):
            save_arrays(self.arrays(key._asdict()), arrays)
            form = SUITES[key.suite].form
            run = {**key._asdict(), **figures(form, arrays, self.lab(form).held_out), **facts}
            others = [r for r in self.results["runs"] if not key._asdict().items() <= r.items()]
            self.results["runs"] = [*others, run]
            self.save()
            shown = "  ".join(f"{name} {run[name]:.3f}" for name in COLUMNS[form])
            left = (time.monotonic() - started) / done * (len(missing) - done)
            print(
                f"{key.suite} {key.method} {key.seed}: {shown}  {facts['train_cpu']:.0f} s CPU; "
                f"{done} of {len(missing)}, about {left / 60:.1f} min left",
                flush=True,
            )

    def save(self) -> None:
        """Write the results."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.results["versions"] = versions()
        text = json.dumps(self.results, indent=1) + "\n"
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.rename(self.path)

    def of(self, suite: str, method: str) -> dict[int, dict[str, Any]]:
        """The students of a method by seed, at the suite's learning rate."""
        at = {"suite": suite, "method": method, "rate": SUITES[suite].rate}
        return {run["seed"]: run for run in self.results["runs"] if at.items() <= run.items()}

    def compare(self, suite: str, method: str, other: str, figure: str) -> dict[str, Any] | None:
        """The mean paired difference of two methods over their common seeds, with its interval."""
        first, second = self.of(suite, method), self.of(suite, other)
        seeds = sorted(first.keys() & second.keys())
        lab = self.lab(SUITES[suite].form)
        if not seeds:
            return None
        rows = [
            [
                row_figures(lab.form, load_arrays(self.arrays(runs[seed])), lab.held_out)[figure]
                for seed in seeds
            ]
            for runs in (first, second)
        ]
        low, high = interval(*rows)
        per_seed = [float(np.nanmean(a - b)) for a, b in zip(*rows, strict=True)]
        mean = float(np.mean(per_seed))
        return {
            "suite": suite,
            "method": method,
            "other": other,
            "figure": figure,
            "seeds": seeds,
            "difference": mean,
            "low": low,
            "high": high,
            "nearest_seed": min(per_seed, key=abs),
        }


def tables(runs: Runs, suites: Sequence[str]) -> Iterator[str]:
    """Means and standard deviations by method, and differences from the controls with intervals."""
    for suite in suites:
        s = SUITES[suite]
        columns = COLUMNS[s.form]
        teacher = runs.results["teachers"][s.form]
        yield f"\n{suite}: {s.rows} rows, {s.steps} steps, {s.base}; teacher {teacher}"
        yield "| method | seeds | " + " | ".join(columns) + " |"
        yield "|" + "---|" * (len(columns) + 2)
        for method in METHODS:
            if found := list(runs.of(suite, method).values()):
                cells = [_cell([run[name] for run in found]) for name in columns]
                yield f"| {method} | {len(found)} | " + " | ".join(cells) + " |"
        yield "| difference | of | mean | 95 % over songs and seeds | seed nearest to 0 |"
        yield "|" + "---|" * 5
        for c in comparisons(runs, suite):
            numbers = (
                f"{c['difference']:+.3f} | {c['low']:+.3f} to {c['high']:+.3f} | {c['nearest_seed']:+.3f}"
            )
            yield f"| {c['method']} - {c['other']} | {c['figure']} | {numbers} |"


def _cell(values: Sequence[float]) -> str:
    spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def comparisons(runs: Runs, suite: str) -> list[dict[str, Any]]:
    """Every method of a suite against its controls."""
    s = SUITES[suite]
    names = ("agree", "kl_teacher", "kl_true") if s.form == "label" else ("agree", "fields", "kl_true")
    found = [
        runs.compare(suite, method, other, figure)
        for method in METHODS
        if method not in s.reference and runs.of(suite, method)
        for other in dict.fromkeys((*s.reference, *_control(method)))
        for figure in names
    ]
    return [c for c in found if c is not None]


def _control(method: str) -> list[str]:
    """Hard tokens at the weight of a method of a table."""
    weight = re.search(r"(\d+)_sampled$", method)
    if weight is None or method not in OTHER_TABLE | SAME_TABLE or method.startswith("text"):
        return []
    return [f"text{weight[1]}_sampled"]


def check_floors(runs: Runs, suites: Sequence[str]) -> list[dict[str, Any]]:
    """The floors of some suites, each with its value and whether it holds; those without students are left
    out.
    """
    out = []
    for suite, method, figure, how, other, limit in FLOORS:
        if suite not in suites:
            continue
        if method == "teacher":
            value = runs.results["teachers"][SUITES[suite].form][figure]
        else:
            first, second = runs.of(suite, method), runs.of(suite, other) if other else {}
            seeds = first.keys() & second.keys() if other else first.keys()
            if not seeds:
                continue
            value = float(np.mean([first[seed][figure] for seed in seeds]))
            base = float(np.mean([second[seed][figure] for seed in seeds])) if other else 0.0
            value = value / base if how.startswith("ratio") else value - base
        holds = value <= limit if how.endswith("<=") else value >= limit
        names = {"suite": suite, "method": method, "figure": figure, "how": how, "other": other}
        out.append({**names, "limit": limit, "value": round(value, 4), "holds": bool(holds)})
    return out


def versions() -> dict[str, Any]:
    """Of the packages, the machine and the commit."""
    from mlx_distill.runtime import machine
    from mlx_distill.runtime import versions as packages

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {"machine": machine(), "cores": os.cpu_count(), "system": platform.machine()}
    return {**packages(), **facts, "commit": commit.stdout.strip()}


def _methods(suite: str, table: bool) -> list[str]:
    s = SUITES[suite]
    return list(dict.fromkeys([*s.methods, *(s.table if table else ())]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet, print the tables, and check the floors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the suite label with three seeds")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those of each suite")
    parser.add_argument("--seeds", type=int, default=3, help="how many of the reported seeds, up to 5")
    parser.add_argument("--tune", action="store_true", help="seeds and songs that nothing is reported of")
    parser.add_argument("--rate", type=float, help="another learning rate, with --tune")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where teachers and students are kept")
    parser.add_argument("--output", type=Path, help="the results file")
    parser.add_argument("--table", action="store_true", help="also the methods of the suite's table")
    parser.add_argument("--jobs", type=int, default=1, help="students at a time")
    options = parser.parse_args(arguments)
    if options.rate and not options.tune:
        parser.error("--rate is chosen with --tune, so that what is reported was not chosen by itself")
    suites = ["label"] if options.quick else options.suites
    folder = options.folder / ("tuning" if options.tune else "reported")
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.output or (folder / "tuning.json" if options.tune else RESULTS), folder, options.tune)
    seeds = TUNING_SEEDS if options.tune else SEEDS[: 3 if options.quick else options.seeds]
    wanted = [
        Key(suite, method, seed, options.rate or SUITES[suite].rate)
        for suite in suites
        for seed in seeds
        for method in options.methods or _methods(suite, options.table)
    ]
    try:
        runs.measure(wanted, options.jobs)
    except Interrupted as error:
        print(error)
        return 4
    for suite in suites:
        runs.lab(SUITES[suite].form)
    print("\n".join(tables(runs, suites)))
    kept = [c for c in runs.results.get("comparisons", []) if c["suite"] not in suites]
    runs.results["comparisons"] = kept + [c for suite in suites for c in comparisons(runs, suite)]
    floors = check_floors(runs, suites)
    runs.results["floors"] = [f for f in runs.results.get("floors", []) if f["suite"] not in suites] + floors
    runs.save()
    for floor in floors:
        limit = f"{floor['how']} {floor['other']} {floor['limit']}"
        verdict = "holds" if floor["holds"] else "FAILS"
        print(f"{verdict}  {floor['suite']} {floor['method']} {floor['figure']} {limit}: {floor['value']}")
    return 0 if all(floor["holds"] for floor in floors) or options.tune else 1


if __name__ == "__main__":
    load_blas()
    sys.exit(main())
