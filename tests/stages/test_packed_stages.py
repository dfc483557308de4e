"""``packing: true`` in a recipe: training sees the same rows, with the same loss, in fewer sequences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.small_chain import TRAININGS, finished, make_context

from mlx_distill.errors import ConfigError
from mlx_distill.recipe import load_recipe
from mlx_distill.stages.targets import targets


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data folder has 20 training and 4 validation rows: a step over all rows takes a while."""
    out = Path(shutil.copytree(finished() / "out", tmp_path_factory.mktemp("few") / "out"))
    for split, count in (("train", 20), ("valid", 4)):
        path = out / "data" / f"{split}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    shutil.rmtree(out / "targets")
    (out / "targets").mkdir()
    targets(make_context(run=out), out / "targets")
    return out


def one_step(
    folder: Path, out: Path, stage: str, packing: bool, **others: Any
) -> tuple[dict[str, Any], list[str]]:
    """The metrics of one step over all training rows, and the notes."""
    values = {
        "packing": packing,
        "steps": 0,
        "epochs": 1,
        "accumulate": 1000,
        "lora_dropout": 0,
        "evaluate_every": 1,
        "max_length": 512,
        **others,
    }
    context = make_context(*(f"{stage}.{key}={json.dumps(value)}" for key, value in values.items()), run=out)
    folder.mkdir()
    TRAININGS[stage](context, folder)
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return row, context.progress.notes  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teach", "distill"])
def test_packing_changes_sequences_and_not_the_loss(tmp_path: Path, few_rows: Path, stage: str) -> None:
    plain, quiet = one_step(tmp_path / "plain", few_rows, stage, packing=False)
    packed, notes = one_step(tmp_path / "packed", few_rows, stage, packing=True)
    (note,) = [note for note in notes if "20 rows in " in note]
    assert not [other for other in quiet if "sequences" in other]
    assert "sequences of 512 tokens" in note and note.endswith("; batch_size 4 counts sequences")
    assert packed["tokens"] == plain["tokens"]
    for name in {"loss", "label", "token", "text", "grad_norm", "valid_loss"} & set(plain):
        assert packed[name] == pytest.approx(plain[name], rel=1e-4), name


@pytest.mark.slow
def test_beside_a_live_teacher_neither_packing_nor_accumulation_changes_the_loss(
    tmp_path: Path, few_rows: Path
) -> None:
    plain, packed, small = (
        one_step(tmp_path / str(number), few_rows, "distill", packing, teacher="live", batch_size=size)[0]
        for number, (packing, size) in enumerate([(False, 4), (True, 4), (False, 1)])
    )
    cached, _ = one_step(tmp_path / "cached", few_rows, "distill", packing=False)
    for other in (packed, small):
        for name in ("loss", "label", "token", "text", "grad_norm", "valid_loss"):
            assert other[name] == pytest.approx(plain[name], rel=1e-4), name
    assert plain["label"] == pytest.approx(cached["label"], rel=1e-5)
    # Eight of some hundred tokens are cached, with a bucket for the others: less than the whole divergence.
    assert 0 < cached["token"] < plain["token"]


def test_distillation_refuses_loss_on_all() -> None:
    with pytest.raises(ConfigError, match="loss_on"):
        load_recipe("tiny", ["distill.loss_on=all"])
    assert load_recipe("tiny", ["teach.loss_on=all"]).teach.loss_on == "all"
