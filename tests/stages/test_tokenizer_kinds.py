"""Whole distillations with tokenizers that are not byte-level."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_run import write_recipe
from helpers.tokenizer_kinds import make

from mlx_distill.config import resolve_asset
from mlx_distill.losses import token_bytes
from mlx_distill.models.load import load_tokenizer
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.context import Context
from mlx_distill.stages.distill import aligned_rows
from mlx_distill.storage import read_jsonl, write_json

TINY = Path(resolve_asset("asset:models/tiny-qwen3"))
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = {"steps": 3, "accumulate": 1, "batch_size": 4, "lora_rank": 4, "evaluate_every": 0}


def model_with(tmp_path: Path, kind: str, template: str = TEMPLATE) -> str:
    """The packaged Qwen3, with another tokenizer that its weights know nothing of where one is named."""
    if kind == "asset":
        return "asset:models/tiny-qwen3"
    folder = tmp_path / kind
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("token*", "chat*", "generation*"))
    make(kind).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>", "unk_token": "<unk>"}
    kinds = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    write_json(folder / "tokenizer_config.json", {**kinds, **names})
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "bos_token_id": 1, "eos_token_id": 4})
    return str(folder)


def distilled(tmp_path: Path, **blocks: Any) -> list[dict[str, Any]]:
    """A run up to the student, with the metrics of its training."""
    settings = {"teach": SHORT, "distill": SHORT, "targets": {"top_k": 8, "text": "data"}, **blocks}
    recipe = write_recipe(tmp_path, **settings)
    for stage in ("prepare", "teach", "targets", "distill"):
        run(recipe, tmp_path / "out", only=stage)
    return [row for _, row in read_jsonl(tmp_path / "out" / "student" / "metrics.jsonl")]


def aligned(tmp_path: Path, *overrides: str) -> tuple[Any, dict[str, Any]]:
    """The training rows of a finished run, and what the objective needs."""
    (tmp_path / "again").mkdir()
    recipe, run_folder = load_recipe(tmp_path / "recipe.yaml", overrides), tmp_path / "out"
    context = Context(recipe, recipe.load_task(), run_folder, NullProgress(), StopFlag())
    tokenizer = load_tokenizer(run_folder / "student_base")
    train, _, inputs = aligned_rows(context, tmp_path / "again", tokenizer, recipe.distill, token_rows=1088)
    return train, inputs


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), [("asset", "llama2"), ("gemma", "asset")])
def test_word_marks_and_bytes(tmp_path: Path, teacher: str, student: str) -> None:
    """Across tokenizers: the aligned rows hold both texts from beginning to end."""
    metrics = distilled(
        tmp_path, teacher=model_with(tmp_path, teacher), student=model_with(tmp_path, student)
    )
    assert all(np.isfinite([row[term] for term in ("token", "text", "label")]).all() for row in metrics)
    rows, inputs = aligned(tmp_path)
    assert len(rows) == 30 and inputs["groups"].shared > 50
    tokens = token_bytes(load_tokenizer(tmp_path / "out" / "student_base"))
    for row in rows:
        said = b"".join(tokens[i] for i in row.tokens[row.start : -1])
        assert said in (b'{"colour": "yes"}', b'{"colour": "no"}')
        assert [a for a, _ in row.spans[1:]] == [b for _, b in row.spans[:-1]]
        assert row.spans[0, 0] == row.start and row.spans[-1, 1] == len(row.tokens)
        assert row.starts.tolist() == row.spans[:, 0].tolist()


@pytest.mark.slow
def test_one_tokenizer_without_bytes(tmp_path: Path) -> None:
    """Nothing is aligned between models of one tokenizer."""
    model = model_with(tmp_path, "word_piece")
    metrics = distilled(tmp_path, teacher=model, student=model, distill={**SHORT, "label_weight": 0.0})
    assert all(np.isfinite([row["token"], row["text"]]).all() and "label" not in row for row in metrics)
    rows, inputs = aligned(tmp_path, "distill.label_weight=0")
    assert len(rows) == 30 and inputs["same_tokenizer"] and inputs["groups"] is None
    for row in rows:
        assert row.spans.tolist() == [[i, i + 1] for i in range(row.start, len(row.tokens))]
