"""Mutated configs, adapters, rows, tasks and recipes: each is a right result or an error with a fix.

Seeds are fixed. ``FUZZ_COUNT`` sets the mutations of each kind, for longer runs than those of the tests.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers.checkpoints import GOLDEN
from helpers.fuzzing import (
    COUNT,
    adapter_folder,
    check_each,
    difference,
    mutations,
    outcome,
    plain_adapter,
    write_json_loosely,
)
from helpers.small_run import TASK, rows, write_recipe

from mlx_distill import pipeline
from mlx_distill.config import to_mapping
from mlx_distill.data.rows import from_row, to_example, to_item, to_row
from mlx_distill.errors import DistillError
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load_model
from mlx_distill.models.peft import from_peft
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.tasks.answer import check_answer, parse_answer
from mlx_distill.tasks.task import parse_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*not known and not used"),  # the warning is the right outcome
]

PROMPT = mx.array([[1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def logits_of(folder: Path) -> np.ndarray:
    model, _ = load_model(folder, dtype="float32")
    return np.array(model(PROMPT)[0].astype(mx.float32))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "qwen3_yarn", "gpt_oss", "gpt_oss_mxfp4"])
def test_configs_of_models(name: str, tmp_path: Path) -> None:
    """A converted model computes what its source computes, whatever its config says; else nothing is left."""
    config = json.loads((GOLDEN / f"models_{name}" / "config.json").read_text(encoding="utf-8"))

    def check(seed: int, changed: Any) -> None:
        source, out = tmp_path / f"source-{seed}", tmp_path / f"out-{seed}"
        shutil.copytree(GOLDEN / f"models_{name}", source)
        write_json_loosely(source / "config.json", changed)
        what = f"{name} {seed}: {difference(config, changed)}"
        loaded = outcome(what, lambda: logits_of(source))
        converted = outcome(what, lambda: convert(source, out, progress=NullProgress()))
        if isinstance(converted, DistillError):
            assert not out.exists(), f"{what}: a folder is left"
        else:
            assert not isinstance(loaded, DistillError), f"{what}: converted, and cannot be loaded: {loaded}"
            assert np.isfinite(loaded).all(), f"{what}: logits that are not finite"
            np.testing.assert_allclose(logits_of(out), loaded, atol=1e-5, err_msg=what)
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)

    check_each(mutations(config, name), check)


def merged_reference(config: dict[str, Any], tensors: dict[str, Any]) -> np.ndarray:
    """Logits of the base with ``scale * B A`` added to the weights of each pair."""
    model, _ = load_model(GOLDEN / "models_qwen3", dtype="float32")
    arrays = {
        name: np.frombuffer(data, np.float32).reshape(shape) for name, (_, shape, data) in tensors.items()
    }
    modules = dict(model.named_modules())
    for name, a in arrays.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = arrays[name.replace(".lora_A.", ".lora_B.")]
            scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
            modules[path].weight = modules[path].weight + mx.array(scale * (b @ a))
    return np.array(model(PROMPT)[0])


def test_configs_of_adapters(tmp_path: Path) -> None:
    config, tensors = plain_adapter()
    plain = merged_reference(config, tensors)

    def check(seed: int, changed: Any) -> None:
        source, out = adapter_folder(tmp_path / f"a{seed}", changed, tensors), tmp_path / f"out-{seed}"
        what = f"adapter {seed}: {difference(config, changed)}"
        result = outcome(what, lambda: from_peft(source, out))
        if isinstance(result, DistillError):
            assert not out.exists(), f"{what}: a folder is left"
            return
        # Only these keys change what the same matrices compute, besides the patterns.
        wanted = plain
        if any(changed.get(key) != config[key] for key in ("r", "lora_alpha", "use_rslora")):
            known = {**config, **{key: changed.get(key, config[key]) for key in ("lora_alpha", "use_rslora")}}
            wanted = merged_reference(known, tensors) if changed.get("r") == config["r"] else None
        if wanted is not None and not changed.get("alpha_pattern") and not changed.get("rank_pattern"):
            np.testing.assert_allclose(logits_of(out), wanted, atol=1e-4, err_msg=what)

    check_each(mutations(config, "adapter"), check)


def test_tensors_of_adapters(tmp_path: Path) -> None:
    """Tensors that are renamed, missing, of another shape or type, or not finite are refused."""
    config, tensors = plain_adapter()
    plain = merged_reference(config, tensors)

    def check(seed: int) -> None:
        rng = random.Random(f"tensors {seed}")
        changed = dict(tensors)
        name = rng.choice(list(changed))
        dtype, shape, data = changed.pop(name)
        kind = rng.choice(("gone", "renamed", "transposed", "empty", "nan", "flat", "same", "layer"))
        if kind == "renamed":
            changed[name + rng.choice("xyz")] = (dtype, shape, data)
        elif kind == "transposed":
            changed[name] = (dtype, shape[::-1], data)
        elif kind == "empty":
            changed[name] = (dtype, [0], b"")
        elif kind == "nan":
            changed[name] = (dtype, shape, np.float32("nan").tobytes() + data[4:])
        elif kind == "flat":
            changed[name] = (dtype, [len(data) // 4], data)
        elif kind == "layer":
            other_layer = re.sub(r"layers\.\d", "layers.9", name)
            changed[other_layer] = (dtype, shape, data)
        elif kind == "same":
            changed[name] = (dtype, shape, data)
        source, out = adapter_folder(tmp_path / f"t{seed}", config, changed), tmp_path / f"out-{seed}"
        what = f"tensors {seed}: {kind} {name}"
        result = outcome(what, lambda: from_peft(source, out))
        square = kind == "transposed" and shape[0] == shape[1]
        if kind == "same" or square:
            assert not isinstance(result, DistillError), f"{what}: {result}"
            if kind == "same":
                np.testing.assert_allclose(logits_of(out), plain, atol=1e-4, err_msg=what)
        else:
            assert isinstance(result, DistillError), f"{what}: converted"
            assert not out.exists(), f"{what}: a folder is left"

    check_each(((seed,) for seed in range(COUNT)), check)


ANSWER = '{"colour": "yes"}'
CHATS = (
    {"messages": [{"role": "user", "content": "a red hen"}, {"role": "assistant", "content": ANSWER}]},
    {"conversations": [{"from": "human", "value": "a red hen"}, {"from": "gpt", "value": ANSWER}]},
    {"instruction": "Name it.", "input": "a red hen", "output": "yes", "history": [["q", "a"]]},
    {"prompt": "a red hen", "completion": ANSWER, "when": "2026-01-01", "tools": []},
    {"id": "r1", "text": "a red hen", "colour": "yes", "group": "birds"},
    {"id": 3, "text": "a red hen", "answer": {"colour": "yes"}},
)


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_rows(number: int) -> None:
    """A row that is read has a valid answer, and can be written and read back; analyze asks the same."""
    task = parse_task(TASK, "task.yaml")

    def check(seed: int, changed: Any) -> None:
        what = f"row {number} {seed}: {changed!r}"
        if not isinstance(changed, dict):
            return
        example = outcome(what, lambda: to_example(changed, task, "rows.jsonl:1"))
        if isinstance(example, DistillError):
            assert example.message.startswith("rows.jsonl:1"), f"{what}: {example}"
            return
        assert check_answer(example.answer, task.schema) is None, what
        assert parse_answer(example.messages[-1].content, task.schema)[1] is None, what
        text = json.dumps(to_row(example, "test"), ensure_ascii=False, allow_nan=False)
        text.encode()
        assert from_row(json.loads(text)) == example, what
        item = outcome(what, lambda: to_item(changed, task))
        assert not isinstance(item, DistillError), f"{what}: {item}"
        assert item.messages == example.messages[:-1] and item.id == example.id, what

    check_each(mutations(CHATS[number], f"row {number}"), check)


def test_tasks() -> None:
    """A task that is read asks its prompt, has its labels, and reads its own answers."""
    valid = {**TASK, "positive": ["yes"], "slices": ["group"], "title": "text", "score_scale": [0, 1]}
    row = {"text": "a red hen", "group": "birds", "colour": "yes", "id": "1"}

    def check(seed: int, changed: Any) -> None:
        what = f"task {seed}: {difference(valid, changed)}"
        task = outcome(what, lambda: parse_task(changed, "task.yaml"))
        if isinstance(task, DistillError):
            assert "task.yaml" in task.message, f"{what}: {task}"
            return
        outcome(what, lambda: task.prompt(row))
        outcome(what, lambda: to_example(row, task, "rows.jsonl:1"))
        assert parse_task(to_mapping(task), "task.yaml") == task, what

    check_each(mutations(valid, "task"), check)


def test_recipes(tmp_path: Path) -> None:
    """A recipe that is read has a plan, and one whose data are there is prepared or refused whole."""
    recipe = write_recipe(tmp_path)
    valid = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    valid["data"]["sources"] = [{"path": "rows.jsonl", "columns": {"text": "text"}, "count": 30, "where": {}}]
    assert len(rows()) >= 30

    def check(seed: int, changed: Any) -> None:
        what = f"recipe {seed}: {difference(valid, changed)}"
        try:
            recipe.write_text(yaml.safe_dump(changed), encoding="utf-8")
        except UnicodeEncodeError:
            return
        loaded = outcome(what, lambda: load_recipe(recipe))
        if isinstance(loaded, DistillError):
            return
        out = tmp_path / f"out-{seed}"
        outcome(what, lambda: pipeline.run(recipe, out, dry_run=True, progress=NullProgress()))
        assert not out.exists(), f"{what}: a dry run wrote"
        made = outcome(what, lambda: pipeline.run(recipe, out, only="prepare", progress=NullProgress()))
        assert (out / "data" / "manifest.json").is_file() != isinstance(made, DistillError), f"{what}: {made}"
        assert not (isinstance(made, DistillError) and (out / "data").exists()), what
        shutil.rmtree(out, ignore_errors=True)

    check_each(mutations(valid, "recipe"), check)
