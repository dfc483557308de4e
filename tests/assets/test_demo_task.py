"""The accuracy of a teacher on the demo's task, trained with LoRA and with GaLore."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distill.pipeline import run

pytestmark = pytest.mark.slow

# The settings of docs/log.md; GaLore trains the weights themselves and needs a larger learning rate.
GALORE = ("method=galore", "galore_rank=32", "galore_update_gap=20", "galore_scale=1.0", "learning_rate=1e-3")


# Constrained answers are measured elsewhere.
EVALUATE = ("evaluate.models=[teacher_before, teacher]", "evaluate.max_rows=160", "evaluate.constrain=false")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rows, to which each test adds its teacher; the model before is measured once."""
    folder = tmp_path_factory.mktemp("demo")
    run("tiny", folder, only="prepare")
    return folder


@pytest.mark.parametrize("settings", [(), GALORE], ids=["lora", "galore"])
def test_a_teacher_reaches_the_accuracy_of_the_demo(out: Path, settings: tuple[str, ...]) -> None:
    """Above 0.85 on half of the held-out songs; the base model judges by keywords, right on a third."""
    overrides = [*(f"teach.{setting}" for setting in settings), *EVALUATE]
    run("tiny", out, overrides=overrides, only="teach")
    metrics = run("tiny", out, overrides=overrides, only="evaluate").metrics  # type: ignore[union-attr]
    assert metrics["teacher"]["accuracy"]["value"] >= 0.85
    assert metrics["teacher"]["json_valid"]["value"] >= 0.98
    assert metrics["teacher_before"]["accuracy"]["value"] <= 0.55
