"""A killed rank ends the other ranks with an error, and the same launch again resumes bitwise."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.launch import two_ranks
from helpers.training_cases import CASES, KILLED, same, steps_of

from mlx_distill.errors import DistillError
from mlx_distill.train import checkpoint
from mlx_distill.train.distributed import Ranks

# LoRA over packed sequences, recomputed, with an uneven tail every epoch; GaLore. Both with dropout, of which
# each rank draws its own.
PLACES = [str(CASES.index(case)) for case in KILLED[:0:-1]]


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_both_resume_bitwise(tmp_path: Path) -> None:
    """Rank 1 is lost in the first training, rank 0, which writes the checkpoints, in the second."""
    seed = str(random.randrange(10**6))
    cut, whole = ([f"{name}/{place}" for place in PLACES] for name in ("cut", "whole"))
    for lost, number in ((1, 0), (0, 1)):
        ends = two_ranks(tmp_path, "lose", str(lost), seed, str(number), *cut)
        assert ends[lost][0] == -9, (seed, ends)
        code, said = ends[1 - lost]
        assert (
            code == 1
            and f"rank {1 - lost}: another rank was lost" in said
            and "goes on from the last checkpoint" in said
        ), (seed, said)
        last = checkpoint.latest(tmp_path / cut[number] / "checkpoints")
        assert last is not None and len(checkpoint.read_state(last)["random"]) == 2, seed
    assert [code for code, _ in two_ranks(tmp_path, "lose", "0", seed, "-1", *cut, *whole)] == [0, 0], seed
    for pair in zip(cut, whole, strict=True):
        ours, theirs = (tmp_path / name for name in pair)
        assert steps_of(ours) == steps_of(theirs), (seed, pair)
        for rank in (0, 1):
            assert same(
                *(dict(mx.load(str(path / f"final-{rank}.safetensors"))) for path in (ours, theirs))
            ), (seed, pair)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ask",
    [
        lambda ranks: ranks.sum([1.0]),
        lambda ranks: ranks.max(1.0),
        lambda ranks: ranks.gather([1]),
        lambda ranks: ranks.sum_arrays({"a": mx.ones((2,))}),
        lambda ranks: ranks.broadcast({"a": mx.ones((2,))}),
        lambda ranks: ranks.broadcast_text("a"),
        lambda ranks: ranks.barrier(),
    ],
)
def test_every_collective_operation_reports_a_lost_rank(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[Ranks], Any]
) -> None:
    said = "[ring] Receiving from socket 3 failed"

    def fail(*_: Any) -> None:
        raise RuntimeError(said)

    for name in ("all_sum", "all_max", "all_gather"):
        monkeypatch.setattr(mx.distributed, name, fail)
    ask(Ranks())  # alone there is no one to ask
    with pytest.raises(DistillError, match=r"rank 1: another rank was lost \(\[ring\]") as caught:
        ask(Ranks(1, 2))
    assert caught.value.fix
    said = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        ask(Ranks(1, 2))
