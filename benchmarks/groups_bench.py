"""How often the test of error rates by group is wrong and right, and how well intervals of clustered rates
cover.

    OPENBLAS_NUM_THREADS=1 python benchmarks/groups_bench.py            # minutes on one quiet core
    OPENBLAS_NUM_THREADS=1 python benchmarks/groups_bench.py --draws 200

Seeds are fixed. Results go to benchmarks/results/groups.json.

    equal     eight groups of 50 negatives and 50 positives, both rates 10 %: the share of draws with an alarm
              at 0.05 after Benjamini-Hochberg over the two rates; the mean largest minus smallest rate
    worse     the same with one group's false-positive rate three times the others': the share of draws in
              which groups are found to differ, and in which that group is outside the 99.8 % limits
    clusters  events of a beta-binomial in answers of 1 to 5 claims: the share of draws whose 95 % interval
              holds the rate, of clustered_rate and of the mean with a clustered standard error and t
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from mlx_distill.evaluate.groups import group_errors
from mlx_distill.metrics import clustered_mean, clustered_rate

GROUPS, SIZE, RATE = "abcdefgh", 50, 0.1


def draw(rng: np.random.Generator, factor: float) -> list[dict[str, Any]]:
    """Rows of eight groups; the last one's false-positive rate is ``factor`` times the others'."""
    rows = []
    for name in GROUPS:
        for truth in ("a", "b"):
            rate = RATE * factor if name == GROUPS[-1] and truth == "a" else RATE
            wrong = rng.random(SIZE) < rate
            rows += [
                {
                    "id": f"{name}{truth}{i}",
                    "truth": {"kind": truth},
                    "answer": {},
                    "label": truth if not w else "ba"[truth == "b"],
                    "fields": {"g": name},
                }
                for i, w in enumerate(wrong)
            ]
    return rows


def groups(draws: int, factor: float) -> dict[str, Any]:
    """Alarms of the test over simulated data."""
    rng = np.random.default_rng(0)
    alarms, outside, spreads = 0, 0, []
    for seed in range(draws):
        result = group_errors(draw(rng, factor), "kind", ["b"], "g", permutations=999, seed=seed)
        tests = result["tests"]
        alarms += (
            any(tests[name]["differs"] for name in tests)
            if factor == 1
            else (tests["false_positive_rate"]["differs"])
        )
        rates = [group["false_positive_rate"]["value"] for group in result["groups"].values()]
        spreads.append(max(rates) - min(rates))
        limits = result["groups"][GROUPS[-1]]["limits"]["false_positive_rate"]
        outside += limits["outside"] == "99.8"
    share = alarms / draws
    return {
        "draws": draws,
        "found": share,
        "standard_error": (share * (1 - share) / draws) ** 0.5,
        "outside_99_8": outside / draws,
        "mean_largest_minus_smallest": float(np.mean(spreads)),
    }


def coverage(draws: int, rate: float, correlation: float, clusters: int) -> dict[str, Any]:
    """Coverage of the two intervals of a clustered rate."""
    rng = np.random.default_rng(1)
    held = {"clustered_rate": 0, "clustered_mean": 0}
    spread = (1 - correlation) / correlation if correlation else None
    for _ in range(draws):
        sizes = rng.integers(1, 6, size=clusters)
        own = rng.beta(rate * spread, (1 - rate) * spread, size=clusters) if spread else [rate] * clusters
        events = np.concatenate([rng.random(n) < p for n, p in zip(sizes, own, strict=True)]).tolist()
        numbers = np.repeat(np.arange(clusters), sizes).tolist()
        for function in (clustered_rate, clustered_mean):
            estimate = function(events, numbers)
            low, high = estimate["low"], estimate["high"]
            held[function.__name__] += low is not None and high is not None and low <= rate <= high
    return {
        "rate": rate,
        "correlation": correlation,
        "clusters": clusters,
        "draws": draws,
        **{name: count / draws for name, count in held.items()},
    }


def main() -> None:
    """Run the simulations and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "groups.json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    results: dict[str, Any] = {
        "equal": groups(arguments.draws, 1.0),
        "worse": groups(arguments.draws // 4, 3.0),
        "clusters": [
            coverage(arguments.draws, *setting)
            for setting in [(0.05, 0.2, 60), (0.05, 0.5, 60), (0.1, 0.2, 40), (0.1, 0.5, 40), (0.1, 0.0, 40)]
        ],
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    setting = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit.stdout.strip(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    arguments.out.write_text(
        json.dumps({"setting": setting, "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
