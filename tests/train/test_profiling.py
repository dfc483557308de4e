"""The time of the parts of a step, and its table."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import make_batches, make_model, make_rows, settings
from mlx.utils import tree_flatten

from mlx_distill.optim import make_optimizer
from mlx_distill.train import Profile, make_trainable, sft, train
from mlx_distill.train.profiling import PARTS, Stopwatch


def test_a_nested_part_counts_once_and_the_remaining_time_is_other() -> None:
    watch = Stopwatch()
    watch.take()
    began = time.perf_counter()
    with watch.part("backward"):
        time.sleep(0.01)
        with watch.part("project"):
            time.sleep(0.02)
    time.sleep(0.01)
    taken = watch.take()
    whole = time.perf_counter() - began
    assert (
        taken["project"] >= 0.02 and 0.01 <= taken["backward"] < taken["backward"] + taken["project"] <= whole
    )
    assert taken["other"] >= 0.01 and sum(taken.values()) == pytest.approx(whole, abs=2e-3)
    assert sum(watch.take().values()) < 0.01


def test_only_an_exact_stopwatch_evaluates_results_inside_their_part() -> None:
    for exact in (False, True):
        watch = Stopwatch(exact)
        before = mx.get_active_memory()
        lazy = mx.ones((1 << 20,)) + 1
        with watch.part("data"):
            watch.settle({"inputs": lazy, "rows": (1, 2), "name": None})
        assert (mx.get_active_memory() - before >= 4_000_000) == exact


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "galore", "lora"])
def test_a_profiled_training_is_unchanged_and_its_parts_add_up(tmp_path: Path, method: str) -> None:
    config = settings(method=method, steps=6, evaluate_every=3, galore_update_gap=2)
    batches, found = make_batches(make_rows(16), 2), []
    profile = Profile()
    for folder, watch in ((tmp_path / "plain", None), (tmp_path / "profiled", profile.watch)):
        model = make_model(dropout=0.2)
        make_trainable(model, config)
        hooks = [profile.add] if watch else []
        began = time.perf_counter()
        more = {"folder": folder, "valid": batches[:2], "hooks": hooks, "watch": watch}
        train(model, ListBatches(batches), sft(), make_optimizer(config, 6), config, **more)
        seconds = time.perf_counter() - began
        found.append({name: a.tolist() for name, a in tree_flatten(model.parameters())})
    profile.finish()
    assert found[0] == found[1]
    (stage,) = profile.to_dict()["stages"]
    assert stage["steps"] == 5 and set(stage["parts"]) == set(PARTS)
    assert stage["seconds_per_step"] == pytest.approx(sum(stage["parts"].values()))
    assert stage["first_step_seconds"] + 5 * stage["seconds_per_step"] <= seconds
    expected = {"data", "forward", "backward", "clip", "update", "validate", "save"} | (
        {"project"} if method == "galore" else set()
    )
    assert all(stage["parts"][name] > 0 for name in expected)
    shown = {line.split()[0] for line in profile.lines[2:]}
    assert expected <= shown and ("project" in shown) == (method == "galore") and "ranks" in shown


def test_a_profile_without_steps_says_so() -> None:
    (line,) = Profile().lines
    assert line.startswith("no step was taken: nothing to measure") and "--from teach" in line
