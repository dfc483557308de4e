"""The packaged recipes and their settings."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_distill.config import ASSETS, from_mapping, keyed, read_yaml, to_mapping
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import ATTENTION, MLP, DistillConfig, Recipe, TeachConfig, load_recipe, recipe_names


def test_the_packaged_recipes() -> None:
    assert {"tiny", "tiny-moderation", "qwen3-8b-to-gpt-oss-20b", "qwen3-8b-to-qwen3-0.6b"} <= set(
        recipe_names()
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_has_a_description(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description.endswith(".") and len(recipe.load_task().labels) >= 2
    assert recipe.base == (ASSETS / "recipes").resolve()
    plain = {key: value for key, value in to_mapping(recipe).items() if key != "base"}
    assert from_mapping(Recipe, plain, name) == from_mapping(
        Recipe, read_yaml(ASSETS / "recipes" / f"{name}.yaml"), name
    )


def test_the_settings_of_qwen3_8b_to_gpt_oss_20b() -> None:
    recipe = load_recipe("qwen3-8b-to-gpt-oss-20b")
    assert (recipe.teacher, recipe.student, recipe.task) == ("Qwen/Qwen3-8B", "openai/gpt-oss-20b", "music")
    for training in (recipe.teach, recipe.distill):
        assert (training.method, training.lora_rank, training.lora_alpha, training.lora_dropout) == (
            "lora",
            16,
            32.0,
            0.1,
        )
        assert (training.batch_size, training.accumulate) == (1, 8)
    assert recipe.teach.learning_rate == 2e-4 and recipe.distill.learning_rate == 1e-4  # of adapters
    assert recipe.teach.max_length == 512 and recipe.distill.max_length >= 512
    assert (recipe.teach.galore_rank, recipe.teach.galore_update_gap) == (512, 400)
    assert (recipe.distill.label_temperature, recipe.distill.label_weight, recipe.distill.text_weight) == (
        4.0,
        0.7,
        0.3,
    )
    assert recipe.distill.temperature == 1.0 and recipe.distill.token_loss == "auto"
    assert recipe.distill.target_modules == ATTENTION  # the quantized experts are not trained
    assert recipe.convert.quantize is None and "router" in recipe.quantize.keep


def test_the_defaults_of_the_trainings() -> None:
    assert (TeachConfig().learning_rate, DistillConfig().learning_rate) == (2e-5, 1e-5)
    assert TeachConfig().target_modules == ATTENTION + MLP and DistillConfig().target_modules == ATTENTION
    assert (
        TeachConfig().lora_rank,
        TeachConfig().lora_alpha,
        TeachConfig().lora_dropout,
        TeachConfig().max_length,
    ) == (16, 32.0, 0.1, 512)
    assert (
        TeachConfig().batch_size,
        TeachConfig().accumulate,
        TeachConfig().galore_rank,
        TeachConfig().galore_update_gap,
    ) == (
        1,
        8,
        512,
        400,
    )


@pytest.mark.parametrize("name", ["tiny", "tiny-moderation"])
def test_the_tiny_recipes_separate_their_test_rows(name: str) -> None:
    sources = load_recipe(name).data.sources
    trained = {(s.generator, s.seed) for s in sources if s.generator and s.split is None}
    held_out = [s for s in sources if s.split == "test"]
    assert held_out and all(s.part == "test" for s in held_out if s.generator)
    assert all(s.part == "train" for s in sources if s.generator and s.split is None) and trained
    assert sum(s.count for s in held_out) >= 300
    assert all(
        spec.startswith("asset:models/") for spec in (load_recipe(name).teacher, load_recipe(name).student)
    )  # offline


def test_only_settings_that_cannot_change_a_result_are_not_keyed() -> None:
    free = {f.name for f in fields(DistillConfig) if not f.metadata.get("keyed", True)}
    checkpoints = {"grad_checkpoint", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"}
    assert free == {*checkpoints, "stream_gradients"}
    recipe = load_recipe("tiny")
    assert (
        "description" not in keyed(recipe)
        and "batch_size" not in keyed(recipe.targets)
        and "confidence" not in keyed(recipe.evaluate)
    )


def test_a_loaded_recipe_takes_overrides_and_keeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\ntask: moderation\nteacher: a\nstudent: b\n", encoding="utf-8")
    loaded = load_recipe(tmp_path / "r.yaml")
    changed = load_recipe(loaded, {"teach.epochs": 2, "task": {"name": "music", "max_answer_tokens": 9}})
    assert (changed.teach.epochs, changed.load_task().max_answer_tokens) == (2, 9)
    assert changed.base == loaded.base == tmp_path and loaded.teach.epochs == 1
    assert load_recipe(loaded) == loaded


def test_a_misspelled_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny-moderatoin")
    assert "did you mean 'tiny-moderation'?" in str(caught.value.fix)


def smoke_settings(text: str) -> list[str]:
    """The ``--set`` values of the smoke run in a text, which may go over several commented lines."""
    start = text.index("--set data.sources.0.count")
    words = re.sub(r"\\\n#?", " ", text[start:]).splitlines()[0].split()
    return [value for flag, value in zip(words[::2], words[1::2], strict=True) if flag == "--set"]


@pytest.mark.parametrize("name", ["qwen3-8b-to-gpt-oss-20b", "qwen3-8b-galore-to-gpt-oss-20b"])
def test_the_smoke_run_of_the_flagship_is_documented_and_small(name: str) -> None:
    documented = smoke_settings((ASSETS / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    readme = Path(__file__).parent.parent / "README.md"
    assert smoke_settings(readme.read_text(encoding="utf-8")) == documented
    recipe = load_recipe(name, documented)
    assert (recipe.teach.steps, recipe.distill.steps, recipe.evaluate.max_rows) == (2, 2, 4)
    assert recipe.data.sources[0].count == 60


def test_the_galore_flagship_has_the_settings_of_its_user() -> None:
    teach = load_recipe("qwen3-8b-galore-to-gpt-oss-20b").teach
    assert (teach.method, teach.galore_rank, teach.galore_update_gap) == ("galore", 512, 400)
    assert (teach.learning_rate, teach.epochs, teach.grad_checkpoint) == (2e-5, 2, True)


def test_overrides_are_part_of_the_recipe() -> None:
    recipe = load_recipe("tiny", ["distill.learning_rate=1e-5", "name=mine", "controls.labels=true"])
    assert (recipe.distill.learning_rate, recipe.name, recipe.controls.labels) == (1e-5, "mine", True)


def test_an_unknown_recipe_is_refused_with_the_names_of_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tyni")
    assert "tiny" in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="no recipe"):
        load_recipe(tmp_path / "nope.yaml")


def test_paths_are_relative_to_the_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: moderation\nteacher: a/b\nstudent: c/d\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.base == tmp_path.resolve() and recipe.distill == DistillConfig()
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: nope\nteacher: a/b\nstudent: c/d\n")
    with pytest.raises(ConfigError, match="no task 'nope'"):
        load_recipe(tmp_path / "mine.yaml")


OLD = """\
name: mine
task: music
teacher: a/b
student: c/d
unpack: true
distill: {token_loss: cells}
"""


def test_a_recipe_with_old_spellings_is_the_same_recipe_and_says_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OLD)
    notes: list[str] = []
    old = load_recipe(path, notes=notes)
    assert notes == [
        f"{path}: unpack is now called dequantize",
        f"{path}: distill: token_loss: cells is now called token_groups",
    ]
    path.write_text(OLD.replace("unpack", "dequantize").replace("cells", "token_groups"))
    assert load_recipe(path, notes=notes[:0]) == old
    assert (old.dequantize, old.distill.token_loss) == (True, "token_groups")


def test_overrides_take_old_and_new_spellings(tmp_path: Path) -> None:
    notes: list[str] = []
    path = tmp_path / "mine.yaml"
    path.write_text(OLD.replace("unpack: true", "dequantize: true"))
    old = load_recipe(path, ["unpack=false", "distill.token_loss=cells"], notes)
    assert old == load_recipe(path, ["dequantize=false", "distill.token_loss=token_groups"])
    assert not old.dequantize
    assert notes[1:] == [
        "--set: unpack is now called dequantize",
        "--set: distill: token_loss: cells is now called token_groups",
    ]
