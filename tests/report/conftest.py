"""Reports that several files of tests read; they must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import MODELS, RECIPE, make_run, make_task

from mlx_distill.report import build_report


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run's folder and its report, with all models."""
    folder = tmp_path_factory.mktemp("run")
    return folder, build_report(folder, RECIPE, make_task(), make_run(folder, make_task(), models=MODELS))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose quantized model computed with quantized weights, the others with dequantized ones."""
    folder = tmp_path_factory.mktemp("mixed")
    return build_report(folder, RECIPE, make_task(), make_run(folder, make_task(), quantized=("quantized",)))
