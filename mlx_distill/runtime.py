"""The machine and the process: BLAS, random state, memory, ranks, versions, signals.

On Linux the ``mlx[cpu]`` wheel links the reference BLAS. An OpenBLAS that is loaded before ``mlx.core`` makes
float32 matrix products about 30 times faster, so this module is imported first. On a Mac it loads nothing.
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
    """The state of OpenBLAS: ``loaded``, ``missing``, ``too late`` (mlx was imported first), ``disabled`` or
    ``not needed``; and its path.
    """

    state: str
    path: str | None = None


_blas: Blas | None = None


def load_blas() -> Blas:
    """Load OpenBLAS globally, once, on Linux. Never fails.

    ``MLX_DISTILL_BLAS=0`` turns it off; ``MLX_DISTILL_BLAS=/path/to/libopenblas.so.0`` names one.
    """
    global _blas
    if _blas is not None:
        return _blas
    _blas = _find_and_load()
    return _blas


def _find_and_load() -> Blas:
    setting = os.environ.get("MLX_DISTILL_BLAS", "")
    if sys.platform != "linux":
        return Blas("not needed")
    if setting == "0":
        return Blas("disabled")
    paths = [setting] if setting else sorted(path for pattern in _PATTERNS for path in glob.glob(pattern))
    if not paths:
        return Blas("missing")
    if "mlx.core" in sys.modules:
        return Blas("too late", paths[0])
    with _kernels_of_this_processor():
        for path in paths:
            try:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return Blas("loaded", path)
    return Blas("missing")


@contextmanager
def _kernels_of_this_processor() -> Iterator[None]:
    """Name the kernels that OpenBLAS is to load, by what the processor can do.

    OpenBLAS chooses by the processor's model, and takes kernels for SSE2 where it does not know the model:
    version 0.3.21 on a newer Xeon multiplies at a fifth of the speed. A choice of the user's stands. NumPy
    and SciPy have an OpenBLAS of their own that reads the same variable, so ours does not stay.
    """
    name, flags = "OPENBLAS_CORETYPE", _processor_flags()
    if name in os.environ or not {"avx2", "fma"} <= flags:
        yield
        return
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    os.environ[name] = "SkylakeX" if wide else "Haswell"
    try:
        yield
    finally:
        del os.environ[name]


def _processor_flags() -> set[str]:
    """What the first processor can do, in Linux's words; empty where that cannot be read."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return set()
    return set(line.partition(":")[2].split())


def blas_kernels(path: str) -> str | None:
    """The processor whose kernels the OpenBLAS at a path has loaded, such as ``SkylakeX``; None: it does not
    say.
    """
    try:
        name = ctypes.CDLL(path).openblas_get_corename
    except (OSError, AttributeError):
        return None
    name.restype = ctypes.c_char_p
    return (name() or b"").decode() or None


def random_key() -> list[int]:
    """The two words of MLX's random state on this thread.

    >>> import mlx.core as mx
    >>> key = random_key()
    >>> a = mx.random.normal((2,))
    >>> set_random_key(key)
    >>> mx.array_equal(a, mx.random.normal((2,))).item()
    True
    """
    import mlx.core as mx

    return [int(word) for word in mx.random.state[0].tolist()]


def set_random_key(key: Sequence[int]) -> None:
    """Set MLX's random state to what :func:`random_key` returned; the state itself cannot be assigned to."""
    import mlx.core as mx

    mx.random.seed((int(key[0]) << 32) | int(key[1]))


def peak_memory() -> int:
    """Peak memory of MLX's allocator since the last reset, in bytes."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def active_memory() -> int:
    """Memory of the arrays that are alive, in bytes; what nothing refers to any more is freed first."""
    import gc

    import mlx.core as mx

    gc.collect()
    return int(mx.get_active_memory())


def trim_heap() -> bool:
    """Give the pages that freed arrays have left back to the system, on Linux with glibc; whether it could.

    MLX's CPU backend allocates each array by ``malloc``, and glibc keeps what is freed, in an arena for each
    thread.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    trim(0)
    return True


def reset_peak_memory() -> None:
    """Start a new measurement with :func:`peak_memory`."""
    import mlx.core as mx

    mx.reset_peak_memory()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks under ``mlx.launch``; (0, 1) without it."""
    if not os.environ.get("MLX_RANK"):
        return 0, 1
    import mlx.core as mx

    group = mx.distributed.init()
    return group.rank(), group.size()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    names = ("mlx-distill", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
    out = {"python": platform.python_version()}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "missing"
    return out


def machine() -> dict[str, str | int]:
    """The machine for a manifest: system, processor, cores, memory in bytes, mlx device, BLAS."""
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
    """The processor's name, as far as the system knows it."""
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
    """Set by the first Ctrl-C or SIGTERM, or by a caller: a run finishes its step, saves and stops."""

    def __init__(self) -> None:
        self.set = False

    def __bool__(self) -> bool:
        return self.set


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Let the first SIGINT or SIGTERM set a flag and the second one kill; restore the handlers at the end."""
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
    except ValueError:  # not the main thread, where handlers cannot be set
        pass
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
