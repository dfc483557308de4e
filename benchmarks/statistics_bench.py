"""Error rates, power and coverage of ``mlx_distill.metrics``, by simulation with fixed seeds.

    python benchmarks/statistics_bench.py            # about 5 minutes on one core
    python benchmarks/statistics_bench.py --only groups --only repeats

Each part is a function of a number of draws and a seed, which returns figures; a rate over draws has a
standard error of ``sqrt(p (1 - p) / draws)``. ``tests/metrics/test_simulations.py`` runs short versions of
them. Results go to benchmarks/results/statistics.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.metrics import calibration, consistency, corrected, cross_validation, homogeneity, paired
from mlx_distill.metrics import intervals as iv
from mlx_distill.metrics.clusters import clustered_mean
from mlx_distill.metrics.raters import cohen_kappa, gwet_ac1

ROOT = Path(__file__).parents[1]
MARGIN, DISCORDANCE = 0.03, 0.10


def _holds(estimate: Any, truth: float) -> bool:
    """Whether an interval contains the true value; one without ends claims nothing and does."""
    return estimate["low"] is None or bool(estimate["low"] <= truth <= estimate["high"])


@cache
def _verdict(b: int, c: int, n: int, margin: float | None) -> str:
    low, high = paired.bonett_price(b, c, n)
    return paired.verdict({"value": (b - c) / n, "low": low, "high": high, "n": n}, margin)


def verdicts(draws: int, seed: int = 0) -> dict[str, float]:
    """How often two models that differ on 10 % of the rows get a verdict, by rows and true difference."""
    rng, out = np.random.default_rng(seed), {}
    cases = {"non_inferior_type_1": -MARGIN, "better_type_1": 0.0, "non_inferior_power": 0.0}
    for n in (320, 900):
        for name, difference in cases.items():
            shares = [(DISCORDANCE + difference) / 2, (DISCORDANCE - difference) / 2, 1 - DISCORDANCE]
            margin = None if name.startswith("better") else MARGIN
            good = ("better",) if margin is None else ("better", "non_inferior")
            counts = rng.multinomial(n, shares, size=draws)
            out[f"{name}_n{n}"] = float(
                np.mean([_verdict(int(b), int(c), n, margin) in good for b, c, _ in counts])
            )
    return out


def exact_type_1(draws: int = 0, seed: int = 0) -> dict[str, float]:
    """Without drawing: the verdict's type I error summed over all outcomes, by rows, margin and discordance.

    Where nearly all discordant rows are losses (discordance near the margin) it is largest.
    """
    from scipy.stats import multinomial

    out = {}
    for n in (20, 100, 320, 900):
        top = n if n < 300 else 130
        b, c = (x.ravel() for x in np.meshgrid(np.arange(top + 1), np.arange(top + 1), indexing="ij"))
        kept = b + c <= n
        outcomes = np.stack([b[kept], c[kept], n - b[kept] - c[kept]], axis=1)
        for margin in (None, 0.01, 0.03, 0.05):
            wrong = ("better",) if margin is None else ("better", "non_inferior")
            said = np.array([_verdict(int(x), int(y), n, margin) in wrong for x, y, _ in outcomes])
            d = margin or 0.0
            for psi in (d, d + 0.005, d + 0.02, 0.10, 0.20):
                if psi > 0:
                    shares = [(psi - d) / 2, (psi + d) / 2, 1 - psi]
                    key = f"n{n}_margin{margin or 0:g}_discordance{psi:g}"
                    out[key] = float(multinomial.pmf(outcomes, n, shares)[said].sum())
    return out


def _cluster_rates(rng: np.random.Generator, units: int, correlation: float, mean: float) -> np.ndarray:
    """Beta distributed rates of units whose rows have this correlation."""
    total = 1 / correlation - 1
    return rng.beta(mean * total, (1 - mean) * total, units)


def clusters(draws: int, seed: int = 0) -> dict[str, float]:
    """Coverage of the mean of 5 songs by each of G artists, and errors of paired comparisons of such rows."""
    rng, out = np.random.default_rng(seed), {}
    for count in (10, 20, 60):
        names = np.repeat(np.arange(count), 5)
        held = np.zeros(2)
        for _ in range(draws):
            right = rng.random(5 * count) < np.repeat(_cluster_rates(rng, count, 1 / 3, 0.7), 5)
            by_row = clustered_mean(right, range(5 * count))
            held += [_holds(clustered_mean(right, names.tolist()), 0.7), _holds(by_row, 0.7)]
        out[f"clustered_G{count}"], out[f"naive_G{count}"] = (held / draws).tolist()
    names, wrong = np.repeat(np.arange(60), 5).tolist(), np.zeros(2)
    for _ in range(draws):
        # The models differ on whole artists, in either direction.
        state = np.repeat(rng.choice(4, size=60, p=[0.1, 0.1, 0.6, 0.2]), 5)
        noise = rng.random(300) < 0.1
        first = np.where(noise, rng.random(300) < 0.5, (state == 0) | (state == 2))
        second = np.where(noise, rng.random(300) < 0.5, (state == 1) | (state == 2))
        for i, known in enumerate((names, None)):
            result = paired.compare_paired(first, second, clusters=known)
            wrong[i] += paired.verdict(result["difference"]) == "better"
    out["better_type_1_clustered"], out["better_type_1_naive"] = (wrong / draws).tolist()
    return out


def groups(draws: int, seed: int = 0, permutations: int = 999) -> dict[str, float]:
    """Eight groups of 50 negatives with false positives of 10 %, and one of them three times worse."""
    rng, names = np.random.default_rng(seed), np.repeat(np.arange(8), 50)
    alarms, gaps, outside = np.zeros(2), [], 0
    for i in range(draws):
        equal = rng.random(400) < 0.1
        worse = rng.random(400) < np.where(names == 3, 0.3, 0.1)
        for kind, events in enumerate((equal, worse)):
            test = homogeneity.homogeneity_test(events, names.tolist(), permutations=permutations, seed=i)
            alarms[kind] += test["p_value"] <= 0.05
        rates = np.bincount(names, equal) / 50
        gaps.append(np.ptp(rates))
        low, high = homogeneity.funnel_limits(0.1, 50)
        outside += int(((rates < low) | (rates > high)).sum())
    return {
        "alarm_equal": float(alarms[0] / draws),
        "alarm_one_three_times_worse": float(alarms[1] / draws),
        "mean_largest_difference_equal": float(np.mean(gaps)),
        "outside_95_funnel_equal": outside / (8 * draws),
    }


def folds(draws: int, seed: int = 0) -> dict[str, float]:
    """How often two equally good learners are called different after 3 times 10 folds of 150 rows.

    Each is a least-squares classifier on five of ten equally useful features, the one on the first five and
    the other on the last five.
    """
    rng, n, wrong = np.random.default_rng(seed), 150, np.zeros(2)
    for _ in range(draws):
        y = np.where(rng.random(n) < 0.5, 1.0, -1.0)
        x = rng.normal(size=(n, 10)) + 0.35 * y[:, None]
        differences = []
        for _ in range(3):
            for test in np.array_split(rng.permutation(n), 10):
                train = np.setdiff1d(np.arange(n), test)
                right = []
                for part in (slice(0, 5), slice(5, 10)):
                    a = np.column_stack([np.ones(n), x[:, part]])
                    w = np.linalg.solve(a[train].T @ a[train], a[train].T @ y[train])
                    right.append(float(np.mean(np.sign(a[test] @ w) == y[test])))
                differences.append(right[0] - right[1])
        for i, ratio in enumerate((n / 10 / (n * 0.9), 1e-12)):
            result = cross_validation.nadeau_bengio(differences, test_rows=ratio, train_rows=1)
            wrong[i] += result["p_value"] < 0.05
    return {"false_corrected": float(wrong[0] / draws), "false_naive": float(wrong[1] / draws)}


def repeats(draws: int, seed: int = 0) -> dict[str, float]:
    """Coverage of the rate of 100 items answered five times each."""
    rng, held = np.random.default_rng(seed), np.zeros(2)
    for _ in range(draws):
        right = rng.random((100, 5)) < _cluster_rates(rng, 100, 0.39, 0.7)[:, None]
        averaged = consistency.repeated_rate(right.tolist())
        held += [_holds(averaged, 0.7), _holds(iv.rate(int(right.sum()), 500), 0.7)]
    return {"averaged_by_item": float(held[0] / draws), "as_500_items": float(held[1] / draws)}


def _confident(
    rng: np.random.Generator, n: int, sharpness: float = 1.0, spread: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of four classes and truths drawn from them; a sharpness above 1 is overconfidence."""
    logits = spread * rng.normal(size=(n, 4))
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return np.exp(calibration.scale(sharpness * logits, 1.0)), truth


def reliability(
    draws: int, seed: int = 0, null_draws: int = 400, sizes: Sequence[int] = (100, 300, 1000)
) -> dict[str, float]:
    """ECE of a calibrated model, and how often its and an overconfident one's is above 95 % of the null."""
    rng, out = np.random.default_rng(seed), {}
    for n in sizes:
        errors, alarms, found = [], 0, 0
        for i in range(draws):
            good = calibration.reliability(*_confident(rng, n), draws=null_draws, seed=i)
            bad = calibration.reliability(*_confident(rng, n, 2.0), draws=null_draws, seed=i)
            errors.append(good.ece)
            alarms += good.ece > good.null_high
            found += bad.ece > bad.null_high
        out |= {
            f"ece_calibrated_n{n}": float(np.mean(errors)),
            f"alarm_calibrated_n{n}": alarms / draws,
            f"alarm_overconfident_n{n}": found / draws,
        }
    return out


def auto_decidable(draws: int, seed: int = 0) -> dict[str, float]:
    """What a threshold for 5 % error, chosen on 300 or 1,000 validation rows, does on new rows."""
    rng, out = np.random.default_rng(seed), {}
    fresh = _confident(rng, 50_000, spread=6.0)
    for n in (300, 1000):
        errors, shares = [], []
        for _ in range(draws):
            result = calibration.auto_decidable(*_confident(rng, n, spread=6.0), *fresh)
            shares.append(result.coverage["value"] or 0.0)
            errors.append(result.error["value"] or 0.0)
        out |= {
            f"mean_coverage_n{n}": float(np.mean(shares)),
            f"mean_error_n{n}": float(np.mean(errors)),
            f"share_of_thresholds_above_5_percent_n{n}": float(np.mean(np.array(errors) > 0.05)),
        }
    return out


def checkers(draws: int, seed: int = 0) -> dict[str, float]:
    """Coverage of rates that an imperfect checker (0.9, 0.95) or a biased judge measured."""
    rng, held, raw = np.random.default_rng(seed), np.zeros(2), np.zeros(2)
    for _ in range(draws):
        k = int(rng.binomial(200, 0.08 * 0.9 + 0.92 * 0.05))
        tp, tn = int(rng.binomial(30, 0.9)), int(rng.binomial(70, 0.95))
        rate = corrected.corrected_rate(
            k, 200, true_positives=tp, positives=30, true_negatives=tn, negatives=70
        )
        held[0] += _holds(rate, 0.08)
        raw[0] += _holds(rate["raw"], 0.08)
        truth = rng.random(560) < 0.6
        judged = np.where(rng.random(560) < 0.15, True, truth).astype(float)
        powered = corrected.prediction_powered(judged[60:], judged[:60], truth[:60].astype(float))
        held[1] += _holds(powered, 0.6)
        raw[1] += _holds(iv.rate(int(judged.sum()), 560), 0.6)
    return {
        "corrected_rate": float(held[0] / draws),
        "raw_rate": float(raw[0] / draws),
        "prediction_powered": float(held[1] / draws),
        "judge_alone": float(raw[1] / draws),
    }


def raters(draws: int, seed: int = 0) -> dict[str, float]:
    """Coverage of kappa and AC1 of 100 items rated twice, with two and with skewed labels."""
    rng, out = np.random.default_rng(seed), {}
    tables = {
        "even": np.array([[0.35, 0.05, 0.02], [0.05, 0.25, 0.03], [0.02, 0.03, 0.20]]),
        "skewed": np.array([[0.88, 0.04], [0.04, 0.04]]),
    }
    for name, p in tables.items():
        size = len(p)
        # Of a million items the value is that of the population, to the third decimal.
        pairs = rng.multinomial(1_000_000, p.ravel())
        cells = [divmod(cell, size) for cell in range(size * size)]
        all_pairs = [np.repeat([cell[side] for cell in cells], pairs).tolist() for side in (0, 1)]
        for title, coefficient in (("kappa", cohen_kappa), ("ac1", gwet_ac1)):
            truth = coefficient(*all_pairs)["value"] or 0.0
            held = 0
            for counts in rng.multinomial(100, p.ravel(), size=draws):
                sample = [np.repeat([cell[side] for cell in cells], counts).tolist() for side in (0, 1)]
                held += _holds(coefficient(*sample, categories=range(size)), truth)
            out[f"{title}_{name}"] = held / draws
    return out


def means(draws: int, seed: int = 0) -> dict[str, float]:
    """Coverage of a mean: the t interval and the bootstrap, and of paired differences."""
    rng, out = np.random.default_rng(seed), {}
    shapes: dict[str, tuple[Callable[[int], np.ndarray], float]] = {
        "normal": (lambda n: rng.normal(size=n), 0.0),
        "exponential": (lambda n: rng.exponential(1.0, n), 1.0),
        "mostly_zero": (lambda n: rng.exponential(1.0, n) * (rng.random(n) < 0.2), 0.2),
    }
    for name, (draw, truth) in shapes.items():
        for n in (10, 30, 100, 300):
            held = np.zeros(4)
            for _ in range(draws):
                x, y = draw(n), draw(n)
                low, high = iv.bootstrap_mean(x, resamples=1_000)
                held += [
                    low <= truth <= high,
                    _holds(clustered_mean(x, range(n)), truth),
                    _holds(iv.mean_estimate(x.tolist()), truth) if n < 30 else low <= truth <= high,
                    _holds(paired.compare_means(x, y)["difference"], 0.0),
                ]
            titles = ("bca", "t", "mean_estimate", "compare_means")
            out |= {f"{titles[i]}_{name}_n{n}": float(held[i] / draws) for i in range(4)}
    return out


def seconds(draws: int = 3, seed: int = 0) -> dict[str, float]:
    """Seconds of the fastest of some calls on 10,000 rows."""
    from scipy import stats

    rng = np.random.default_rng(seed)
    x, right = rng.normal(size=10_000), rng.random((2, 10_000)) < 0.9
    names = rng.integers(0, 2_000, 10_000).tolist()

    def scipys() -> None:
        stats.bootstrap((x,), np.mean, n_resamples=10_000, method="BCa", batch=200, rng=0)

    calls = {
        "bootstrap_mean": lambda: iv.bootstrap_mean(x),
        "scipy_bootstrap": scipys,
        "compare_paired": lambda: paired.compare_paired(right[0], right[1]),
        "compare_paired_clusters": lambda: paired.compare_paired(right[0], right[1], clusters=names),
        "compare_means": lambda: paired.compare_means(x, -x),
        "homogeneity_test": lambda: homogeneity.homogeneity_test(right[0], [name % 20 for name in names]),
        "reliability": lambda: calibration.reliability(*_confident(rng, 10_000)),
    }
    out = {}
    for name, call in calls.items():
        best = float("inf")
        for _ in range(draws):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        out[name] = round(best, 4)
    return out


PARTS: dict[str, tuple[Callable[..., dict[str, float]], int]] = {
    "verdicts": (verdicts, 40_000),
    "exact_type_1": (exact_type_1, 1),
    "clusters": (clusters, 3_000),
    "groups": (groups, 2_000),
    "folds": (folds, 1_000),
    "repeats": (repeats, 4_000),
    "reliability": (reliability, 400),
    "auto_decidable": (auto_decidable, 400),
    "checkers": (checkers, 4_000),
    "raters": (raters, 2_000),
    "means": (means, 1_000),
    "seconds": (seconds, 3),
}


def main() -> None:
    from mlx_distill.runtime import load_blas, machine, versions
    from mlx_distill.storage.atomic import write_json

    parser = argparse.ArgumentParser(description="Simulations of the statistics.")
    parser.add_argument("--only", action="append", choices=list(PARTS))
    chosen = parser.parse_args().only or list(PARTS)
    load_blas()
    path = ROOT / "benchmarks" / "results" / "statistics.json"
    results = json.loads(path.read_text())["parts"] if path.is_file() else {}
    for name in chosen:
        function, draws = PARTS[name]
        start = time.perf_counter()
        results[name] = {"draws": draws, **function(draws)}
        print(name, f"{time.perf_counter() - start:.0f} s", json.dumps(results[name], indent=1), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    write_json(
        path, {"machine": machine(), "versions": versions(), "commit": commit, "seed": 0, "parts": results}
    )


if __name__ == "__main__":
    main()
