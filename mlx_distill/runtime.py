"""The machine under the arrays: BLAS, device, seed, memory, versions, signals.

Import this before ``mlx.core`` where you can: on Linux the ``mlx[cpu]`` wheel links the reference BLAS, and
an OpenBLAS that is loaded first makes float32 matrix products about 30 times faster. On a Mac nothing of that
happens.
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

_PATTERNS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib/*/openblas-openmp/libopenblas.so.0",
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblas*.so.0",
    "/usr/local/lib/libopenblas.so*",
    "/opt/OpenBLAS/lib/libopenblas.so*",
)


@dataclass(frozen=True)
class Blas:
    """State of the fast BLAS: ``loaded``, ``missing``, ``too late`` (mlx was imported first), ``disabled`` or
    ``not needed``.
    """

    state: str
    path: str | None = None


_blas: Blas | None = None


def load_blas() -> Blas:
    """Load OpenBLAS globally before mlx, once, where that helps (Linux). Never fails.

    ``MLX_DISTILL_BLAS=0`` turns it off; ``MLX_DISTILL_BLAS=/path/to/libopenblas.so.0`` names one.
    """
    global _blas
    if _blas is not None:
        return _blas
    _blas = _find_and_load()
    return _blas


def _find_and_load() -> Blas:
    wish = os.environ.get("MLX_DISTILL_BLAS", "")
    if sys.platform != "linux":
        return Blas("not needed")
    if wish == "0":
        return Blas("disabled")
    found = [wish] if wish else sorted(p for pattern in _PATTERNS for p in glob.glob(pattern))
    if not found:
        return Blas("missing")
    if "mlx.core" in sys.modules:
        return Blas("too late", found[0])
    for path in found:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return Blas("loaded", path)
    return Blas("missing")


def random_key() -> list[int]:
    """The two words of MLX's random state on this thread.

    >>> import mlx.core as mx
    >>> key = random_key(); a = mx.random.normal((2,)); set_random_key(key); mx.array_equal(a, mx.random.normal((2,))).item()
    True
    """
    import mlx.core as mx

    return [int(word) for word in mx.random.state[0].tolist()]


def set_random_key(key: Sequence[int]) -> None:
    """Put MLX's random state back to what :func:`random_key` gave; the state itself cannot be assigned to."""
    import mlx.core as mx

    mx.random.seed((int(key[0]) << 32) | int(key[1]))


def peak_memory() -> int:
    """Bytes: MLX's allocator peak since the last reset."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def reset_peak_memory() -> None:
    """Start a new measurement of :func:`peak_memory`."""
    import mlx.core as mx

    mx.reset_peak_memory()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks under ``mlx.launch``; (0, 1) alone."""
    if not os.environ.get("MLX_RANK"):
        return 0, 1
    import mlx.core as mx

    group = mx.distributed.init()
    return group.rank(), group.size()


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    names = ("mlx-distill", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
    out = {"python": platform.python_version()}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "missing"
    return out


def machine() -> dict[str, str | int]:
    """What ran it: system, processor, cores, memory in bytes, mlx device, BLAS."""
    import mlx.core as mx

    blas = load_blas()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": total_memory(),
        "device": str(mx.default_device()),
        "blas": blas.state,
    }


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        if sys.platform == "darwin":
            import subprocess

            out = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5
            )
            if out.returncode == 0 and out.stdout.strip():
                return out.stdout.strip()
        else:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of physical memory, 0 where unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


class StopFlag:
    """Set by the first Ctrl-C (or SIGTERM): finish the step, save, stop. The second one kills."""

    def __init__(self) -> None:
        self.set = False

    def __bool__(self) -> bool:
        return self.set


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag that a long loop looks at; restore the handlers
    afterwards.
    """
    flag = StopFlag()

    def handle(number: int, frame: object) -> None:
        if flag.set:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        flag.set = True
        print("\nstopping after this step (press again to stop at once)", file=sys.stderr, flush=True)

    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller's own handlers stay
        pass
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
