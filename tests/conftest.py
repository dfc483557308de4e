"""Set up for every test: the fast BLAS, no network, one seed."""

from __future__ import annotations

import ipaddress
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from helpers.checkpoints import copy as copy
from helpers.checkpoints import golden as golden
from helpers.checkpoints import logits as logits
from helpers.checkpoints import tools as tools

from mlx_distill.runtime import load_blas

# Both before anything imports mlx or a hub client.
load_blas()
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)

# The same examples on every machine, and nothing written into the tree.
hypothesis.settings.register_profile("repeatable", database=None, deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def _refuse_network(address: Any) -> None:
    if isinstance(address, tuple):
        host = str(address[0])
        try:
            loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        except ValueError:
            loopback = host in ("", "localhost")
        if not loopback:
            raise AssertionError(f"a test reached for the network: {address}")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to anything but this machine is a failure, not a slow test."""
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, original: Any = original) -> Any:
            _refuse_network(address)
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    import mlx.core as mx
    import numpy as np

    random.seed(0)
    np.random.seed(0)
    mx.random.seed(0)


# Of mx.linalg, what Metal runs itself.
_ON_THE_GPU_TOO = {"norm", "cross"}


@pytest.fixture(autouse=True, scope="session")
def _linear_algebra_on_the_cpu() -> Iterator[None]:
    """Every call of ``mx.linalg`` that the package makes in any test names the CPU stream, or would fail on
    Metal.
    """
    import mlx.core as mx

    def guard(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            module = sys._getframe(1).f_globals.get("__name__", "")
            if module.startswith("mlx_distill") and kwargs.get("stream") is not mx.cpu:
                raise AssertionError(f"{module} calls mx.linalg.{name} without stream=mx.cpu")
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (n for n in dir(mx.linalg) if not n.startswith("_") and n not in _ON_THE_GPU_TOO):
            patch.setattr(mx.linalg, name, guard(name, getattr(mx.linalg, name)))
        yield


@pytest.fixture
def run_copy(tmp_path: Path) -> Path:
    """A copy of a finished run's folder."""
    from helpers.small_chain import finished

    return Path(shutil.copytree(finished() / "out", tmp_path / "out"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a stage works."""
    (tmp_path / "partial").mkdir()
    return tmp_path / "partial"


@pytest.fixture
def runner() -> Any:
    """Click's runner: ``runner.invoke(cli, [...])``."""
    from click.testing import CliRunner

    return CliRunner()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked parity run where the references are installed; elsewhere the closing line counts them as
    deselected.
    """
    from importlib.util import find_spec

    if all(find_spec(name) for name in ("torch", "transformers", "peft", "sklearn", "statsmodels")):
        return
    left_out = [item for item in items if item.get_closest_marker("parity")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _remove_shared(config: pytest.Config) -> None:
    """Remove what the processes of a session share, unless this process is one of several."""
    from helpers.small_chain import session_folder

    if not hasattr(config, "workerinput"):
        shutil.rmtree(session_folder(worker=False), ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Begin without what a killed session of the same number has left."""
    _remove_shared(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it, when all processes have ended."""
    _remove_shared(config)
