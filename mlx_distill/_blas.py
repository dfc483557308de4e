"""Whoever imports mlx after this package gets the fast BLAS first, by whatever road the import comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType


class _BlasBeforeMlx:
    """A finder that finds nothing: it sees ``mlx.core`` being looked for, loads the BLAS, and steps aside."""

    @staticmethod
    def find_spec(name: str, path: Iterable[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "mlx.core":
            _forget()
            from mlx_distill.runtime import load_blas

            load_blas()
        return None


def blas_before_mlx() -> None:
    """Load OpenBLAS when ``mlx.core`` is about to be imported (Linux only), and not before: it costs 70 ms."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules and _BlasBeforeMlx not in sys.meta_path:
        sys.meta_path.insert(0, _BlasBeforeMlx)


def _forget() -> None:
    if _BlasBeforeMlx in sys.meta_path:
        sys.meta_path.remove(_BlasBeforeMlx)
