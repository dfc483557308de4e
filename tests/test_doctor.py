"""Doctor: each problem comes with its fix, and only one that stops a command is bad."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_distill import doctor, runtime
from mlx_distill.doctor import precision


def _check(diagnosis: doctor.Diagnosis, name: str) -> doctor.Check:
    return next(check for check in diagnosis.checks if check.name == name)


@pytest.mark.parametrize(
    ("state", "path", "expected", "fix"),
    [
        ("loaded", "/lib/libopenblas.so.0", "ok", None),
        ("not needed", None, "ok", None),
        ("missing", None, "slow", "apt install libopenblas0-pthread"),
        ("too late", "/lib/libopenblas.so.0", "slow", "import mlx_distill"),
        ("disabled", None, "slow", "unset MLX_DISTILL_BLAS"),
    ],
)
def test_each_state_of_the_blas_has_its_fix(
    monkeypatch: pytest.MonkeyPatch, state: str, path: str | None, expected: str, fix: str | None
) -> None:
    monkeypatch.setattr(runtime, "_blas", runtime.Blas(state, path))
    diagnosis = doctor.diagnose()
    check = _check(diagnosis, "blas")
    assert check.state == expected
    assert (fix is None) == (check.fix is None)
    assert fix is None or (check.fix is not None and fix in check.fix)
    assert diagnosis.healthy


def test_on_a_mac_no_other_blas_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(runtime, "_blas", None)
    monkeypatch.setenv("MLX_DISTILL_BLAS", "/no/such/library")
    assert runtime.load_blas() == runtime.Blas("not needed")


@pytest.mark.skipif(sys.platform != "linux", reason="no other BLAS is loaded on a Mac")
def test_loading_the_blas_after_mlx_is_too_late(tmp_path: Path) -> None:
    fake = tmp_path / "libopenblas.so.0"
    fake.touch()
    code = "import mlx.core; from mlx_distill.runtime import load_blas; print(load_blas().state)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"MLX_DISTILL_BLAS": str(fake)},
    )
    assert result.stdout.strip() == "too late", result.stderr


_ASKS = """
import os
from mlx_distill import runtime
blas = runtime.load_blas()
print(runtime.blas_kernels(blas.path) if blas.path else blas.state, os.environ.get("OPENBLAS_CORETYPE"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other BLAS is loaded on a Mac")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sse2"}, None),
        ({"sse2", "avx2", "fma"}, "Haswell"),
        ({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}, "SkylakeX"),
    ],
)
def test_the_kernels_of_the_blas_are_those_of_the_processor(
    flags: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenBLAS takes those for SSE2 on a processor whose model it does not know."""
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(runtime, "_processor_flags", lambda: flags)
    with runtime._kernels_of_this_processor():
        assert os.environ.get("OPENBLAS_CORETYPE") == expected
    assert "OPENBLAS_CORETYPE" not in os.environ  # NumPy's OpenBLAS would read it
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    with runtime._kernels_of_this_processor():
        assert os.environ["OPENBLAS_CORETYPE"] == "Nehalem"
    assert os.environ["OPENBLAS_CORETYPE"] == "Nehalem"


@pytest.mark.skipif(sys.platform != "linux", reason="no other BLAS is loaded on a Mac")
def test_the_kernels_are_chosen_before_the_blas_is_loaded() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    found = subprocess.run(
        [sys.executable, "-c", _ASKS], capture_output=True, text=True, timeout=60, env=environment
    )
    kernels, _, left = found.stdout.strip().rpartition(" ")
    assert left == "None", found.stderr
    if {"avx2", "fma"} <= runtime._processor_flags():
        assert kernels not in ("Prescott", "Core2", "Nehalem")


def test_a_missing_core_package_is_bad_and_a_missing_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: name not in ("llguidance", "trackio") and installed(name)
    )
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert _check(diagnosis, "versions").state == "bad"
    assert "missing: llguidance" in _check(diagnosis, "versions").detail
    assert _check(diagnosis, "track") == doctor.Check(
        "track",
        "optional",
        "trackio not installed: a dashboard of the runs' curves",
        "pip install 'mlx-distill[track]'",
    )


def test_every_problem_has_a_fix() -> None:
    diagnosis = doctor.diagnose()
    assert all(check.fix for check in diagnosis.checks if check.state != "ok")
    assert len(diagnosis.lines()) == len(diagnosis.checks) + sum(
        check.fix is not None for check in diagnosis.checks
    )


def test_products_in_fewer_bits_are_told() -> None:
    assert precision().state == "ok"

    def rounded(x: mx.array) -> mx.array:  # to the 11 bits of TF32
        return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)

    coarse = precision(lambda a, b: rounded(a) @ rounded(b))
    assert coarse.state == "coarse" and "MLX_ENABLE_TF32=0" in str(coarse.fix)
    assert "within 3e-04 of float64" in coarse.detail
