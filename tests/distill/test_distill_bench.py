"""The standing benchmark of distillation: floors, intervals, and one student of each form at a tiny size."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("distill_bench", FOLDER / "distill_bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_bench"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("distill_bench", "distill_setup"):
        sys.modules.pop(name)


def test_an_interval_holds_the_difference_and_widens_with_the_scatter_of_seeds(bench: Any) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.2, 0.1, (3, 400)), rng.normal(0, 0.1, (3, 400))
    low, high = bench.interval(list(first), list(second))
    assert low < (first - second).mean() < high and high - low < 0.06
    apart = first + np.array([[-0.5], [0.0], [0.5]])
    wide = bench.interval(list(apart), list(second))
    assert wide[0] < 0 < wide[1] and wide[1] - wide[0] > 0.3


def test_floors_are_judged_by_the_means_over_common_seeds(bench: Any, tmp_path: Path) -> None:
    runs = bench.Runs(tmp_path / "r.json", tmp_path, False)
    runs.results["teachers"] = {"label": {}}
    of = {"label": (0.55, 0.24, 0.32), "labels": (0.42, 0.37, 0.53), "labels_hard": (0.56, 0.32, 0.40)}
    for method, (agree, kl, true) in of.items():
        for seed, shift in ((100, -0.01), (101, 0.01)):
            key = {"suite": "label", "method": method, "seed": seed, "rate": bench.SUITES["label"].rate}
            runs.results["runs"].append({**key, "agree": agree + shift, "kl_teacher": kl, "kl_true": true})
    # Of a seed that the other method has not, nothing counts.
    extra = {"suite": "label", "method": "label", "seed": 102, "rate": bench.SUITES["label"].rate}
    runs.results["runs"].append({**extra, "agree": 0.0, "kl_teacher": 9.0, "kl_true": 9.0})
    floors = bench.check_floors(runs, ["label"])
    assert len(floors) == 5 and all(floor["holds"] for floor in floors)
    assert floors[0]["value"] == pytest.approx(0.13) and floors[2]["value"] == pytest.approx(0.65, abs=1e-2)
    runs.results["runs"][0]["agree"] = 0.2
    failed = [floor["other"] for floor in bench.check_floors(runs, ["label"]) if not floor["holds"]]
    assert failed == ["labels", "labels_hard"]


@pytest.mark.slow
def test_a_student_of_each_form_is_read_along_the_teachers_answers(bench: Any, tmp_path: Path) -> None:
    methods = bench.METHODS
    for form, method, base in (("label", "labels_hard", "gpt-oss"), ("fields", "kl10_sampled", "qwen")):
        lab = bench.Lab(form, tmp_path, (31, 6), teacher_rows=32)
        student = {"rows": 8, "steps": 1, "base": base, "rate": 1e-3}
        facts, arrays = lab.student(methods[method], 100, **student)
        found = bench.figures(form, arrays, lab.held_out)
        assert set(bench.COLUMNS[form]) <= {*found, *facts} and np.isfinite(list(found.values())).all()
        again = bench.Lab(form, tmp_path, (31, 6), teacher_rows=32)
        np.testing.assert_array_equal(again.held_out.teacher["verdict"], lab.held_out.teacher["verdict"])
        known = bench.figures(form, lab.held_out.teacher, lab.held_out)
        assert known["agree"] == 1 and known["kl_teacher" if form == "label" else "fields"] == 0
    assert lab.held_out.exact["score[0]"].shape == (6, 8)
    assert not list((tmp_path / "training").iterdir())  # what a killed run goes on from is gone at the end
