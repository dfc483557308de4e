"""A short version of ``benchmarks/serve_bench.py``: under load nothing is lost, and order is kept."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark() -> Iterator[Any]:
    path = Path(__file__).parents[2] / "benchmarks" / "serve_bench.py"
    spec = importlib.util.spec_from_file_location("serve_bench", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.mark.slow
def test_under_load_nothing_is_lost_and_everything_is_counted(benchmark: Any) -> None:
    load = benchmark.main(["--short", "--parts", "load"])["load"]
    assert load["lost"] == load["out_of_order"] == 0
    assert load["requests"] > load["clients"] and load["rows"] > load["requests"]  # batches too
    assert load["rows_counted_by_metrics"] == load["rows"]
    assert load["log_lines"] == load["requests"]
    assert load["rows_in_costs"] >= load["rows"]


def test_memory_that_rises_after_the_first_quarter_is_a_shortfall(benchmark: Any) -> None:
    grown = [211.3, 217.2, 226.2, 228.2, 228.6, 229.6, 231.6, 235.4, 237.5, 237.9, 239.1, 241.3]
    warmed_up = [211.3, 220.0, 226.2, 228.2, 224.6, 229.6, 221.6, 228.4, 227.5, 224.9, 228.1, 226.3]
    for sizes, flat in ((grown, False), (warmed_up, True)):
        memory = benchmark.memory_over_time([(10.0 * place, size) for place, size in enumerate(sizes)])
        assert memory["flat"] is flat and memory["start"] == 211.3
        load = {"lost": 0, "out_of_order": 0, "rows": 9, "rows_counted_by_metrics": 9, "resident_mb": memory}
        assert bool(benchmark.shortfalls("load", load)) is not flat
    assert benchmark.memory_over_time([(0, 1.0), (60, 100.0), (120, 103.0)])["mb_a_minute"] == 3.0
    assert benchmark.memory_over_time([(0, 1.0), (10, 100.0), (20, 203.0)])["flat"] is None  # too short
    assert benchmark.shortfalls("peer", {"error": "no answer"}) == ["peer: no answer"]
