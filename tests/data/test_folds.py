"""Folds of a cross-validation in prepared rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.prepare import prepare
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import DataConfig, SourceConfig
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task

SPLITS = ("train", "valid", "test")
ARTISTS = 12


def rows() -> list[dict[str, Any]]:
    """Ninety songs by twelve artists, of which three have a near duplicate by nobody in particular."""
    out = []
    for i in range(90):
        text = " ".join(f"w{(i * 37 + j * j * (i + 3)) % 997}" for j in range(50))
        answer = {"verdict": "yes" if i % 3 else "no", "score": i}
        out.append({"id": f"s{i}", "title": f"Song {i}", "text": text, "artist": f"a{i % ARTISTS}"})
        out[-1] |= {"genre": "folk" if i % 2 else "pop", "answer": answer}
    for i in range(3):
        out.append({**out[i], "id": f"copy{i}", "text": out[i]["text"] + " extra", "artist": None})
    return out


def prepared(folder: Path, task: Task, **settings: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of each split by id."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    config = DataConfig(
        sources=[SourceConfig(path=str(folder / "rows.jsonl"))], valid_fraction=0.1, **settings
    )
    prepare(config, task, None, folder)
    return {split: {row["id"]: row for _, row in read_jsonl(folder / f"{split}.jsonl")} for split in SPLITS}


def test_every_row_is_tested_once_and_artists_and_near_duplicates_never_straddle(
    tmp_path: Path, task: Task
) -> None:
    task = replace(task, cluster="artist")
    folds = [prepared(tmp_path / str(i), task, folds=3, fold=i) for i in (1, 2, 3)]
    tested = [id for fold in folds for id in fold["test"]]
    assert len(tested) == len(set(tested)) == 93
    for fold in folds:
        assert sorted(id for split in SPLITS for id in fold[split]) == sorted(tested)
        assert 25 <= len(fold["test"]) <= 37 and fold["valid"]
        of_split = {id: split for split in SPLITS for id in fold[split]}
        artists = {
            split: {row["fields"]["artist"] for row in fold[split].values()} - {None} for split in SPLITS
        }
        for a, b in (("train", "test"), ("train", "valid"), ("valid", "test")):
            assert not artists[a] & artists[b]
        assert all(of_split[f"copy{i}"] == of_split[f"s{i}"] for i in range(3))
        shares = [sum(row["answer"]["verdict"] == "no" for row in fold["test"].values()) / len(fold["test"])]
        assert abs(shares[0] - 1 / 3) < 0.15


def test_rows_that_ask_for_test_are_left_alone(tmp_path: Path, task: Task) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    marked = [{**row, "split": "test" if i % 4 == 0 else "train"} for i, row in enumerate(rows()[:60])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    config = DataConfig(sources=[SourceConfig(path=str(folder / "rows.jsonl"))], folds=2, fold=1)
    statistics = prepare(config, task, None, folder)
    assert sum(statistics["rows"].values()) == 45 and statistics["rows"]["test"] in (22, 23)
    assert [
        entry["count"] for reason, entry in statistics["dropped"].items() if "leaves alone" in reason
    ] == [15]


def test_a_share_of_the_training_rows_leaves_the_other_splits_as_they_are(tmp_path: Path, task: Task) -> None:
    whole = prepared(tmp_path / "whole", task, folds=3, fold=2)
    half = prepared(tmp_path / "half", task, folds=3, fold=2, train_share=0.5)
    assert half["test"] == whole["test"] and half["valid"] == whole["valid"]
    assert half["train"].keys() < whole["train"].keys()
    assert abs(len(half["train"]) - len(whole["train"]) / 2) <= 2


@pytest.mark.parametrize("settings", [{"folds": 1}, {"folds": 3, "fold": 4}])
def test_no_such_fold(tmp_path: Path, task: Task, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"data\.fold"):
        prepared(tmp_path / "x", task, **settings)
