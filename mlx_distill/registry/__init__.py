"""The registry: versions of models, what serves, and why."""

from __future__ import annotations

from mlx_distill.registry.records import Deployment, Model, Version
from mlx_distill.registry.resolve import ResolvedModel, resolve_model
from mlx_distill.registry.versions import (
    add_version,
    get_version,
    lineage,
    list_models,
    list_versions,
    parse_version,
)

__all__ = [
    "Deployment",
    "Model",
    "ResolvedModel",
    "Version",
    "add_version",
    "get_version",
    "lineage",
    "list_models",
    "list_versions",
    "parse_version",
    "resolve_model",
]
