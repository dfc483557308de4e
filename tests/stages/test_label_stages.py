"""Labels that begin alike through all stages, and a label loss that no row has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.small_chain import make_context, write_chain
from helpers.small_run import TASK, rows
from helpers.targets import rewrite_targets

from mlx_distill.config import resolve_asset
from mlx_distill.data.predictions import read_predictions
from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.errors import DataError, ModelError
from mlx_distill.infer.label_scoring import task_label_trie
from mlx_distill.models.load import load_tokenizer
from mlx_distill.pipeline import run
from mlx_distill.recipe import load_recipe
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.storage import read_jsonl, write_jsonl

LABELS = ("spam", "safe", "spare")


@pytest.mark.slow
def test_labels_that_begin_alike_go_through_all_stages(tmp_path: Path) -> None:
    training = {"steps": 2, "accumulate": 1, "batch_size": 4, "lora_rank": 2, "evaluate_every": 0}
    recipe = write_chain(
        tmp_path,
        teach=training,
        targets={"top_k": 4, "batch_size": 8, "min_valid": 0.0},
        distill={**training, "learning_rate": 1e-3},
        evaluate={"models": ["student"], "batch_size": 8},
    )
    properties = {"colour": {"type": "string", "enum": list(LABELS)}}
    schema: dict[str, Any] = {**TASK["schema"], "properties": properties}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**TASK, "schema": schema}))
    write_jsonl(tmp_path / "rows.jsonl", ({**row, "colour": LABELS[i % 3]} for i, row in enumerate(rows(24))))
    out = tmp_path / "out"
    run(recipe, out)
    task = load_recipe(recipe).load_task()
    student = load_tokenizer(out / "student")
    assert len(task_label_trie(student, task).nodes) > 1
    for target in TargetReader(out / "targets"):
        assert target.label_logprobs is not None and len(target.label_logprobs) == 4
        assert np.exp(target.label_logprobs).sum() == pytest.approx(1, abs=1e-4)
    assert any('"label"' in json.dumps(row) for _, row in read_jsonl(out / "student" / "metrics.jsonl"))
    _, predictions = read_predictions(out / "evaluations" / "student" / "predictions.jsonl")
    for prediction in predictions:
        assert list(prediction["label_probs"]) == list(LABELS)
        assert sum(prediction["label_probs"].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_label_loss_that_no_row_has_is_refused_and_one_that_some_lack_is_noted(
    run_copy: Path, folder: Path
) -> None:
    context = make_context(run=run_copy)
    student = load_tokenizer(run_copy / "student_base")
    for kept in (1, 0):
        rewrite_targets(
            run_copy, lambda i, row, kept=kept: row if i < kept else replace(row, label_logprobs=None)
        )
        stage = folder / f"kept-{kept}"
        stage.mkdir()
        if kept:
            aligned_rows(context, stage, student, context.recipe.distill)
            (note,) = context.progress.notes  # type: ignore[attr-defined]
            assert "rows are left out of the label loss" in note
        else:
            with pytest.raises(DataError, match=r"no row for distill\.label_weight"):
                aligned_rows(context, stage, student, context.recipe.distill)


@pytest.mark.slow
def test_a_label_loss_that_a_tokenizer_cannot_have_is_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    model = Path(resolve_asset("asset:models/tiny-qwen3"))
    student = Path(shutil.copytree(model, tmp_path / "student"))
    state = json.loads((student / "tokenizer.json").read_text())
    (student / "tokenizer.json").write_text(json.dumps({**state, "decoder": None}))
    recipe = write_chain(tmp_path, student=str(student))
    with pytest.raises(ModelError, match=r"distill\.label_weight 0\.7") as caught:
        run(recipe, tmp_path / "out")
    assert "label_weight: 0" in str(caught.value.fix)
    assert not list((tmp_path / "out").glob("*/manifest.json"))
