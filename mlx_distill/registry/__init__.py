"""The registry: versions of models, which of them serves, and why.

>>> import tempfile
>>> from mlx_distill import registry
>>> ledger = registry.open_ledger(tempfile.mkdtemp())
>>> registry.list_models(ledger)
[]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_distill.registry.archiving import archive as archive
    from mlx_distill.registry.archiving import delete_files as delete_files
    from mlx_distill.registry.deploy import current_deployment as current_deployment
    from mlx_distill.registry.deploy import history as history
    from mlx_distill.registry.deploy import promote as promote
    from mlx_distill.registry.deploy import promote_external as promote_external
    from mlx_distill.registry.deploy import rollback as rollback
    from mlx_distill.registry.external import call_external as call_external
    from mlx_distill.registry.gates import GateLimits as GateLimits
    from mlx_distill.registry.records import Deployment as Deployment
    from mlx_distill.registry.records import Model as Model
    from mlx_distill.registry.records import Version as Version
    from mlx_distill.registry.resolve import ResolvedModel as ResolvedModel
    from mlx_distill.registry.resolve import resolve_model as resolve_model
    from mlx_distill.registry.verify import verify_version as verify_version
    from mlx_distill.registry.versions import add_version as add_version
    from mlx_distill.registry.versions import get_version as get_version
    from mlx_distill.registry.versions import lineage as lineage
    from mlx_distill.registry.versions import list_models as list_models
    from mlx_distill.registry.versions import list_versions as list_versions
    from mlx_distill.registry.versions import open_ledger as open_ledger
    from mlx_distill.registry.versions import parse_version as parse_version

_MODULES = {
    "archiving": ("archive", "delete_files"),
    "deploy": ("current_deployment", "history", "promote", "promote_external", "rollback"),
    "external": ("call_external",),
    "gates": ("GateLimits",),
    "records": ("Deployment", "Model", "Version"),
    "resolve": ("ResolvedModel", "resolve_model"),
    "verify": ("verify_version",),
    "versions": (
        "add_version",
        "get_version",
        "lineage",
        "list_models",
        "list_versions",
        "open_ledger",
        "parse_version",
    ),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
