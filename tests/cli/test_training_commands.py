"""Trainings through the entry point: profiles, resuming, and settings that are refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from helpers.small_run import write_recipe

from mlx_distill.cli import cli
from mlx_distill.errors import ConfigError
from mlx_distill.models.load import load_model
from mlx_distill.pipeline import run


class Enough(Exception):  # noqa: N818 - not an error
    """Interrupts a training from a hook."""


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher was interrupted after three steps, with a checkpoint of the second."""
    folder = tmp_path_factory.mktemp("cut")
    recipe = write_recipe(folder)

    def stop(row: dict[str, Any]) -> None:
        assert row["stage"] == "teach" and row["steps"] > 3
        if row["step"] == 3:
            raise Enough

    run(recipe, folder / "out", only="prepare")
    with pytest.raises(Enough):
        run(recipe, folder / "out", only="teach", hooks=[stop])
    assert (folder / "out" / ".teacher.partial" / "scratch" / "checkpoints" / "step-00000002").is_dir()
    return folder


@pytest.fixture
def copied(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "copy"))


def teach(folder: Path, *more: str) -> Any:
    return CliRunner().invoke(
        cli, ["teach", str(folder / "recipe.yaml"), "--out", str(folder / "out"), *more]
    )


@pytest.mark.slow
def test_a_resumed_training_says_where_it_continues(copied: Path) -> None:
    result = teach(copied)
    assert result.exit_code == 0, result.output
    head, *_, done = [line for line in result.stderr.splitlines() if line.startswith("teach: ")]
    assert head.endswith(" steps, continuing after step 2")
    assert " steps (2 of them before) in " in done
    assert " steps, 2 of them before, " in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[-1].startswith("next: mlx-distill targets ")


@pytest.mark.slow
def test_a_profile_is_printed_and_the_training_is_kept(copied: Path) -> None:
    result = teach(copied, "--profile")
    assert result.exit_code == 0, result.output
    table, _, outcome = result.stdout.partition("\n\n")
    head, columns, *parts = table.splitlines()
    assert outcome.splitlines()[-1].startswith("next: mlx-distill targets ")
    assert (
        head.startswith("teach: ")
        and "tokens a second" in head
        and columns.split() == ["part", "ms", "a", "step", "share"]
    )
    assert {"data", "forward", "backward", "clip", "update", "save"} <= {line.split()[0] for line in parts}
    assert (copied / "out" / "teacher" / "adapters.safetensors").is_file()
    again = teach(copied, "--profile", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == {"stages": []}
    result = teach(copied, "--from", "teach", "--profile", "--json")
    assert json.loads(result.stdout)["stages"][0]["seconds_per_step"] > 0


def test_inspect_shows_an_unfinished_training(copied: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(copied / "out")])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "not finished" in line]
    assert (
        line.split()[0] == "teacher"
        and "step 2 of " in line
        and line.endswith("the same command continues from there")
    )
    alone = CliRunner().invoke(cli, ["inspect", str(copied / "out" / "teacher")])
    assert alone.exit_code == 0 and line.split("  ")[-1].strip() in alone.stdout, alone.output


@pytest.mark.slow
def test_a_loss_that_rose_is_reported(copied: Path) -> None:
    result = teach(copied, "--from", "teach", "--set", "teach.method=full", "--set", "teach.learning_rate=10")
    assert result.exit_code == 0, result.output
    assert "teach: the loss " in result.stderr and "lower the learning rate" in result.stderr


@pytest.mark.slow
def test_a_changed_setting_does_not_discard_an_unfinished_training(copied: Path) -> None:
    changed = ["--set", "teach.learning_rate=1e-3"]
    result = teach(copied, *changed)
    assert result.exit_code == 2, result.output
    assert (
        "2 steps of an unfinished teach with other settings (learning_rate was 2e-05, is" in result.stderr
        and "--from teach" in result.stderr
    )
    assert (copied / "out" / ".teacher.partial" / "scratch" / "checkpoints" / "step-00000002").is_dir()
    assert teach(copied, *changed, "--from", "teach").exit_code == 0
    rows = [
        json.loads(line)["step"]
        for line in (copied / "out" / "teacher" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == list(range(1, len(rows) + 1))


def test_a_dry_run_says_where_an_unfinished_training_stops_the_run(copied: Path) -> None:
    for overrides, stops in (({}, False), ({"teach.learning_rate": 1e-3}, True)):
        plan = run(copied / "recipe.yaml", copied / "out", dry_run=True, overrides=overrides)
        states = {row["command"]: row["state"] for row in plan.to_dict()["stages"]}
        assert ("the run stops here" in states["teach"]) == stops, states
        assert ("learning_rate was 2e-05, is 0.001" in states["teach"]) == stops


def test_changed_rows_do_not_discard_an_unfinished_training(copied: Path) -> None:
    run(copied / "recipe.yaml", copied / "out", only="prepare", overrides=["data.test_fraction=0.3"])
    result = teach(copied, "--set", "data.test_fraction=0.3")
    assert (
        result.exit_code == 2
        and "with other data or another model" in result.stderr
        and "fix:" in result.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teach.target_modules=[qq_proj]", "'qq_proj' matches nothing"),
        ("teach.modules_to_save=[norms]", "'norms' matches nothing"),
        ("distill.method=full distill.modules_to_save=[norm]", "modules_to_save with method: full"),
        ("distill.lora_rank=5000", "rank 5000"),
        ("distill.schedule=wsd distill.warmup=0.95", "longer than the run"),
        ("teach.patience=3 teach.evaluate_every=0", "patience with evaluate_every: 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_made(
    tmp_path: Path, override: str, message: str
) -> None:
    recipe = write_recipe(tmp_path)
    more = [part for text in override.split(" ") for part in ("--set", text)]
    result = CliRunner().invoke(cli, ["run", str(recipe), "--out", str(tmp_path / "out"), *more])
    assert result.exit_code in (1, 2) and message in result.stderr and "fix:" in result.stderr, result.output
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


@pytest.mark.slow
def test_a_recipe_may_name_any_optimizer(copied: Path) -> None:
    with pytest.raises(ConfigError, match="method"):
        run(copied / "recipe.yaml", copied / "out", only="teach", overrides=["teach.method=lion"])
    overrides = [
        "teach.method=apollo-mini",
        "teach.stream_gradients=true",
        "teach.steps=2",
        "teach.target_modules=[q_proj]",
    ]
    run(copied / "recipe.yaml", copied / "out", only="teach", from_stage="teach", overrides=overrides)
    assert (copied / "out" / "teacher" / "model.safetensors.index.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "lora"])
def test_embeddings_and_norms_may_be_trained_fully_besides(copied: Path, method: str) -> None:
    overrides = [f"teach.method={method}", "teach.steps=2", "teach.galore_rank=4", "teach.learning_rate=1e-2"]
    overrides += ["teach.target_modules=[q_proj]", "teach.modules_to_save=[embed_tokens,norm]"]
    run(copied / "recipe.yaml", copied / "out", only="teach", from_stage="teach", overrides=overrides)
    before, after = (
        load_model(copied / "out" / name, dtype="float32")[0].model for name in ("teacher_base", "teacher")
    )
    for layer in ("embed_tokens", "norm"):
        assert mx.abs(before[layer].weight - after[layer].weight).max().item() > 1e-3
    assert mx.array_equal(before.layers[0].input_layernorm.weight, after.layers[0].input_layernorm.weight)
