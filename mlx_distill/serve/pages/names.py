"""The names of models that a page offers."""

from __future__ import annotations

from mlx_distill.evaluate.comparison_inputs import EVALUATIONS
from mlx_distill.ledger.database import Ledger
from mlx_distill.models.trained_on import is_run
from mlx_distill.registry.records import READY
from mlx_distill.registry.versions import list_versions

_MOST = 200


def run_names(ledger: Ledger) -> list[str]:
    """The runs in the root and in its folder ``runs``, relative to the root."""
    root = ledger.root
    folders = [path for place in (root.path, root.runs) if place.is_dir() for path in sorted(place.iterdir())]
    return [root.relative(path) for path in folders[:_MOST] if not path.is_symlink() and is_run(path)]


def comparable_names(ledger: Ledger) -> list[str]:
    """What can be compared: versions that are ready, and the evaluated models of runs."""
    names = [version.name for version in list_versions(ledger, state=READY)]
    for run in run_names(ledger):
        folder = ledger.root.path / run / EVALUATIONS
        names += [f"{run}:{path.name}" for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return names
