"""A short version of ``benchmarks/serve_bench.py``: under load nothing is lost, and order is kept."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def load() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "serve_bench.py"
    spec = importlib.util.spec_from_file_location("serve_bench", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module.main(["--short", "--parts", "load"])["load"]


@pytest.mark.slow
def test_under_load_nothing_is_lost_and_everything_is_counted(load: Any) -> None:
    assert load["lost"] == load["out_of_order"] == 0
    assert load["requests"] > load["clients"] and load["rows"] > load["requests"]  # batches too
    assert load["rows_counted_by_metrics"] == load["rows"]
    assert load["log_lines"] == load["requests"]
    assert load["rows_in_costs"] >= load["rows"]
