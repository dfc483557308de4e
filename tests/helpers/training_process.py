"""Trainings in processes of their own, alone or as ranks, some of which the tests kill.

    training_process.py FOLDER kill|interrupt SEED N CASE...
        train the cases one after the other; the N-th is killed or interrupted at a part that the seed
        determines
    training_process.py FOLDER lose RANK SEED N CASE...
        the same on ranks, of which that one is killed
    training_process.py FOLDER shared CASE...
        train on ranks, and save what the tests of ranks compare

A case is an index of ``CASES``, as the name of its folder below FOLDER; for ``shared``, settings as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlx_distill.runtime import load_blas

load_blas()

import mlx.core as mx

from helpers.training_cases import CASES, counted_bases, hit_after, random_part, run_case
from mlx_distill.errors import DistillError
from mlx_distill.train.distributed import current_ranks


def main(folder: Path, how: str, *arguments: str) -> int:
    if how == "shared":
        return shared(folder, *arguments)
    mine, arguments = (
        (current_ranks().rank == int(arguments[0]), arguments[1:]) if how == "lose" else (True, arguments)
    )
    seed, number, *cases = arguments
    for place, case in enumerate(cases):
        with ExitStack() as stack:
            if place == int(number) and mine:
                hit = partial(os.kill, os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)
                stack.enter_context(
                    hit_after(random_part(f"{seed}/{place}", 40 if how == "lose" else 1), hit)
                )
            try:
                keep(folder / case, run_case(folder / case, CASES[int(Path(case).name)])[0])
            except DistillError as error:
                print(error, file=sys.stderr, flush=True)
                return error.exit_code
    return 0


def keep(folder: Path, weights: dict[str, mx.array]) -> None:
    """Save this rank's final weights."""
    mx.save_safetensors(str(folder / f"final-{current_ranks().rank}.safetensors"), weights)


def shared(folder: Path, *cases: str) -> int:
    """Train without dropout, counting the bases that this rank computes; then the gradients of every cut that
    ranks share.
    """
    from helpers.real_models import write_shares

    ranks, bases = current_ranks(), []
    for place, case in enumerate(cases):
        with counted_bases() as found:
            keep(folder / str(place), run_case(folder / str(place), json.loads(case), dropout=0.0)[0])
        bases.append(len(found))
    (folder / f"bases-{ranks.rank}.json").write_text(json.dumps(bases))
    write_shares(folder / "windows", ranks)
    print("finished", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
