"""A training stage on two machines without a shared folder: rank 0 writes the result, rank 1 trains on copies
of rows and base model.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from helpers import killed_run
from helpers.launch import ends_of
from helpers.small_chain import finished, whole_stages

from mlx_distill.errors import ConfigError, FileError
from mlx_distill.pipeline import run
from mlx_distill.storage import read_jsonl, read_manifest
from mlx_distill.train.distributed import Ranks, agree_on_key

pytestmark = pytest.mark.slow


# What a training stage reads. The first rank of `teach` answers rows at each validation, and both go by what
# it found; the teacher of `distill` is beside the student on either.
READS = {
    "teach": ("data", "teacher_base"),
    "distill": ("data", "teacher_base", "student_base", "teacher", "targets"),
}
SETTINGS = {
    "teach": {"evaluate_rows": 2, "best_metric": "token_accuracy", "use_best": True},
    "distill": {"teacher": "live", "steps": 3, "checkpoint_every": 1, "evaluate_every": 0},
}


def make_machine(folder: Path, stage: str = "teach") -> None:
    """A folder with a recipe, and what the stage reads as it would be copied to another machine."""
    folder.mkdir(parents=True)
    for path in finished().iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe[stage] = {**recipe[stage], **SETTINGS[stage]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for name in READS[stage]:
        shutil.copytree(finished() / "out" / name, folder / "out" / name)


def launch(folder: Path, killed: str = "", stage: str = "teach") -> list[tuple[int, str]]:
    """A stage on two ranks, each in its own folder; rank 0 is killed just before the rename to a path that
    matches ``killed``.
    """
    runs = [[sys.executable, killed_run.__file__, "recipe.yaml", "out", at, stage] for at in (killed, "")]
    return ends_of(folder, runs, [folder / "0", folder / "1"])


def test_teach_on_two_machines_resumes_bitwise_after_a_kill(tmp_path: Path) -> None:
    """The second machine has no checkpoint: it gets weights, optimizer and position from the first."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder in (cut / "0", cut / "1", whole / "0", whole / "1"):
        make_machine(folder)
    (lost, _), (code, said) = launch(cut, r"checkpoints/step-0*4$")
    assert lost == -9 and code == 1 and "rank 1: another rank was lost" in said, said
    for folder in (cut, whole):
        assert [code for code, _ in launch(folder)] == [0, 0]
        assert whole_stages(folder / "0" / "out") == ["data", "teacher", "teacher_base"]
        assert whole_stages(folder / "1" / "out") == ["data", "teacher_base"]
    measured = [row for _, row in read_jsonl(cut / "0" / "out" / "teacher" / "metrics.jsonl")]
    assert [row["step"] for row in measured if "valid_token_accuracy" in row] == [3, 5]
    ours, theirs = (read_manifest(folder / "0" / "out" / "teacher") for folder in (cut, whole))
    assert ours is not None and theirs is not None and ours.content == theirs.content
    assert ours.recorded["resumed"] == 2 and theirs.recorded["resumed"] == 0


def test_distill_beside_a_live_teacher_on_two_machines_resumes_bitwise_after_a_kill(tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder in (cut / "0", cut / "1", whole / "0", whole / "1"):
        make_machine(folder, "distill")
    (lost, said), _ = launch(cut, r"checkpoints/step-0*2$", "distill")
    assert lost == -9, said
    for folder in (cut, whole):
        assert [code for code, _ in launch(folder, stage="distill")] == [0, 0]
    ours, theirs = (read_manifest(folder / "0" / "out" / "student") for folder in (cut, whole))
    assert ours is not None and theirs is not None and ours.content == theirs.content
    assert ours.recorded["resumed"] == 1 and theirs.recorded["resumed"] == 0


@dataclass(frozen=True)
class SecondRank(Ranks):
    """Rank 1 of two, which gets ``text`` from rank 0."""

    text: str = ""

    def broadcast_text(self, text: str) -> str:
        return self.text

    def max(self, value: float) -> float:
        return value


@pytest.mark.parametrize(
    ("key", "own_key", "starts"), [("key", "key", True), ("", "key", False), ("key", "other", None)]
)
def test_ranks_start_together_with_the_same_rows_and_model(
    tmp_path: Path, key: str, own_key: str, starts: bool | None
) -> None:
    ranks = SecondRank(1, 2, key)
    if starts is None:
        with pytest.raises(FileError, match="not the same rows and base model") as caught:
            agree_on_key(tmp_path, "", lambda: own_key, ranks)
        assert "copy" in (caught.value.fix or "")
    else:
        assert agree_on_key(tmp_path, "", lambda: own_key, ranks) is starts


@pytest.mark.parametrize("only", [None, "targets"])
def test_only_training_stages_run_on_several_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, only: str | None
) -> None:
    monkeypatch.setattr("mlx_distill.pipeline.rank_and_size", lambda: (1, 2))
    with pytest.raises(ConfigError, match="on 2 ranks") as caught:
        run("tiny", tmp_path / "out", only=only)
    assert "teach or distill" in (caught.value.fix or "") and not (tmp_path / "out").exists()
