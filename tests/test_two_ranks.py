"""A training stage on two machines that share nothing but the wire: rank 0 writes, the other trains along on
what was copied to it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import killed_run
from helpers.launch import ends_of
from helpers.small_chain import finished, whole_stages

from mlx_distill.errors import ConfigError, FileError
from mlx_distill.pipeline import run
from mlx_distill.storage import read_manifest
from mlx_distill.train import distributed as together
from mlx_distill.train.distributed import Ranks


def make_machine(folder: Path) -> None:
    """A folder with a recipe, its rows and the base model, as another machine would get them."""
    folder.mkdir(parents=True)
    for path in finished().iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    for name in ("data", "teacher_base"):
        shutil.copytree(finished() / "out" / name, folder / "out" / name)


def launch(folder: Path, killed: str = "") -> list[tuple[int, str]]:
    """``teach`` on two ranks, each in a folder of its own; rank 0 is killed where it is about to put
    ``killed`` into place.
    """
    runs = [[sys.executable, killed_run.__file__, "recipe.yaml", "out", at, "teach"] for at in (killed, "")]
    return ends_of(folder, runs, [folder / "0", folder / "1"])


def test_teach_on_two_machines_goes_on_bitwise_after_a_kill(tmp_path: Path) -> None:
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
    ours, theirs = (read_manifest(folder / "0" / "out" / "teacher") for folder in (cut, whole))
    assert ours is not None and theirs is not None and ours.content == theirs.content
    assert ours.recorded["resumed"] == 2 and theirs.recorded["resumed"] == 0


class Told(Ranks):
    """Rank 1 of two, to which rank 0 says ``word``."""

    word = "key"

    def broadcast_text(self, text: str) -> str:
        return self.word

    def max(self, value: float) -> float:
        return value


@pytest.mark.parametrize(
    ("word", "here", "begins"), [("key", "key", True), ("", "key", False), ("key", "other", None)]
)
def test_ranks_begin_together_on_the_same_rows_and_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str, here: str, begins: bool | None
) -> None:
    ranks = Told(1, 2)
    monkeypatch.setattr(Told, "word", word)
    monkeypatch.setattr("mlx_distill.train.distributed.current_ranks", lambda: ranks)
    key: Callable[[], str] = lambda: here  # noqa: E731
    if begins is None:
        with pytest.raises(FileError, match="not the same rows and base model") as caught:
            together.agree_on_key(tmp_path, "", key)
        assert "copy" in (caught.value.fix or "")
    else:
        assert together.agree_on_key(tmp_path, "", key) is begins


@pytest.mark.parametrize("only", [None, "targets"])
def test_what_is_no_training_is_for_one_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, only: str | None
) -> None:
    monkeypatch.setattr("mlx_distill.pipeline.rank_and_size", lambda: (1, 2))
    with pytest.raises(ConfigError, match="on 2 ranks") as caught:
        run("tiny", tmp_path / "out", only=only)
    assert "teach or distill" in (caught.value.fix or "") and not (tmp_path / "out").exists()
