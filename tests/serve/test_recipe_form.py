"""A recipe as a form: packaged recipes come back as they were, and what is wrong stands at its input."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helpers.small_run import TASK

from mlx_distill.config import from_mapping, to_mapping
from mlx_distill.errors import ConfigError
from mlx_distill.ledger.root import Root
from mlx_distill.recipe import Recipe, load_recipe, recipe_names
from mlx_distill.serve.pages.recipe_checks import GENERAL, problems, read_recipe, written_recipe
from mlx_distill.serve.pages.recipe_form import (
    COMMON,
    differences,
    form_sections,
    groups,
    read_texts,
    texts_of,
)


@pytest.fixture
def root(tmp_path) -> Root:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a", "colour": "yes"}\n')
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    raw = {
        "name": "colours",
        "task": "task.yaml",
        "teacher": "asset:models/tiny-qwen3",
        "data": {"sources": [{"path": "rows.jsonl"}]},
        "evaluate": {"models": ["teacher_before", "teacher"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return Root.at(tmp_path)


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_comes_back_from_its_form(name: str, tmp_path) -> None:
    raw = read_recipe(Root.at(tmp_path), name)
    back, kept, errors = read_texts(texts_of(raw))
    assert not errors
    assert kept == texts_of(raw)
    assert from_mapping(Recipe, back, "") == from_mapping(Recipe, raw, "")


@pytest.mark.parametrize("name", recipe_names())
def test_every_default_comes_back_from_its_text(name: str, tmp_path) -> None:
    whole = to_mapping(from_mapping(Recipe, read_recipe(Root.at(tmp_path), name), ""))
    assert read_texts(texts_of(whole))[0] == {key: value for key, value in whole.items() if value != []}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("evaluate", "margin", None),
        ("distill", "token_loss", "none"),
        ("quantize", "refine", "none"),
        ("convert", "quantize", None),
        ("teach", "target_modules", []),
        ("data", "domains", ["a, b", "[c]", " d"]),
        ("data", "rating_field", " stars "),
        ("data", "rating_field", "[x]"),
        ("data", "min_share", {"label": 0.1}),
        ("teach", "learning_rate", 1.2345678901234567e-05),
    ],
)
def test_a_value_comes_back(section: str, key: str, value: Any) -> None:
    raw = {section: {key: value}}
    assert read_texts(texts_of(raw))[0] == raw


def test_values_of_any_kind_come_back() -> None:
    source = {
        "values": {"verdict": {"default": "none", "map": {"1": True, "none": None}}},
        "answer_after": "### Label: ",
    }
    raw = {
        "task": {"name": "music", "system": 'Say "a": b\n\n- c'},
        "data": {"sources": [source, {"path": "x: y"}]},
    }
    assert read_texts(texts_of(raw))[0] == raw


def test_empty_items_are_left_out_and_the_others_numbered_anew() -> None:
    raw, kept, _ = read_texts(
        {"data.sources.0.path": " ", "data.sources.2.path": "a", "data.sources.11.hub": "b"}
    )
    assert raw == {"data": {"sources": [{"path": "a"}, {"hub": "b"}]}}
    assert kept == {"data.sources.0.path": "a", "data.sources.1.hub": "b"}
    assert [group.item for group in groups(kept) if group.name == "data.sources"] == [0, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "trust_remote_code",
        "teach.trust_remote_code",
        "data.sources.trust",
        "goals.x.model",
        "data.sources.99.path",
        "base",
    ],
)
@pytest.mark.parametrize("text", ["true", ""])
def test_an_unknown_input_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match="no key of a recipe"):
        read_texts({name: text})


def test_the_form_has_every_key_of_a_recipe() -> None:
    names = {one.name for group in groups({}) for one in (*group.common, *group.more)}
    whole = to_mapping(from_mapping(Recipe, {"name": "a", "task": "music", "teacher": "b"}, ""))
    assert {name for name in whole if not isinstance(whole[name], dict | list)} <= names
    assert {f"{block}.{key}" for block in ("teach", "distill", "evaluate") for key in whole[block]} <= names
    assert {"data.sources.0.where", "goals.0.metric", "data.seed"} <= names
    for section, keys in COMMON.items():  # a renamed key would silently be folded
        assert set(keys) <= {key.name for key in form_sections()[section].keys}


def test_each_problem_stands_at_its_input(root: Root) -> None:
    texts = {
        "name": "a/b",
        "task": "task.yml",
        "teacher": "../other",
        "student": "asset:models/none",
        "data.sources.0.path": "rows.jsonl",
        "data.sources.1.path": "/etc/passwd",
        "data.sources.1.split": "training",
        "teach.epochs": "-1",
        "teach.lora_rank": "abc",
        "distill.method": "loro",
        "distill.label_weight": "nan",
        "quantize.keep": "[a",
        "evaluate.confidence": "2",
        "goals.0.model": "student",
        "goals.1.model": "studnt",
        "goals.1.metric": "accuracy",
        "goals.1.at_least": "1",
    }
    raw, _, unreadable = read_texts(texts)
    recipe, found = problems(raw, root)
    assert recipe is None
    assert list(unreadable) == ["quantize.keep"]
    right = {"data.sources.0.path", "quantize.keep", "goals.0.model", "goals.1.metric", "goals.1.at_least"}
    assert set(found) | right == set(texts) | {"goals.0.metric"}
    assert not set(found) & (right - {"data.sources.0.path"})
    assert "below 0" in found["teach.epochs"][0]
    assert "whole number" in found["teach.lora_rank"][0]
    assert "not under the root" in found["teacher"][0]


def test_a_needed_key_is_missed(root: Root) -> None:
    assert problems({}, root)[1].keys() >= {"name", "teacher"}
    raw = {"name": "a", "task": "music", "teacher": "asset:models/tiny-qwen3"}
    assert list(problems(raw, root)[1]) == ["data.sources.0.path"]
    alone = problems({key: raw[key] for key in ("name", "teacher")} | {"evaluate": {"repeats": 3}}, root)[1]
    assert alone["evaluate.repeats"] == [alone["evaluate.repeats"][0]]
    assert "no task" in alone["evaluate.repeats"][0]
    unknown = problems(raw | {"teach": {"trust_remote_code": True}}, root)[1]
    assert "unknown key 'trust_remote_code'" in unknown[GENERAL][0]


@pytest.mark.parametrize(
    "task",
    [
        {"name": "music", "metrics": ["os:system"]},
        {"name": "music", "metrics": [{"metric": "os:system", "name": "x"}]},
        {"name": "music", "references": {"themes": {"kind": "os:system"}}},
        {"name": "music", "references": {"themes": ["os:system"]}},
    ],
)
def test_a_task_over_http_names_no_code(task: Any, root: Root) -> None:
    raw = {"name": "a", "task": task, "teacher": "asset:models/tiny-qwen3"}
    assert "not taken over HTTP" in problems(raw, root)[1]["task"][0]


def test_files_of_the_server_are_rows_at_most(root: Root) -> None:
    (root.uploads).mkdir(parents=True)
    (root.uploads / "x").write_text('{"text": "a", "colour": "yes"}\n')
    (root.uploads / "y").write_text(yaml.safe_dump(TASK))
    raw = {
        "name": "a",
        "task": "mine/task.yaml",
        "teacher": "asset:models/tiny-qwen3",
        "data": {"sources": [{"path": ".mlx-distill/uploads/x"}]},
    }
    assert problems(raw, root)[1] == {}
    assert list(problems(raw | {"task": ".mlx-distill/uploads/y"}, root)[1]) == ["task"]


def test_a_recipe_moves_with_its_paths(root: Root) -> None:
    raw = read_recipe(root, "mine/recipe.yaml")
    assert raw["task"] == "mine/task.yaml"
    assert raw["data"]["sources"][0]["path"] == "mine/rows.jsonl"
    recipe, found = problems(raw, root)
    assert not found
    assert recipe is not None
    folder = root.jobs / "job-1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(written_recipe(raw, root, folder))
    moved = load_recipe(folder / "recipe.yaml")  # from its new place it finds the same files
    assert moved.load_task() == recipe.load_task()
    assert (folder / str(moved.data.sources[0].path)).resolve() == root.path / "mine/rows.jsonl"
    assert differences(read_recipe(root, ".mlx-distill/jobs/job-1/recipe.yaml"), raw) == []


def test_recipes_outside_the_root_are_refused(root: Root, tmp_path) -> None:
    with pytest.raises(ConfigError, match="not under the root"):
        read_recipe(Root.at(tmp_path / "mine"), "../recipe.yaml")
