"""A version is checked before it serves: the hashes of its files, and its answers to its golden rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.ledger.database import Ledger
from mlx_distill.registry import get_version
from mlx_distill.registry.contents import check_files
from mlx_distill.registry.golden import golden_answers
from mlx_distill.registry.verify import Verification, require_verified, verify_version
from mlx_distill.serve.loading import LoadedModel, Resolved, unload


def load_checked(ledger: Ledger, resolved: Resolved, load: Callable[[], LoadedModel]) -> LoadedModel:
    """Load a model. A version of the registry has to have the files that it was added with, and answers its
    golden rows first; of a folder nothing is known.

    Args:
        ledger: The ledger.
        resolved: The model.
        load: Loads it.

    Raises:
        ModelError: it is not what was added; it is not in memory then.
    """
    if resolved.model is None or resolved.version is None:
        return load()
    loaded: list[LoadedModel] = []

    def answer(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        one = load()
        loaded.append(one)
        work = one.worker.call(lambda: golden_answers(one.model, one.tokenizer, one.task, rows))
        return work.result()

    version = get_version(ledger, resolved.model, resolved.version)
    try:
        require_verified(version, verify_version(ledger, version, answer))
    except BaseException:
        for one in loaded:
            unload(one)
        raise
    return loaded[0]


def require_files(ledger: Ledger, resolved: Resolved) -> None:
    """Hash the files of a version, before what serves is unloaded for it.

    Raises:
        ModelError: one is missing or has changed.
    """
    if resolved.model is None or resolved.version is None:
        return
    version = get_version(ledger, resolved.model, resolved.version)
    problem = check_files(ledger.root.inside(version.kept), version.info["files"])
    if problem is not None:
        require_verified(version, Verification(False, problem, damaged=True))
