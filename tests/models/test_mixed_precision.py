"""The choice of a quantization for each module, and folders with several of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load_model
from mlx_distill.models.mixed_precision import (
    PrecisionOptions,
    choose_precision,
    modes_to_choose_from,
    precision_options,
)
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.quantize import quantize_into

SMALL, MIDDLE, LARGE = (Quantization("affine", bits, 64) for bits in (3, 4, 8))


EVERY = (SMALL, MIDDLE, LARGE)
Table = dict[str, dict[Quantization, float]]


def make_options(modules: int, seed: int = 0) -> tuple[PrecisionOptions, Table]:
    random = np.random.default_rng(seed)
    weights = random.integers(1, 5, size=modules) * 64
    bits = {f"m{i}": {q: int(w * q.bits) for q in EVERY} for i, w in enumerate(weights)}
    scale = random.lognormal(size=modules)
    costs = {f"m{i}": {q: float(s * 4.0**-q.bits) for q in EVERY} for i, s in enumerate(scale)}
    return PrecisionOptions(bits, 640, int(weights.sum()) + 20), costs


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [3.6, 4.5, 6.0])
def test_the_choice_is_the_best_one_of_all_that_meet_the_budget(seed: int, budget: float) -> None:
    options, costs = make_options(5, seed)
    least = options.bits_per_weight(dict.fromkeys(options.bits, SMALL))
    budget += max(0.0, least - 3.5)
    choice = choose_precision(options, costs, budget)
    assert choice.bits_per_weight == options.bits_per_weight(choice.quantizations) <= budget
    assert choice.cost == pytest.approx(sum(costs[p][q] for p, q in choice.quantizations.items()))
    every = [dict(zip(options.bits, some, strict=True)) for some in itertools.product(EVERY, repeat=5)]

    def best(limit: float) -> float:
        fitting = (one for one in every if options.bits_per_weight(one) <= limit)
        return min(sum(costs[p][q] for p, q in one.items()) for one in fitting)

    # Sizes are rounded up to a part of the budget.
    assert best(budget) * (1 - 1e-9) <= choice.cost <= best(budget - 0.01) * (1 + 1e-9)


def test_more_bits_never_cost_more() -> None:
    options, costs = make_options(6)
    choices = [choose_precision(options, costs, budget / 4) for budget in range(16, 36)]
    for before, after in itertools.pairwise(choices):
        assert after.bits_per_weight >= before.bits_per_weight and after.cost <= before.cost
    assert choices[-1].cost < choices[0].cost / 100


def test_a_budget_that_nothing_meets_names_the_least_possible_one() -> None:
    options, costs = make_options(3)
    least = options.bits_per_weight(dict.fromkeys(options.bits, SMALL))
    with pytest.raises(ConfigError, match=f"{least:.3f}") as caught:
        choose_precision(options, costs, 3.0)
    budget = float(str(caught.value.fix).rpartition(" ")[2])
    assert choose_precision(options, costs, budget).bits_per_weight <= budget


def test_bits_that_save_nothing_are_not_spent() -> None:
    options, costs = make_options(4)
    flat = {path: dict.fromkeys(some, 1.0) for path, some in costs.items()}
    choice = choose_precision(options, flat, 9.0)
    assert set(choice.quantizations.values()) == {SMALL}


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss_mxfp4"])
def test_a_mixed_folder_has_the_planned_size_and_is_read_by_mlx_lm(
    name: str, golden: Any, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as load_with_mlx_lm

    convert(golden(name), tmp_path / "base")
    options = precision_options(tmp_path / "base", modes_to_choose_from("affine4"))
    assert options.bits and not any("experts" in path for path in options.bits if "mxfp4" in name)
    costs = {
        path: {q: (number % 3 + 1) * 4.0**-q.bits for q in some}
        for number, (path, some) in enumerate(options.bits.items())
    }
    smallest = {path: min(some, key=lambda q: q.bits) for path, some in options.bits.items()}
    choice = choose_precision(options, costs, options.bits_per_weight(smallest) + 0.5)
    assert len(set(choice.quantizations.values())) > 1
    report = quantize_into(tmp_path / "base", tmp_path / "mixed", "affine4", chosen=choice.quantizations)
    assert report.bits_per_weight == pytest.approx(choice.bits_per_weight, rel=1e-9)
    ours, _ = load_model(tmp_path / "mixed", dtype="float32")
    modules = dict(ours.named_modules())
    for path, q in choice.quantizations.items():
        module = modules[path]
        assert Quantization(module.mode, module.bits, module.group_size) == q
    written = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization"]
    assert any(isinstance(entry, dict) for entry in written.values())
    theirs, _ = load_with_mlx_lm(tmp_path / "mixed")
    theirs.set_dtype(mx.float32)
    first = mx.array([[5]])  # where differences of rope do not show
    np.testing.assert_allclose(np.array(ours(first)), np.array(theirs(first)), rtol=1e-5, atol=1e-5)
