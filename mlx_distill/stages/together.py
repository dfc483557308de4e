"""Where the ranks of a training meet before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_distill.errors import FileError


def meet(out: Path, key: str, here: Callable[[], str] | None = None) -> bool:
    """Whether a training begins: rank 0 says so by its key, and the others look whether it is theirs too. Alone, only what was said.

    Args:
        out: The run's folder.
        key: Of the stage, from rank 0; empty where nothing is to do.
        here: The key by what stands in another rank's own folder.

    Raises:
        FileError: a rank has other rows or another base model.
        DistillError: another rank was lost.
    """
    from mlx_distill.train.distributed import current_ranks

    ranks = current_ranks()
    told = ranks.tell(key)
    if ranks.largest(float(bool(told) and here is not None and here() != told)):
        cure = "share the folder, or copy rank 0's to the same place on the other machines, then launch again"
        raise FileError(f"{out}: not the same rows and base model for every rank", fix=cure)
    return bool(told)
