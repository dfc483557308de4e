"""Checks of the machine and the installation; each problem comes with its fix."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_distill.runtime import blas_kernels, load_blas, processor, total_memory, versions

_GB = 1e9
_COARSE = 3e-5  # between the errors of float32 (1e-6) and TF32 (4e-4)
_NEEDED = (
    "mlx",
    "mlx_lm",
    "numpy",
    "scipy",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "yaml",
    "jinja2",
    "jsonschema",
    "llguidance",
    "jaxtyping",
    "rich",
)
_EXTRAS = {
    "track": (("trackio",), "a dashboard of the runs' curves"),
    "text-metrics": (("rouge_score", "sacrebleu"), "the metrics rouge and bleu of a task"),
    "notebook": (("nbclient", "ipykernel"), "to execute the notebooks of the examples"),
    "parity": (
        ("torch", "transformers", "peft", "sklearn", "statsmodels"),
        "the references that the tests' golden values come from",
    ),
}


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. ``state`` is ``ok``, ``optional`` (missing, but not needed), ``slow``,
    ``coarse`` (float32 is computed in fewer bits) or ``bad`` (some command cannot run).
    """

    name: str
    state: str
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks."""

    checks: Sequence[Check]

    @property
    def healthy(self) -> bool:
        """Whether every command can run: no check is bad."""
        return all(check.state != "bad" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain values."""
        # cure is the earlier name of fix
        checks = [{**asdict(check), "cure": check.fix} for check in self.checks]
        return {"healthy": self.healthy, "checks": checks}

    def lines(self) -> list[str]:
        """The diagnosis for people: state, name and detail of each check, and the fix below."""
        width = max(len(check.name) for check in self.checks)
        out = []
        for check in self.checks:
            out.append(f"{check.state:<8}  {check.name:<{width}}  {check.detail}")
            if check.fix:
                out.append(f"{'':<8}  {'':<{width}}  fix: {check.fix}")
        return out


def diagnose(folder: str | Path = ".", recipe: str | Path | None = None) -> Diagnosis:
    """Check the machine, the installation, and the disk of ``folder``.

    Args:
        folder: Where runs are written.
        recipe: A recipe whose downloads and disk are stated a stage at a time and held against the free disk.

    >>> diagnosis = diagnose()
    >>> diagnosis.healthy, [check.name for check in diagnosis.checks][:3]
    (True, ['system', 'memory', 'versions'])
    """
    missing = [name for name in _NEEDED if not _installed(name)]
    checks = [_system(), _memory(), _versions(missing)]
    if "mlx" not in missing:
        checks += [_blas(), _device(), _speed(), precision()]
    checks += [_disk(Path(folder)), _hub(), *_extras()]
    return Diagnosis([*checks, *(_recipe(recipe, Path(folder)) if recipe else ())])


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _system() -> Check:
    import platform

    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    text = f"{system}, {processor()}, {os.cpu_count()} cores"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return Check(
            "system",
            "bad",
            text,
            "MLX needs Apple Silicon and an arm64 Python (this one may run under Rosetta)",
        )
    return Check("system", "ok", text)


def _memory() -> Check:
    return Check("memory", "ok", f"{total_memory() / _GB:.1f} GB")


def _versions(missing: Sequence[str]) -> Check:
    text = ", ".join(f"{name} {version}" for name, version in versions().items())
    if missing:
        return Check(
            "versions", "bad", f"{text}; missing: {', '.join(missing)}", "pip install --upgrade mlx-distill"
        )
    return Check("versions", "ok", text)


def _blas() -> Check:
    blas = load_blas()
    if blas.state == "missing":
        fix = "install OpenBLAS (Debian, Ubuntu: sudo apt install libopenblas0-pthread)"
        return Check("blas", "slow", "no OpenBLAS found; float32 matrix products use the reference BLAS", fix)
    if blas.state == "too late":
        fix = "import mlx_distill (or call mlx_distill.runtime.load_blas()) before mlx"
        return Check("blas", "slow", f"found {blas.path}, but mlx was imported first", fix)
    if blas.state == "disabled":
        return Check("blas", "slow", "turned off by MLX_DISTILL_BLAS=0", "unset MLX_DISTILL_BLAS")
    if blas.path is None:
        return Check("blas", "ok", blas.state)
    kernels = blas_kernels(blas.path)
    return Check("blas", "ok", f"loaded {blas.path}" + (f", kernels for {kernels}" if kernels else ""))


def _device() -> Check:
    import mlx.core as mx

    # Most of these keys are there on Metal only.
    info = mx.device_info()
    known = (
        ("device_name", 1, ""),
        ("architecture", 1, ""),
        ("max_recommended_working_set_size", _GB, " GB for the GPU"),
    )
    parts = [
        f"{float(info[key]) / scale:.1f}{unit}" if unit else str(info[key])
        for key, scale, unit in known
        if info.get(key)
    ]
    return Check("device", "ok", ", ".join([str(mx.default_device()), *dict.fromkeys(parts)]))


def _speed(size: int = 768) -> Check:
    import mlx.core as mx

    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a @ a)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - start)
    return Check(
        "speed",
        "ok",
        f"{2 * size**3 / best / 1e9:.0f} GFLOP/s in float32 matrix products (measured now, {size} x {size})",
    )


def precision(multiply: Callable[[Any, Any], Any] | None = None, size: int = 512) -> Check:
    """Whether float32 matrix products have float32's accuracy: by a product on the default device against the
    one in float64 on the CPU. A GPU may round the factors to TF32's 11 bits first (MLX does so on CUDA, and
    on Metal where the GPU can): the relative error is then some 4e-4 instead of 1e-6.

    Args:
        multiply: Multiplies two float32 arrays; that of MLX where None.
        size: Rows and columns of the matrices.
    """
    import mlx.core as mx
    import numpy as np

    a, b = (mx.random.normal((size, size), key=mx.random.key(seed)) for seed in (0, 1))
    exact = np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)
    error = np.linalg.norm(np.array((multiply or mx.matmul)(a, b)) - exact) / np.linalg.norm(exact)
    text = f"float32 matrix products are within {error:.0e} of float64 (measured now, {size} x {size})"
    if error < _COARSE:
        return Check("precision", "ok", text)
    fix = (
        "for float32 in full, as tests and comparisons with a reference need it: export MLX_ENABLE_TF32=0 "
        "before the program starts"
    )
    return Check("precision", "coarse", f"{text}: they are computed in fewer bits, as TF32 is", fix)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / _GB
    text = f"{free:.1f} GB free under {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "slow", f"{text}, but not writable", "give --out a folder that you may write to")
    return Check("disk", "ok", text)


def _hub() -> Check:
    if not _installed("huggingface_hub"):
        return Check("hub", "bad", "huggingface_hub is missing", "pip install huggingface-hub")
    from huggingface_hub import constants

    offline = "; offline (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return Check("hub", "ok", f"models are kept in {constants.HF_HUB_CACHE}{offline}")


def _recipe(spec: str | Path, folder: Path) -> Iterator[Check]:
    from mlx_distill.evaluate.audit import FOLDER as AUDIT
    from mlx_distill.graph import graph
    from mlx_distill.recipe import load_recipe
    from mlx_distill.resources import stage_resources, total, total_disk

    recipe = load_recipe(spec)
    out = folder / "runs" / recipe.name
    needs = stage_resources(recipe, graph(recipe, recipe.load_task()), out)
    for name, need in needs.items():
        text = need.text or "nothing to download; disk not known"
        if need.memory is not None and need.memory > total_memory():
            less = "evaluate.audit_rows: 0" if name == AUDIT else "distill.teacher: cached"
            fix = f"set {less}, or take quantized models (convert.quantize)"
            yield Check(name, "bad", f"{text}; {total_memory() / _GB:.1f} GB on this machine", fix)
        else:
            yield Check(name, "ok", text)
    free = shutil.disk_usage(folder).free
    text = f"{total(needs)}; {free / _GB:.1f} GB free"
    if total_disk(needs) > free:
        yield Check(recipe.name, "bad", text, "free some disk, or give --out a folder on a larger one")
    else:
        yield Check(recipe.name, "ok", text)


def _extras() -> Iterator[Check]:
    for extra, (modules, purpose) in _EXTRAS.items():
        missing = [name for name in modules if not _installed(name)]
        if missing:
            text = f"{', '.join(missing)} not installed: {purpose}"
            yield Check(extra, "optional", text, f"pip install 'mlx-distill[{extra}]'")
        else:
            yield Check(extra, "ok", f"{', '.join(modules)}: {purpose}")
