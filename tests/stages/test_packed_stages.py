"""``packing: true`` in a recipe: the stages that train see the same rows, with the same loss, in fewer lines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.small_chain import TRAININGS, make_context

from mlx_distill.errors import ConfigError
from mlx_distill.recipe import load_recipe
from mlx_distill.stages import training
from mlx_distill.storage.array_store import Store


def one_step(folder: Path, stage: str, packing: bool) -> tuple[dict[str, Any], list[str]]:
    """The metrics of one step over all training rows, and what was noted."""
    values = {
        "packing": packing,
        "steps": 0,
        "epochs": 1,
        "accumulate": 1000,
        "lora_dropout": 0,
        "evaluate_every": 1,
        "max_length": 512,
    }
    context = make_context(*(f"{stage}.{key}={json.dumps(value)}" for key, value in values.items()))
    folder.mkdir()
    TRAININGS[stage](context, folder)
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return row, context.progress.notes  # type: ignore[attr-defined]


@pytest.fixture
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows alone: a step over all of them takes a while."""
    whole = training._batches

    def first(rows: Store[Any], count: int) -> Store[Any]:
        some = copy.copy(rows)
        some._counts = rows._counts[:count]
        return some

    monkeypatch.setattr(
        training, "_batches", lambda *args: whole(*args[:3], first(args[3], 20), first(args[4], 4), *args[5:])
    )


@pytest.mark.usefixtures("_few_rows")
@pytest.mark.parametrize("stage", ["teach", "distill"])
def test_packing_changes_lines_and_not_the_loss(tmp_path: Path, stage: str) -> None:
    plain, quiet = one_step(tmp_path / "plain", stage, packing=False)
    packed, notes = one_step(tmp_path / "packed", stage, packing=True)
    (note,) = [note for note in notes if "20 rows in " in note]
    assert not quiet and "lines of 512 tokens" in note and note.endswith("; batch_size 4 counts lines")
    assert packed["tokens"] == plain["tokens"]
    for name in {"loss", "label", "token", "text", "grad_norm", "valid_loss"} & set(plain):
        assert packed[name] == pytest.approx(plain[name], rel=1e-4), name


def test_distillation_learns_the_teachers_turn_and_says_so_when_asked_for_all() -> None:
    with pytest.raises(ConfigError, match="loss_on"):
        load_recipe("tiny", ["distill.loss_on=all"])
    assert load_recipe("tiny", ["teach.loss_on=all"]).teach.loss_on == "all"
